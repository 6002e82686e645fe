"""``timm-epfs export``: write a model as ONNX or as a torch.export archive."""
import argparse
from pathlib import Path

from timm.utils import reparameterize_model

from ..core import PruningError, check_place, format_count, step
from ..deploy import FORMATS, export_model
from ..report import random_images
from ..zoo import load_model
from .arguments import positive

__all__ = ['add_export_arguments']


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument('model', metavar='NAME|DIR', help='a timm name, or the folder of a saved model (required)')
    parser.add_argument(
        '--format', required=True, choices=FORMATS, help='onnx, or pt2: a torch.export archive (required)')
    parser.add_argument(
        '-o', '--output', type=Path, metavar='FILE',
        help='file to write (default: <model>.<format> in the current folder)')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it exists (default: off)')
    parser.add_argument(
        '-b', '--batch-size', type=positive, default=1, metavar='N', help='images per batch (default: %(default)s)')
    parser.add_argument(
        '--dynamic-batch', action='store_true', help='let the file take batches of any size (default: off)')
    parser.add_argument(
        '--img-size', type=positive, metavar='N', help="image size in pixels (default: the model's own)")
    parser.add_argument(
        '--pretrained', action='store_true',
        help='load the published weights of a timm name; a saved model always has its own weights (default: off)')
    parser.add_argument(
        '--reparam', action='store_true', help='merge the branches that only training needs (default: off)')
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    path = args.output or Path(f'{Path(args.model).resolve().name}.{args.format}')
    check_place(path, 'export')
    if path.exists() and not args.overwrite:
        raise PruningError(f'export: {path} exists; name another file, or replace it with --overwrite')
    with step(f'building {args.model}'):
        model = load_model(args.model, args.pretrained, args.img_size)
        model = reparameterize_model(model, inplace=True) if args.reparam else model
    with step(f'exporting {args.model}'):
        images = random_images(model, args.img_size, args.batch_size)
        difference, largest = export_model(model, path, args.format, images, args.dynamic_batch)
    weights = 'saved' if Path(args.model).is_dir() else 'pretrained' if args.pretrained else 'random'
    batch = 'any batch' if args.dynamic_batch else f'batch {args.batch_size}'
    print(f'{path}: {format_count(path.stat().st_size)} bytes, {batch} of {tuple(images.shape[1:])}, {weights} weights')
    print(f'largest difference from the model: {difference:.2g}, of outputs up to {largest:.2g}')
