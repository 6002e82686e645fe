"""``timm-epfs export``."""
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
    parser.add_argument('model', metavar='NAME|DIR', help='timm name, or the folder of a saved model')
    parser.add_argument(
        '--format', required=True, choices=FORMATS, help='onnx, or pt2: an archive of torch.export; no default')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='file to write (NAME.FORMAT in this folder)')
    parser.add_argument('--overwrite', action='store_true', help='replace a file that is there (off)')
    parser.add_argument('-b', '--batch-size', type=positive, default=1, metavar='N', help='images in a batch (1)')
    parser.add_argument('--dynamic-batch', action='store_true', help='take batches of any size (off)')
    parser.add_argument('--img-size', type=positive, metavar='N', help="image size in pixels (the model's own)")
    parser.add_argument(
        '--pretrained', action='store_true', help="a name's published weights; a folder has its own (off)")
    parser.add_argument(
        '--reparam', action='store_true', help='merge the branches that are only there for training (off)')
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    path = args.output or Path(f'{Path(args.model).resolve().name}.{args.format}')
    check_place(path, 'export')
    if path.exists() and not args.overwrite:
        raise PruningError(f'export: {path} exists; name another file or give --overwrite')
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
