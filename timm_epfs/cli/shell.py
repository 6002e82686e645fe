"""The shell's way in. Options are named as in timm's scripts; each command but the smallest has a file of its own."""
import argparse
import json
import os
import sys
import warnings
from contextlib import contextmanager
from typing import Iterator, NoReturn, Optional, Sequence

import torch

from ..core import PruningError, step
from ..pruner import inspect
from ..version import __version__
from ..zoo.autoload import autoload_path, is_on, switch_off, switch_on
from .arguments import add_model_arguments, given_model_args
from .benchmark_command import add_benchmark_arguments
from .export_command import add_export_arguments
from .prune_command import add_prune_arguments
from .push_command import add_push_arguments
from .train_command import add_train_arguments

__all__ = ['main', 'parse_args']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments after the program's name, the process's own by default.

    Returns:
        Exit code: 0, 2 where what was asked can't be done, 130 where it was interrupted.
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
    except BrokenPipeError:  # whoever reads stdout has enough of it (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Options of a command line; arguments as in ``main``."""
    return _parser().parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print its usage first."""
        self.exit(2, f'timm-epfs: error: {message} (see {self.prog} --help)\n')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser('timm-epfs', description='Cut models of timm and torchvision to a budget.')
    parser.add_argument('--version', action='version', version=f'timm-epfs {__version__}')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    show = commands.add_parser('inspect', help='show what can be cut of a model')
    add_model_arguments(show)
    show.add_argument('--json', action='store_true', help='print JSON (off)')
    show.set_defaults(run=_inspect)

    cut = commands.add_parser('prune', help='cut a model and save it')
    add_model_arguments(cut)
    add_prune_arguments(cut)

    learn = commands.add_parser('train', help='train a model, learn what to cut, cut it, fine-tune and save it')
    add_model_arguments(learn)
    add_train_arguments(learn)

    time = commands.add_parser('benchmark', help='time pruned models against dense ones')
    add_benchmark_arguments(time)

    write = commands.add_parser('export', help='write a model as ONNX or as an archive of torch.export')
    add_export_arguments(write)

    share = commands.add_parser('push', help='push a saved model to the Hub, with a model card')
    add_push_arguments(share)

    auto = commands.add_parser('autoload', help='have programs that import timm know our names with no line changed')
    auto.add_argument('state', choices=('on', 'off', 'status'), help='for the Python environment that this runs in')
    auto.set_defaults(run=_autoload)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    size = args.img_size
    example = None if size is None else torch.empty(1, args.in_chans or 3, size, size, device='meta')
    with step(f'inspecting {args.model}'):
        report = inspect(args.model, example, **given_model_args(args))
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def _autoload(args: argparse.Namespace) -> None:
    if args.state == 'on':
        switch_on()
    elif args.state == 'off':
        switch_off()
    if is_on():
        print(f'autoload is on ({autoload_path()}): what imports timm knows our names')
    else:
        print("autoload is off: 'import timm_epfs' tells timm our names")


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f'timm-epfs: warning: {" ".join(str(message).split())}', file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
