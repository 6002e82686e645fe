"""The shell's way in: ``timm-epfs inspect``, ``prune``, ``train``, ``push``. Options are named as in timm's scripts."""
import argparse
import copy
import json
import os
import sys
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, NoReturn, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from ..allocate import SCOPES
from ..core import KINDS, PruningError, aligned_table, one_line, progress, step
from ..deploy.benchmark import add_benchmark_arguments
from ..deploy.export import add_export_arguments
from ..hub import push_to_hub
from ..importance import CRITERIA, recalibrate_bn
from ..latency import latencies, latency_note
from ..pruner import inspect, prune
from ..report import compare, image_loader, image_splits, random_images, table, top1
from ..training.options import add_train_arguments
from ..version import __version__
from ..zoo import check_free, check_readable, create_model, load_weights, save_pretrained
from ..zoo.autoload import autoload_path, is_on, switch_off, switch_on
from .arguments import KeyValues, add_latency_arguments, add_model_arguments, given_model_args, positive

__all__ = ['main', 'parse_args']

# Options of prune() that the shell passes on where they are given, so that their defaults stand in one place.
_PRUNE_OPTIONS = (
    'macs', 'params', 'latency', 'latency_batch_size', 'criterion', 'scope', 'round_to', 'floor', 'exclude', 'only',
    'ratios', 'kinds', 'streams',
)


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
    show.add_argument('--json', action='store_true', help='print JSON')
    show.set_defaults(run=_inspect)

    cut = commands.add_parser('prune', help='cut a model and save it')
    add_model_arguments(cut)
    _add_prune_arguments(cut)
    _add_data_arguments(cut)
    cut.set_defaults(run=_prune)

    learn = commands.add_parser('train', help='train a model, learn what to cut, cut it, fine-tune and save it')
    add_model_arguments(learn)
    add_train_arguments(learn)
    learn.set_defaults(run=_train)

    race = commands.add_parser('benchmark', help='time pruned models against dense ones')
    add_benchmark_arguments(race)

    write = commands.add_parser('export', help='write a model as ONNX or as an archive of torch.export')
    add_export_arguments(write)

    share = commands.add_parser('push', help='push a saved model to the Hub, with a model card')
    _add_push_arguments(share)
    share.set_defaults(run=_push)

    auto = commands.add_parser('autoload', help='have programs that import timm know our names with no line changed')
    auto.add_argument('state', choices=('on', 'off', 'status'), help='for the Python environment that this runs in')
    auto.set_defaults(run=_autoload)
    return parser


def _add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('what to cut')
    budget = group.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        '--macs', type=float, metavar='BUDGET', help='MACs to keep: a share (0.5) or a count (2e9)')
    budget.add_argument('--params', type=float, metavar='BUDGET', help='parameters to keep, likewise')
    add_latency_arguments(budget, group)
    group.add_argument('--criterion', metavar='NAME', help=f'{", ".join(CRITERIA)} (l2 by default)')
    group.add_argument('--scope', metavar='NAME', help=f'what is ranked together: {", ".join(SCOPES)}')
    group.add_argument(
        '--round-to', type=_round_to, metavar='N',
        help='widths that are cut stay multiples of this; auto: of what is fastest on the device')
    group.add_argument('--floor', type=float, metavar='SHARE', help='share of its units that every structure keeps')
    group.add_argument('--exclude', nargs='+', metavar='PATTERN', help='layers whose outputs are not to be cut')
    group.add_argument('--only', nargs='+', metavar='PATTERN', help='the only layers whose outputs are to be cut')
    group.add_argument(
        '--ratios', nargs='+', action=KeyValues, metavar='PATTERN=SHARE', help='shares to remove, set beforehand')
    group.add_argument(
        '--kinds', nargs='+', metavar='KIND', help=f'{", ".join(KINDS)} (all but whole blocks by default)')
    group.add_argument(
        '--streams', action=argparse.BooleanOptionalAction,
        help='cut residual streams that are normalised over their channels (only in need by default)')
    group.add_argument('--seed', type=int, default=0, metavar='N', help='of random weights, scores and image choice')

    group = parser.add_argument_group('weights and output')
    group.add_argument('--pretrained', action='store_true', help="start from the model's published weights")
    group.add_argument('--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint')
    group.add_argument('--device', default='cpu', help='device to run on (cpu by default)')
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='folder to save in, new or empty')
    group.add_argument('--overwrite', action='store_true', help='replace a model that was saved there before')


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('data', 'Adds BatchNorm recalibration and top-1; some criteria need it.')
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='folder with a subfolder or .tar for each split, or a folder or .tar of images')
    group.add_argument('--dataset', default='', metavar='NAME', help='dataset type, as in timm (folder or tar)')
    group.add_argument('--train-split', default='train', metavar='NAME', help='for criteria and recalibration (train)')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='for top-1 (validation)')
    group.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images a batch (128)')
    group.add_argument(
        '--num-batches', type=positive, default=32, metavar='N',
        help='batches of training images for the criterion and for recalibration (32)')
    group.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that read images')


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', type=Path, metavar='DIR', help='folder of a saved model')
    parser.add_argument('repo_id', metavar='OWNER/NAME', help='repo to push to, made where there is none')
    parser.add_argument('--metrics', type=Path, metavar='FILE', help='JSON of what was measured, for the card')
    parser.add_argument('--private', action='store_true', default=None, help='make a new repo private')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to push to, made where there is none')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--overwrite-card', action='store_true', help='replace a card that was written by hand')


