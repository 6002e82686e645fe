"""``timm-epfs prune``: prune a model, compare it with the dense one, and save it."""
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
from ..importance import CRITERIA
from ..latency import latencies, latency_note
from ..pruner import prune
from ..report import compare, image_loader, image_splits, random_images, table, top1
from ..surgery import compensate
from ..zoo import check_free, check_readable, create_model, load_weights, save_pretrained
from .arguments import KeyValues, add_budget_arguments, add_choice_arguments, given_model_args, positive

__all__ = ['add_prune_arguments']

# Options that are passed on to prune() only if they were given: their defaults are those of prune().
_OPTIONS = ('criterion', 'scope', 'widths', 'round_to', 'floor', 'exclude', 'only', 'ratios', 'kinds', 'streams')


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command but those of the model."""
    _add_cut_arguments(parser.add_argument_group('what to cut'))
    _add_output_arguments(parser.add_argument_group('weights and output'))
    _add_data_arguments(
        parser.add_argument_group('data', 'Images for compensation, for top-1 and for some criteria.'))
    parser.set_defaults(run=_prune)


def _add_cut_arguments(group: argparse._ArgumentGroup) -> None:
    add_budget_arguments(group)
    group.add_argument(
        '--criterion', metavar='NAME', help=f'criterion that ranks the units: {", ".join(CRITERIA)} (default: l2)')
    add_choice_arguments(group)
    group.add_argument(
        '--ratios', nargs='+', action=KeyValues, metavar='PATTERN=SHARE',
        help='share of its units to remove from each layer that a pattern names (default: chosen within the budget)')
    group.add_argument(
        '--seed', type=int, default=0, metavar='N',
        help='seed of random weights, random scores and the choice of images (default: %(default)s)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--pretrained', action='store_true', help="start from the model's published weights (default: off)")
    group.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint (default: none)')
    group.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='new or empty folder to save in (required)')
    group.add_argument(
        '--overwrite', action='store_true', help='replace the model that was saved in this folder (default: off)')


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='folder with a subfolder or .tar for each split, or a folder or .tar of images (default: none)')
    group.add_argument(
        '--dataset', default='', metavar='NAME', help='dataset type, as in timm (default: a folder or .tar of images)')
    group.add_argument(
        '--train-split', default='train', metavar='NAME',
        help='split for the criterion and for compensation (default: %(default)s)')
    group.add_argument(
        '--val-split', default='validation', metavar='NAME', help='split for top-1 (default: %(default)s)')
    group.add_argument(
        '-b', '--batch-size', type=positive, default=128, metavar='N', help='images per batch (default: %(default)s)')
    group.add_argument(
        '--num-batches', type=positive, default=32, metavar='N',
        help='batches of training images for the criterion and for compensation (default: %(default)s)')
    group.add_argument(
        '--no-compensate', action='store_true',
        help='with --data-dir, leave the weights that stay as they are; else they make up for those that went '
             '(default: off)')
    group.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images (default: %(default)s; the number of CPU cores, at most 4)')


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

    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    with step(f'cutting {args.model}'):
        slim = prune(
            dense, args.macs, args.params, latency=args.latency, latency_batch_size=args.latency_batch_size,
            data=_first_batches(train, args, f'scoring by {args.criterion}') if train else None,
            compensate=False, seed=args.seed, example_input=images, **options,
        )
    before_compensation = slim
    if train and not args.no_compensate:
        before_compensation = copy.deepcopy(slim)
        compensate(slim, dense, islice(train, args.num_batches))
    accuracy = _accuracy(dense, before_compensation, slim, val) if val else {}
    with step('measuring latency'):
        latency_ms = latencies([dense, slim], images.to(args.device))
    with step(f'saving to {args.output}'):
        folder = save_pretrained(slim, args.output, overwrite=args.overwrite)
    print(aligned_table(table(compare(dense, slim, accuracy, latency_ms))))
    weights = args.checkpoint or ('pretrained' if args.pretrained else 'random')
    print(f'weights: {weights}; {latency_note(args.device)}')
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{folder}"!r}, pretrained=True)')


def _check(args: argparse.Namespace) -> None:
    """Raise ``PruningError`` before any work starts, for whatever would fail after it."""
    check_free(args.output.resolve(), args.overwrite)
    criterion = CRITERIA.get(args.criterion)
    if criterion and criterion.needs_data and not args.data_dir:
        raise PruningError(f'criterion {args.criterion!r} needs images, none were given; give --data-dir')
    if args.checkpoint:
        check_readable(args.checkpoint)


def _loaders(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> Tuple[Any, Any]:
    """Batches for scoring and compensation, and batches for evaluation."""
    splits = (args.train_split, args.val_split)
    train, val = image_splits(args.data_dir, splits, args.dataset, getattr(model, 'num_classes', None))
    config = resolve_data_config({'input_size': tuple(images.shape[1:])}, model=model)
    train_images = args.num_batches * args.batch_size
    return (
        image_loader(train, config, args.batch_size, args.workers, train_images, args.seed),
        image_loader(val, config, args.batch_size, args.workers),
    )


def _first_batches(loader: Any, args: argparse.Namespace, task: str) -> Iterator:
    return _with_progress(islice(loader, args.num_batches), task, min(args.num_batches, len(loader)))


def _with_progress(batches: Iterable, task: str, total: int) -> Iterator:
    with one_line(f'{task}: images can\'t be read'):
        yield from progress(batches, task, total)


def _accuracy(
        dense: nn.Module,
        before_compensation: nn.Module,
        slim: nn.Module,
        val: Any,
) -> Dict[str, Tuple[float, float]]:
    """Top-1 in percent of the dense model and of the pruned one, before and, if it was done, after compensation."""
    pruned = {'top-1, %': before_compensation}
    if slim is not before_compensation:
        pruned['top-1 after compensation, %'] = slim
    dense_top1, *pruned_top1 = top1([dense, *pruned.values()], _with_progress(val, 'measuring top-1', len(val)))
    return {label: (dense_top1, value) for label, value in zip(pruned, pruned_top1)}
