"""The dense model and the images of ``timm-epfs prune``, ``sensitivity`` and ``export``, and their options."""
import argparse
import os
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Sequence, Tuple

import torch
from timm.data import resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from ..core import Repeatable, one_line, progress, step
from ..report import image_loader, image_splits
from ..zoo import check_readable, create_model, load_weights
from .arguments import given_model_args, positive

__all__ = [
    'add_data_arguments', 'add_source_arguments', 'add_weight_arguments', 'build_dense', 'check_weights', 'fit_images',
    'read_images', 'with_progress',
]


def add_weight_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the weights of the dense model, its device, and the seed."""
    group.add_argument(
        '--pretrained', action='store_true',
        help="start from the model's published weights (default: off; a saved model always has its own weights)")
    group.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint (default: none)')
    group.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    group.add_argument(
        '--seed', type=int, default=0, metavar='N',
        help='seed of random weights, random scores and the choice of images (default: %(default)s)')


def add_source_arguments(group: argparse._ArgumentGroup, used_for: str, required: bool = False) -> None:
    """Add a folder of images, and how it is read.

    Args:
        group: The group of options.
        used_for: What the training images are for.
        required: Whether there must be images.
    """
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR', required=required,
        help='folder with a subfolder or .tar for each split, or a folder or .tar of images '
             f'({"required" if required else "default: none"})')
    group.add_argument(
        '--dataset', default='', metavar='NAME', help='dataset type, as in timm (default: a folder or .tar of images)')
    group.add_argument(
        '--train-split', default='train', metavar='NAME', help=f'split for {used_for} (default: %(default)s)')
    group.add_argument(
        '-j', '--workers', type=int, default=min(4, os.cpu_count() or 1), metavar='N',
        help='processes that load images (default: %(default)s; the number of CPU cores, at most 4)')


def add_data_arguments(group: argparse._ArgumentGroup, required: bool = False) -> None:
    """Add a folder of images, and how many of them criteria and compensation use.

    Args:
        group: The group of options.
        required: Whether there must be images.
    """
    add_source_arguments(group, 'criteria, widths and compensation', required)
    group.add_argument(
        '-b', '--batch-size', type=positive, default=128, metavar='N', help='images per batch (default: %(default)s)')
    group.add_argument(
        '--num-batches', type=positive, default=32, metavar='N',
        help='largest number of batches of training images to use (default: %(default)s)')


def check_weights(args: argparse.Namespace) -> None:
    """Raise ``PruningError`` if the checkpoint can't be read."""
    if args.checkpoint:
        check_readable(args.checkpoint)


def build_dense(args: argparse.Namespace) -> nn.Module:
    """The dense model with its weights, on the device.

    Raises:
        PruningError: There is no such model, weights don't fit, or there is no such device.
    """
    torch.manual_seed(args.seed)
    with step(f'building {args.model}'):
        dense = create_model(args.model, args.pretrained, **given_model_args(args))
        if args.checkpoint:
            load_weights(dense, args.checkpoint)
        with one_line(f'device {args.device!r} can\'t be used'):
            dense.to(args.device)
    return dense


def read_images(
        args: argparse.Namespace,
        model: nn.Module,
        images: torch.Tensor,
        splits: Sequence[str],
) -> Tuple[Tuple[Dataset, ...], Dict[str, Any]]:
    """The splits of the dataset, and timm's data config.

    Args:
        args: The options.
        model: The model that gets the images.
        images: Images of the size that it gets.
        splits: Names of the splits.

    Raises:
        PruningError: There are no images, or a split is missing.
    """
    datasets = image_splits(args.data_dir, splits, args.dataset, getattr(model, 'num_classes', None))
    return datasets, resolve_data_config({'input_size': tuple(images.shape[1:])}, model=model)


def fit_images(dataset: Dataset, config: Dict[str, Any], args: argparse.Namespace) -> Repeatable:
    """Batches of as many training images as the options ask for."""
    images = args.num_batches * args.batch_size
    loader = image_loader(dataset, config, args.batch_size, args.workers, images, args.seed)
    count = min(args.num_batches, len(loader))
    return Repeatable(lambda: with_progress(islice(loader, args.num_batches), 'reading images', count))


def with_progress(batches: Iterable[Any], task: str, total: int) -> Iterator[Any]:
    """Batches with a progress bar, and one line for an image that can't be read."""
    with one_line(f'{task}: images can\'t be read'):
        yield from progress(batches, task, total)