def _round_to(text: str) -> Union[int, str]:
    return text if text == 'auto' else positive(text)


def _inspect(args: argparse.Namespace) -> None:
    size = args.img_size
    example = None if size is None else torch.empty(1, args.in_chans or 3, size, size, device='meta')
    with step(f'inspecting {args.model}'):
        report = inspect(args.model, example, **given_model_args(args))
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)


def _prune(args: argparse.Namespace) -> None:
    _check(args)
    torch.manual_seed(args.seed)
    with step(f'building {args.model}'):
        dense = create_model(args.model, args.pretrained, **given_model_args(args))
        if args.checkpoint:
            load_weights(dense, args.checkpoint)
        with one_line(f'device {args.device!r} can\'t be used'):
            dense.to(args.device)
    images = random_images(dense, args.img_size, seed=args.seed)
    train, val = _loaders(args, dense, images) if args.data_dir else (None, None)

    options = {name: value for name in _PRUNE_OPTIONS if (value := getattr(args, name)) is not None}
    with step(f'cutting {args.model}'):
        slim = prune(
            dense,
            data=_some(train, args, f'scoring by {args.criterion}') if train else None,
            seed=args.seed,
            example_input=images,
            **options,
        )
    cut_only = slim
    if train and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in slim.modules()):
        cut_only = copy.deepcopy(slim)
        recalibrate_bn(slim, _some(train, args, 'recalibrating BatchNorm'))
    accuracy = _accuracy(dense, cut_only, slim, val) if val else {}
    with step('measuring latency'):
        speed = latencies([dense, slim], images.to(args.device))
    with step(f'saving to {args.output}'):
        folder = save_pretrained(slim, args.output, overwrite=args.overwrite)
    print(aligned_table(table(compare(dense, slim, accuracy, speed))))
    weights = args.checkpoint or ('pretrained' if args.pretrained else 'random')
    print(f'weights: {weights}; {latency_note(args.device)}')
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{folder}"!r}, pretrained=True)')


def _train(args: argparse.Namespace) -> None:
    from ..training.run import train  # what it needs is slow to import
    result = train(args, given_model_args(args))
    if result is None:  # the first process speaks for all
        return
    print(aligned_table(table(result.rows)))
    print(result.notes)
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{result.folder}"!r}, pretrained=True)')


def _push(args: argparse.Namespace) -> None:
    with one_line(f'{args.folder} can\'t be loaded'):
        model = timm.create_model(f'local-dir:{args.folder}', pretrained=True)
    with one_line(f'metrics in {args.metrics} can\'t be read'):
        metrics = json.loads(args.metrics.read_text(encoding='utf-8')) if args.metrics else None
    options = {name: getattr(args, name) for name in ('private', 'revision', 'create_pr', 'overwrite_card')}
    pushed = push_to_hub(model, args.repo_id, metrics, **options)
    what = f'pushed {", ".join(pushed.files)}' if pushed.files else 'nothing to push, the repo has it all'
    print(f'{what}: {pushed.pull_request or pushed.url}')


def _autoload(args: argparse.Namespace) -> None:
    if args.state == 'on':
        switch_on()
    elif args.state == 'off':
        switch_off()
    if is_on():
        print(f'autoload is on ({autoload_path()}): what imports timm knows our names')
    else:
        print("autoload is off: 'import timm_epfs' tells timm our names")


def _check(args: argparse.Namespace) -> None:
    """Refuse before any work what would be refused after it."""
    check_free(args.output.resolve(), args.overwrite)
    criterion = CRITERIA.get(args.criterion)
    if criterion and criterion.needs_data and not args.data_dir:
        raise PruningError(f'criterion {args.criterion!r} needs data, found none: give --data-dir')
    if args.checkpoint:
        check_readable(args.checkpoint)


def _loaders(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> Tuple[Any, Any]:
    """Batches for calibration and for evaluation."""
    splits = (args.train_split, args.val_split)
    train, val = image_splits(args.data_dir, splits, args.dataset, getattr(model, 'num_classes', None))
    config = resolve_data_config({'input_size': tuple(images.shape[1:])}, model=model)
    some = args.num_batches * args.batch_size
    return (
        image_loader(train, config, args.batch_size, args.workers, some, args.seed),
        image_loader(val, config, args.batch_size, args.workers),
    )


def _some(loader: Any, args: argparse.Namespace, what: str) -> Iterator:
    return _reading(islice(loader, args.num_batches), what, min(args.num_batches, len(loader)))


def _reading(batches: Iterable, what: str, total: int) -> Iterator:
    with one_line(f'{what}: images can\'t be read'):
        yield from progress(batches, what, total)


def _accuracy(dense: nn.Module, cut: nn.Module, slim: nn.Module, val: Any) -> Dict[str, Tuple[float, float]]:
    """Top-1 of the dense model against the cut one, before and after recalibration, in percent."""
    models = [dense, cut] if cut is slim else [dense, cut, slim]
    first, *others = top1(models, _reading(val, 'measuring top-1', len(val)))
    return dict(zip(('top-1, %', 'top-1 after BatchNorm recalibration, %'), [(first, other) for other in others]))


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f'timm-epfs: warning: {" ".join(str(message).split())}', file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
