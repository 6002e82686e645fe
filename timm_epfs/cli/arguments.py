"""Options that several commands share, and what they mean for a model."""
import argparse
from typing import Any, Dict, Union

from timm.utils import ParseKwargs

from ..allocate import SCOPES
from ..core import DEFAULT_KINDS, KINDS
from ..importance import WITHOUT_DATA
from ..zoo import model_args

__all__ = [
    'KeyValues', 'add_budget_arguments', 'add_choice_arguments', 'add_model_arguments', 'given_model_args',
    'positive', 'positive_or_zero',
]


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


def positive_or_zero(text: str) -> int:
    """An option's type: a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number')
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names a model and its arguments."""
    group = parser.add_argument_group('model')
    group.add_argument(
        'model', metavar='NAME',
        help='timm name, torchvision/<name>, or a saved model: local-dir:<folder>, hf-hub:<repo>')
    group.add_argument('--num-classes', type=int, metavar='N', help="number of classes (the model's own)")
    group.add_argument('--in-chans', type=int, metavar='N', help='image input channels (3)')
    group.add_argument('--img-size', type=int, metavar='N', help="image size in pixels (the model's own)")
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the model (none)')


def given_model_args(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of the model that the options of ``add_model_arguments`` name."""
    given = {'num_classes': args.num_classes, 'in_chans': args.in_chans, **args.model_kwargs}
    return model_args(args.model, args.img_size, given)


def add_budget_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the budgets, of which one is needed."""
    budget = group.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        '--macs', type=float, metavar='BUDGET', help='MACs to keep: a share (0.5) or a count (2e9); no default')
    budget.add_argument('--params', type=float, metavar='BUDGET', help='parameters to keep, likewise')
    budget.add_argument(
        '--latency', type=_latency, metavar='BUDGET',
        help='time to keep, as measured on the device: a share (0.5) or milliseconds (12ms)')
    group.add_argument(
        '--latency-batch-size', type=positive, default=1, metavar='N',
        help='images in a batch, where time is measured (1)')


def add_choice_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what may be cut, and how the units that stay are chosen."""
    group.add_argument('--scope', metavar='NAME', help=f'what is ranked together: {", ".join(SCOPES)} (global)')
    group.add_argument(
        '--widths', metavar='NAME',
        help=f'what says how many units each layer keeps: cost, {", ".join(WITHOUT_DATA)} (what ranks them)')
    group.add_argument(
        '--round-to', type=_round_to, metavar='N',
        help='widths that are cut stay multiples of this; auto: of what is fastest on the device (16 in wide layers)')
    group.add_argument(
        '--floor', type=float, metavar='SHARE', help='share of its units that every structure keeps (0.05)')
    group.add_argument(
        '--exclude', nargs='+', metavar='PATTERN', help='layers whose outputs are not to be cut (none)')
    group.add_argument(
        '--only', nargs='+', metavar='PATTERN', help='the only layers whose outputs are to be cut (all)')
    group.add_argument(
        '--kinds', nargs='+', metavar='KIND', help=f'{", ".join(KINDS)} ({", ".join(DEFAULT_KINDS)}; SSS: all)')
    group.add_argument(
        '--streams', action=argparse.BooleanOptionalAction,
        help='cut residual streams that are normalised over their channels (prune: only in need; train: no)')


def _latency(text: str) -> Union[float, str]:
    """A share where it's a number; what is wrong with any other text is said where it's used."""
    try:
        return float(text)
    except ValueError:
        return text


def _round_to(text: str) -> Union[int, str]:
    return text if text == 'auto' else positive(text)
