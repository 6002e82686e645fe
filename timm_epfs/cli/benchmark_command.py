"""``timm-epfs benchmark``: measurements of ``timm_epfs.deploy`` as a table, as JSON and as a picture."""
import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import timm
import torch

from ..core import PruningError, aligned_table, check_place, format_count, one_line, step, write_whole
from ..deploy import Conditions, Timed, time_together, with_base
from ..report import check_picture, draw
from ..version import __version__
from ..zoo import load_model
from .arguments import positive

__all__ = ['add_benchmark_arguments']

_GREY, _BLUE = '#c8c8c8', '#1f4e8c'


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument(
        'models', nargs='+', metavar='NAME|DIR',
        help='a timm name, or the folder of a saved model; a pruned model is timed against its dense base, any other '
             'model alone (required)')
    parser.add_argument(
        '-b', '--batch-size', nargs='+', type=positive, default=[1], metavar='N', help='images per batch (default: 1)')
    parser.add_argument(
        '--img-size', type=positive, metavar='N', help="image size in pixels (default: the model's own)")
    parser.add_argument('--device', default='cpu', help='device to run on (default: %(default)s)')
    parser.add_argument(
        '--seconds', type=float, default=10.0, metavar='X',
        help='seconds to measure each model and its base at each batch size (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='use automatic mixed precision (default: off)')
    parser.add_argument(
        '--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'),
        help='data type of mixed precision (default: %(default)s)')
    parser.add_argument(
        '--channels-last', action='store_true', help='use the channels-last memory layout (default: off)')
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the models with this backend, inductor if none is named (default: off)')
    engine.add_argument(
        '--onnx', action='store_true', help='run the models with ONNX Runtime on the CPU (default: off)')
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='write all measurements to this JSON file (default: none)')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw a picture, a .png file (default: none)')
    parser.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    _check(args)
    conditions = Conditions(
        args.device, args.seconds, args.img_size, getattr(torch, args.amp_dtype) if args.amp else None,
        args.channels_last, args.torchcompile, args.onnx)
    rows: List[Timed] = []
    for name in args.models:
        with step(f'building {name}'):
            models = with_base(name, load_model(name, img_size=args.img_size), conditions)
        for batch_size in args.batch_size:
            with step(f'timing {name} at batch {batch_size}'):
                rows += time_together(models, batch_size, conditions)
    described = _describe(args)
    print(_table(rows))
    print('{device}, threads: {threads}, {dtype}, {layout}, {engine}; peak: weights, images and what torch allocates '
          'beside them'.format(**described))
    if args.json:
        text = json.dumps({'conditions': described, 'rows': [asdict(row) for row in rows]}, indent=1) + '\n'
        with one_line(f'--json: {args.json} not written'):
            write_whole(args.json, lambda part: part.write_text(text, encoding='utf-8'))
    if args.plot:
        with one_line(f'--plot: {args.plot} not written'):
            draw(args.plot, (9, 1.5 + 0.5 * len(rows)), partial(_paint, rows=rows))


def _check(args: argparse.Namespace) -> None:
    """Raise ``PruningError`` before any work starts, for whatever would fail after it."""
    if args.onnx and (args.device != 'cpu' or args.amp or args.channels_last):
        raise PruningError('--onnx runs on the CPU in float32; drop --device, --amp and --channels-last')
    for name in args.models:
        if not (timm.is_model(name) or Path(name).is_dir() or '/' in name or ':' in name):
            load_model(name)  # raises the error that explains what is wrong with the name
    if args.json:
        check_place(args.json, '--json')
    if args.plot:
        check_picture(args.plot, '--plot')


def _table(rows: Sequence[Timed]) -> str:
    head = (
        'model', 'batch', 'latency, ms', 'p10-p90', 'images/s', 'peak, MB', 'weights, MB', 'MACs', 'speed-up',
        'theoretical', 'realised',
    )
    return aligned_table([head, *map(_cells, rows)])


def _cells(row: Timed) -> Tuple[str, ...]:
    peak = '-' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:.1f}'
    compared = ['-'] * 3 if row.dense is None else [
        f'{x:.2f}' for x in (row.speedup, row.theoretical_speedup, row.realised_share)]
    return (
        row.model, f'{row.batch_size}', f'{row.median_ms:.2f}', f'{row.p10_ms:.2f}-{row.p90_ms:.2f}',
        f'{row.images_per_second:.1f}', peak, f'{row.weight_bytes / 1e6:.1f}', format_count(row.macs), *compared,
    )


def _describe(args: argparse.Namespace) -> Dict[str, Any]:
    """The conditions that the numbers depend on."""
    device = torch.device(args.device)
    return {
        'device': args.device,
        'machine': torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine(),
        'threads': torch.get_num_threads(),
        'dtype': f'amp {args.amp_dtype}' if args.amp else 'float32',
        'layout': 'channels last' if args.channels_last else 'contiguous',
        'engine': 'ONNX Runtime' if args.onnx else f'compiled by {args.torchcompile}' if args.torchcompile else 'eager',
        'img_size': args.img_size,
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_epfs': __version__,
    }


def _paint(figure: Any, rows: Sequence[Timed]) -> None:
    latency, speedup = figure.subplots(1, 2, width_ratios=(3, 2))
    medians, lows, highs = np.array([(row.median_ms, row.p10_ms, row.p90_ms) for row in rows]).T
    colours = [_GREY if row.dense is None else _BLUE for row in rows]
    at = _label_rows(latency, rows)
    latency.barh(at, medians, xerr=(medians - lows, highs - medians), color=colours, ecolor='#c0392b', capsize=2)
    latency.set(xlabel='latency, ms: median, p10 to p90')
    pruned = [row for row in rows if row.dense is not None]
    at = _label_rows(speedup, pruned)
    speedup.barh(at - 0.2, [row.theoretical_speedup for row in pruned], 0.4, color=_GREY, label='theoretical')
    speedup.barh(at + 0.2, [row.speedup for row in pruned], 0.4, color=_BLUE, label='measured')
    speedup.set(xlabel='speed-up')
    figure.legend(loc='outside lower right', ncols=2, fontsize='small')


def _label_rows(axis: Any, rows: Sequence[Timed]) -> np.ndarray:
    """Label one bar per row, from the top down, and return the bars' positions."""
    at = np.arange(len(rows))
    axis.set(yticks=at, yticklabels=[f'{row.model}, batch {row.batch_size}' for row in rows])
    axis.tick_params(labelsize='x-small')
    axis.invert_yaxis()
    return at
