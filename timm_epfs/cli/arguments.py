"""Options that several commands share, and what they mean for a model."""
import argparse
from typing import Any, Dict, Mapping, Optional, Union

from timm.models import resolve_model_input_args
from timm.utils import ParseKwargs

from ..surgery import TORCHVISION

__all__ = ['KeyValues', 'add_latency_arguments', 'add_model_arguments', 'given_model_args', 'model_args', 'positive']


class KeyValues(ParseKwargs):
    """timm's key=value pairs, with an error for what isn't one."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'argument {option_string}: {value!r} is not key=value')
        super().__call__(parser, namespace, values, option_string)


def positive(text: str) -> int:
    """An option's type: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 1 on')
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a model and its arguments."""
    group = parser.add_argument_group('model')
    group.add_argument(
        'model', metavar='NAME',
        help='timm name, torchvision/<name>, or a saved model: local-dir:<folder>, hf-hub:<repo>')
    group.add_argument('--num-classes', type=int, metavar='N', help="number of classes (the model's own by default)")
    group.add_argument('--in-chans', type=int, metavar='N', help='image input channels (3 by default)')
    group.add_argument('--img-size', type=int, metavar='N', help="image size in pixels (the model's own by default)")
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the model')


def given_model_args(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of the model that the options of ``add_model_arguments`` name."""
    given = {'num_classes': args.num_classes, 'in_chans': args.in_chans, **args.model_kwargs}
    return model_args(args.model, args.img_size, given)


def add_latency_arguments(budget: argparse._MutuallyExclusiveGroup, group: argparse._ArgumentGroup) -> None:
    """Add a latency to the budgets, and to a group what goes with it."""
    budget.add_argument(
        '--latency', type=_latency, metavar='BUDGET',
        help='time to keep, as measured on the device: a share (0.5) or milliseconds (12ms)')
    group.add_argument(
        '--latency-batch-size', type=positive, metavar='N', help='images a batch, where time is measured (1)')


def _latency(text: str) -> Union[float, str]:
    """A share where it's a number; what is wrong with any other text is said where it's used."""
    try:
        return float(text)
    except ValueError:
        return text


def model_args(name: str, img_size: Optional[int], given: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of a model; an image size only where its structure depends on it.

    Args:
        name: As it was given on the command line.
        img_size: Pixels, None for the model's own.
        given: Its other arguments; those of None are left out.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if img_size is None or name.startswith(TORCHVISION):
        return given
    try:
        resolved = resolve_model_input_args(name, {'img_size': img_size}, **given)
    except Exception:  # whatever is wrong with the name is said better where the model is built
        return given
    return {name: value for name, value in resolved.items() if name == 'img_size' or name in given}
