"""``timm-epfs prune``: cut a model, compare it with the dense one, save it."""
import argparse
import copy
import os
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Tuple

import torch
from timm.data import resolve_data_config
from torch import nn

from ..core import PruningError, aligned_table, one_line, progress, step
from ..importance import CRITERIA, recalibrate_bn
from ..latency import latencies, latency_note
from ..pruner import prune
from ..report import compare, image_loader, image_splits, random_images, table, top1
from ..zoo import check_free, check_readable, create_model, load_weights, save_pretrained
from .arguments import KeyValues, add_budget_arguments, add_choice_arguments, given_model_args, positive

__all__ = ['add_prune_arguments']

# Options of prune() that the shell passes on where they are given, so that their defaults stand in one place.
_OPTIONS = ('criterion', 'scope', 'widths', 'round_to', 'floor', 'exclude', 'only', 'ratios', 'kinds', 'streams')


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything but the model."""
    _add_cut_arguments(parser.add_argument_group('what to cut'))
    _add_output_arguments(parser.add_argument_group('weights and output'))
    _add_data_arguments(
        parser.add_argument_group('data', 'Adds BatchNorm recalibration and top-1; some criteria need it.'))
    parser.set_defaults(run=_prune)


def _add_cut_arguments(group: argparse._ArgumentGroup) -> None:
    add_budget_arguments(group)
    group.add_argument('--criterion', metavar='NAME', help=f'what ranks the units: {", ".join(CRITERIA)} (l2)')
    add_choice_arguments(group)
    group.add_argument(
        '--ratios', nargs='+', action=KeyValues, metavar='PATTERN=SHARE',
        help='shares to remove, set beforehand (none)')
    group.add_argument(
        '--seed', type=int, default=0, metavar='N', help='of random weights, scores and the choice of images (0)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--pretrained', action='store_true', help="start from the model's published weights (off)")
    group.add_argument('--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint (none)')
    group.add_argument('--device', default='cpu', help='device to run on (cpu)')
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='folder to save in, new or empty; no default')
    group.add_argument('--overwrite', action='store_true', help='replace a model that was saved there before (off)')


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='folder with a subfolder or .tar for each split, or a folder or .tar of images (none)')
    group.add_argument('--dataset', default='', metavar='NAME', help='dataset type, as in timm (folder or tar)')
    group.add_argument(
        '--train-split', default='train', metavar='NAME', help='split for criteria and recalibration (train)')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='split for top-1 (validation)')
    group.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images in a batch (128)')
    group.add_argument(
        '--num-batches', type=positive, default=32, metavar='N',
        help='batches of training images for the criterion and for recalibration (32)')
    group.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that read images (up to 4)')


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

    options = {name: value for name in _OPTIONS if (value := getattr(args, name)) is not None}
    with step(f'cutting {args.model}'):
        slim = prune(
            dense, args.macs, args.params, latency=args.latency, latency_batch_size=args.latency_batch_size,
            data=_some(train, args, f'scoring by {args.criterion}') if train else None, seed=args.seed,
            example_input=images, **options,
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
