"""The command line: its parser and its exit codes. Options are named as in timm's scripts.

The two smallest commands, ``inspect`` and ``autoload``, are here. Each of the others has a file of its own.
"""
import argparse
import json
import os
import re
import sys
import warnings
from contextlib import contextmanager
from typing import Any, Iterator, List, NoReturn, Optional, Sequence, Tuple

import torch

from ..core import PruningError, nearest, step
from ..pruner import inspect
from ..report import random_images
from ..version import __version__
from ..zoo import create_model
from ..zoo.autoload import autoload_path, is_on, switch_off, switch_on
from .arguments import add_model_arguments, given_model_args
from .benchmark_command import add_benchmark_arguments
from .export_command import add_export_arguments
from .prune_command import add_prune_arguments
from .push_command import add_push_arguments
from .sensitivity_command import add_sensitivity_arguments
from .train_command import add_train_arguments

__all__ = ['main', 'parse_args']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments after the program's name. None: those of this process.

    Returns:
        Exit code: 0 for success, 2 for an error, 130 after an interruption, 1 if the reader of stdout closed it.
    """
    args = parse_args(argv)
    try:
        with _warnings_in_one_line():
            args.run(args)
            sys.stdout.flush()
    except PruningError as e:
        print(f'timm-epfs: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('timm-epfs: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout closed it, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse a command line. Its argument is that of ``main``.

    A saved model has its own weights, without being asked for, unless it's given others.
    """
    args = _parser().parse_args(argv)
    if str(getattr(args, 'model', '')).startswith(('local-dir:', 'hf-hub:')) and not getattr(args, 'checkpoint', None):
        args.pretrained = True
    return args


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name the nearest option or command."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{'allow_abbrev': False, **options})
        self._given: List[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Tuple[argparse.Namespace, List[str]]:
        """Refuse unknown options here, where those of the command are known, so that the nearest can be named."""
        self._given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # before argparse looks for what is missing, which a misspelt option may stand for
            self._refuse([text for text in self._given if self._is_unknown_option(text)])
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line; argparse would print the usage before it."""
        lists = [text for text in self._given if self._takes_a_list(text)]
        if lists and re.match('the following arguments are required: [^-]', message):
            message += f'; {lists[0]} takes all values up to the next option, so give these before it'
        self.exit(2, f'timm-epfs: error: {message} (see {self.prog} --help)\n')

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest of the choices, which argparse doesn't in all versions of Python."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as e:
            near = nearest(value, map(str, action.choices or ()))
            if near:
                e.message += f'; did you mean {near[0]}?'
            raise

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            near = nearest(unknown[0].partition('=')[0], self._option_string_actions)
            hint = f'; did you mean {near[0]}?' if near else ''
            self.error(f'unrecognized arguments: {" ".join(unknown)}{hint}')

    def _is_unknown_option(self, text: str) -> bool:
        name = text.partition('=')[0]
        return name.startswith('--') and ' ' not in name and name != '--' and name not in self._option_string_actions

    def _takes_a_list(self, text: str) -> bool:
        action = self._option_string_actions.get(text)
        return action is not None and action.nargs in ('+', '*')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser('timm-epfs', description='Prune models of timm and torchvision to a budget.')
    parser.add_argument('--version', action='version', version=f'timm-epfs {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    inspecting = commands.add_parser('inspect', help='show what can be cut from a model')
    add_model_arguments(inspecting)
    inspecting.add_argument('--json', action='store_true', help='print JSON (default: off)')
    inspecting.set_defaults(run=_inspect)

    pruning = commands.add_parser('prune', help='prune a model and save it')
    add_model_arguments(pruning)
    add_prune_arguments(pruning)

    measuring = commands.add_parser('sensitivity', help='measure what cutting each layer costs')
    add_model_arguments(measuring)
    add_sensitivity_arguments(measuring)

    training = commands.add_parser('train', help='train a model, learn what to cut, cut it, fine-tune it and save it')
    add_model_arguments(training, "the model's own; 16 for --dataset digits")
    add_train_arguments(training)

    add_benchmark_arguments(commands.add_parser('benchmark', help='time pruned models against dense ones'))
    add_export_arguments(commands.add_parser('export', help='write a model as ONNX or as a torch.export archive'))
    add_push_arguments(commands.add_parser('push', help='push a saved model to the Hub, with a model card'))

    autoloading = commands.add_parser(
        'autoload', help='let every program that imports timm build pruned models, without importing timm_epfs')
    autoloading.add_argument(
        'state', choices=('on', 'off', 'status'),
        help='switch this on or off for the running Python environment, or show whether it is on (required)')
    autoloading.set_defaults(run=_autoload)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    with step(f'building {args.model}'), torch.device('meta'):
        model = create_model(args.model, **given_model_args(args))
    report = inspect(model, random_images(model, args.img_size))
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def _autoload(args: argparse.Namespace) -> None:
    if args.state == 'on':
        switch_on()
    elif args.state == 'off':
        switch_off()
    if is_on():
        print(f'autoload is on ({autoload_path()}): every program that imports timm can build pruned models')
    else:
        print('autoload is off: a program must import timm_epfs before timm can build pruned models')


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f'timm-epfs: warning: {" ".join(str(message).split())}', file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
