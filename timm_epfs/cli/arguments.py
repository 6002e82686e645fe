"""Options that several commands share, and the arguments of a model that they stand for.

Every help text ends with the option's default, or says that the option is required.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, Union

from timm.utils import ParseKwargs

from ..allocate import SCOPES
from ..core import DEFAULT_KINDS, KINDS
from ..importance import WITHOUT_DATA
from ..zoo import model_args

__all__ = [
    'KeyValues', 'add_budget_arguments', 'add_choice_arguments', 'add_model_arguments', 'add_report_argument',
    'given_model_args', 'positive', 'positive_or_zero',
]

_ONE_BUDGET = 'required: one of --macs, --params, --latency'
_PATTERNS = "names of layers or modules (layer1), with or without wildcards ('*.conv3')"


class KeyValues(ParseKwargs):
    """timm's parser of key=value pairs, with an error for an argument that isn't one."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'argument {option_string}: {value!r} is not key=value')
        super().__call__(parser, namespace, values, option_string)


def positive(text: str) -> int:
    """The type of options that take a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def positive_or_zero(text: str) -> int:
    """The type of options that take a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 0')
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser, img_size_default: str = "the model's own") -> None:
    """Add the model's name and its arguments.

    Args:
        parser: The parser of a command.
        img_size_default: What the help says about the default of ``--img-size``.
    """
    group = parser.add_argument_group('model')
    group.add_argument(
        'model', metavar='NAME',
        help='a timm name, torchvision/<name>, or a saved model: local-dir:<folder> or hf-hub:<repo> (required)')
    group.add_argument(
        '--num-classes', type=int, metavar='N', help="number of classes (default: the model's own)")
    group.add_argument(
        '--in-chans', type=int, metavar='N', help="number of channels of an input image (default: the model's own)")
    group.add_argument('--img-size', type=int, metavar='N', help=f'image size in pixels (default: {img_size_default})')
    group.add_argument(
        '--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further keyword arguments of the model (default: none)')


def given_model_args(args: argparse.Namespace) -> Dict[str, Any]:
    """Keyword arguments of the model, from the options of ``add_model_arguments``."""
    given = {'num_classes': args.num_classes, 'in_chans': args.in_chans, **args.model_kwargs}
    return model_args(args.model, args.img_size, given)


def add_budget_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the three budgets, exactly one of which must be given."""
    budget = group.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        '--macs', type=_share_or_count, metavar='BUDGET',
        help=f'MACs to keep: a share (0.5) or a count (2e9) ({_ONE_BUDGET})')
    budget.add_argument(
        '--params', type=_share_or_count, metavar='BUDGET',
        help=f'parameters to keep: a share (0.5) or a count (2e7) ({_ONE_BUDGET})')
    budget.add_argument(
        '--latency', type=_latency, metavar='BUDGET',
        help=f'latency to keep, measured on the device: a share (0.5) or milliseconds (12ms) ({_ONE_BUDGET})')
    group.add_argument(
        '--latency-batch-size', type=positive, default=1, metavar='N',
        help='batch size at which latency is measured (default: %(default)s)')


def add_choice_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what may be cut, and how the units that stay are chosen."""
    group.add_argument(
        '--scope', metavar='NAME',
        help=f'which units are ranked against each other: {", ".join(SCOPES)} '
             '(default: global; train --method sfp or bn_sfp: always local)')
    group.add_argument(
        '--widths', metavar='NAME',
        help=f'what decides how many units each layer keeps: sensitivity (measured on images), cost, '
             f'{", ".join(WITHOUT_DATA)} (default: the scores that rank the units; prune with --data-dir: sensitivity)')
    group.add_argument(
        '--round-to', type=_round_to, metavar='N',
        help='round the widths of layers that are cut to multiples of this; auto measures which multiple is fastest '
             'on the device (default: 16 in wide layers and less in narrow ones; auto with --latency)')
    group.add_argument(
        '--floor', type=float, metavar='SHARE',
        help='smallest share of its units that a layer may keep (default: 0.05)')
    group.add_argument(
        '--exclude', nargs='+', metavar='PATTERN',
        help=f'do not cut the outputs of these layers: {_PATTERNS} (default: none)')
    group.add_argument(
        '--only', nargs='+', metavar='PATTERN',
        help=f'cut the outputs of these layers only: {_PATTERNS} (default: all)')
    group.add_argument(
        '--kinds', nargs='+', metavar='KIND',
        help=f'kinds of units to cut: channels (or filters, neurons), {", ".join(KINDS[1:])} '
             f'(default: {", ".join(DEFAULT_KINDS)}; with --latency blocks, too, unless a method learns; train '
             f'--method sss: all)')
    group.add_argument(
        '--streams', action=argparse.BooleanOptionalAction,
        help='whether residual streams that are normalised over their channels may be cut '
             '(default: only if the budget can\'t be met otherwise; train with a method that learns: no)')


def add_report_argument(group: argparse._ArgumentGroup) -> None:
    """Add the page that shows the result."""
    group.add_argument(
        '--report', type=Path, metavar='FILE',
        help='write a page that shows the result, a .html file that needs no network (default: none)')


def _share_or_count(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number; give a share (0.5) or a count (2e9)') from None


def _latency(text: str) -> Union[float, str]:
    """A share as a number; any other text is passed on, and ``Budget`` checks it."""
    try:
        return float(text)
    except ValueError:
        return text


def _round_to(text: str) -> Union[int, str]:
    if text == 'auto':
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is neither a whole number of at least 1 nor auto')
    return int(text)
