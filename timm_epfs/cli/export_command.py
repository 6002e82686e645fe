"""``timm-epfs export``: write a model as ONNX or as a torch.export archive, in float32 or int8."""
import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ..core import PruningError, aligned_table, check_place, format_count, one_line, percent, step, write_whole
from ..deploy import FORMATS, Int8Report, export_int8, export_model
from ..hub import check_metrics
from ..report import class_count, image_loader, random_images
from ..zoo import load_model
from .arguments import positive
from .data_arguments import add_source_arguments, read_images, with_progress

__all__ = ['add_export_arguments']

_TEST_BATCH = 32  # images that are loaded at once
_ENGINES = {'onnx': 'ONNX Runtime', 'pt2': 'torch.compile'}


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument('model', metavar='NAME|DIR', help='a timm name, or the folder of a saved model (required)')
    parser.add_argument(
        '--format', required=True, choices=FORMATS, help='onnx, or pt2: a torch.export archive (required)')
    parser.add_argument(
        '-o', '--output', type=Path, metavar='FILE',
        help='file to write (default: <model>.<format> in the current folder; with --int8: <model>_int8.<format>)')
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
    _add_int8_arguments(parser.add_argument_group('int8', 'Weights and activations in int8, measured on images.'))
    parser.set_defaults(run=_export)


def _add_int8_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--int8', action='store_true', help='quantise the model, with ranges from the images of --data-dir '
        '(default: off)')
    add_source_arguments(group, 'calibration')
    group.add_argument(
        '--val-split', default='validation', metavar='NAME',
        help='split on which outputs and top-1 are compared (default: %(default)s)')
    group.add_argument(
        '--calibration-images', type=positive, default=512, metavar='N',
        help='largest number of training images to take ranges from, drawn at random (default: %(default)s)')
    group.add_argument(
        '--seed', type=int, default=0, metavar='N', help='seed of the choice of images (default: %(default)s)')
    group.add_argument(
        '--seconds', type=float, default=2.0, metavar='X',
        help='seconds to measure latency, 0: do not measure it (default: %(default)s)')
    group.add_argument(
        '--metrics', type=Path, metavar='FILE',
        help='JSON file of measurements for a card, to add those in int8 to (default: none)')


def _export(args: argparse.Namespace) -> None:
    suffix = '_int8' if args.int8 else ''
    path = args.output or Path(f'{Path(args.model).resolve().name}{suffix}.{args.format}')
    _check(args, path)
    with step(f'building {args.model}'):
        model = load_model(args.model, args.pretrained, args.img_size)
        model = reparameterize_model(model, inplace=True) if args.reparam else model
    images = random_images(model, args.img_size, args.batch_size)
    measured = _write_int8(args, path, model, images) if args.int8 else _write_float32(args, path, model, images)
    weights = 'saved' if Path(args.model).is_dir() else 'pretrained' if args.pretrained else 'random'
    batch = 'any batch' if args.dynamic_batch else f'batch {args.batch_size}'
    print(f'{path}: {format_count(path.stat().st_size)} bytes, {batch} of {tuple(images.shape[1:])}, {weights} weights')
    print(measured)


def _check(args: argparse.Namespace, path: Path) -> None:
    """Raise ``PruningError`` before any work starts, for whatever would fail after it."""
    check_place(path, 'export')
    if path.exists() and not args.overwrite:
        raise PruningError(f'export: {path} exists; name another file, or replace it with --overwrite')
    if args.int8 and not args.data_dir:
        raise PruningError('export: --int8 takes ranges from images, none were given; give --data-dir')
    if args.data_dir and not args.int8:
        raise PruningError('export: --data-dir was given, only --int8 reads images; add --int8')
    if args.metrics:
        if not args.int8:
            raise PruningError('export: --metrics was given, only int8 is measured; add --int8')
        check_place(args.metrics, '--metrics')
        _read_metrics(args.metrics)


def _write_float32(args: argparse.Namespace, path: Path, model: nn.Module, images: Tensor) -> str:
    with step(f'exporting {args.model}'):
        difference, largest = export_model(model, path, args.format, images, args.dynamic_batch)
    return f'largest difference from the model: {difference:.2g}, of outputs up to {largest:.2g}'


def _write_int8(args: argparse.Namespace, path: Path, model: nn.Module, images: Tensor) -> str:
    (train, val), config = read_images(args, model, images, (args.train_split, args.val_split))
    calibration = image_loader(train, config, _TEST_BATCH, args.workers, args.calibration_images, args.seed)
    test = image_loader(val, config, _TEST_BATCH, args.workers)
    batches: Iterable[Any] = with_progress(test, 'comparing outputs', len(test))
    if class_count(val) not in (0, getattr(model, 'num_classes', None)):  # their numbers are other classes
        batches = (batch[0] for batch in batches)
    with step(f'exporting {args.model}'):
        report = export_int8(
            model, path, args.format, images, calibration, batches, args.dynamic_batch, args.calibration_images,
            args.seconds)
    if args.metrics:
        _add_metrics(args, report)
    return '\n'.join(_lines(args, report))


def _lines(args: argparse.Namespace, report: Int8Report) -> Iterator[str]:
    same = '' if report.agreement is None else f'the same class for {percent(report.agreement)} of them, '
    yield (f'ranges from {report.calibration_images:,} images; compared on {report.images:,}: {same}'
           f'relative error {report.error:.2g}')
    rows: List[Tuple[str, ...]] = [('', 'float32', 'int8', 'ratio')]
    shown = {
        'top-1, %': (report.top1, '{:.2f}'.format), 'size, bytes': (report.size, format_count),
        'latency, ms': (report.latency_ms, '{:.2f}'.format),
    }
    for label, (pair, show) in shown.items():
        if pair is not None:
            rows.append((label, *map(show, pair), f'{pair[1] / pair[0]:.3f}' if pair[0] else '-'))
    yield aligned_table(rows)
    if report.latency_ms:
        yield (f'latency: median at batch {args.batch_size} by {_ENGINES[args.format]} on cpu, '
               f'threads: {torch.get_num_threads()}')


def _read_metrics(path: Path) -> Dict[str, Any]:
    """The measurements of a card that a file holds, none if there is no such file."""
    if not path.exists():
        return {}
    with one_line(f'metrics in {path} can\'t be read'):
        return check_metrics(json.loads(path.read_text(encoding='utf-8')))


def _add_metrics(args: argparse.Namespace, report: Int8Report) -> None:
    """Write what was measured in int8 into the file of a card's measurements."""
    pairs = {'top1': report.top1, 'latency_ms': report.latency_ms}
    values = [{name: round(pair[i], 3) for name, pair in pairs.items() if pair is not None} for i in (0, 1)]
    metrics = {**_read_metrics(args.metrics), 'int8': {
        'float32': values[0], 'int8': values[1], 'engine': _ENGINES[args.format],
        'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'batch_size': args.batch_size,
        'threads': torch.get_num_threads(),
    }}
    text = json.dumps(metrics, indent=1, ensure_ascii=False) + '\n'
    with one_line(f'--metrics: {args.metrics} not written'):
        write_whole(args.metrics, lambda part: part.write_text(text, encoding='utf-8'))
