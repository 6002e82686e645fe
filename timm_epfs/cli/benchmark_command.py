"""``timm-epfs benchmark``: what ``timm_epfs.deploy`` measures, as a table, JSON and a picture."""
import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import timm
import torch

from ..core import PruningError, aligned_table, check_place, format_count, one_line, step, write_whole
from ..deploy import Conditions, Timed, time_together, with_base
from ..report import draw, new_figure
from ..version import __version__
from ..zoo import load_model
from .arguments import positive

__all__ = ['add_benchmark_arguments']

_GREY, _BLUE = '#c8c8c8', '#1f4e8c'


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument(
        'models', nargs='+', metavar='NAME|DIR',
        help='a pruned model, by its name or the folder it was saved in, is timed against its base; any other, alone')
    parser.add_argument(
        '-b', '--batch-size', nargs='+', type=positive, default=[1], metavar='N', help='images in a batch (1)')
    parser.add_argument('--img-size', type=positive, metavar='N', help="image size in pixels (the model's own)")
    parser.add_argument('--device', default='cpu', help='device to run on (cpu)')
    parser.add_argument('--seconds', type=float, default=10.0, metavar='X', help='for each model and batch size (10)')
    parser.add_argument('--amp', action='store_true', help='mixed precision (off)')
    parser.add_argument(
        '--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='its number format (bfloat16)')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory layout (off)')
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the models, by this backend (off; inductor where none is named)')
    engine.add_argument('--onnx', action='store_true', help='run by ONNX Runtime (off)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all that was measured (nowhere)')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw a picture, .png (nowhere)')
    parser.set_defaults(run=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    """Run the command."""
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
    told = _describe(args)
    print(_table(rows))
    print('{device}, threads: {threads}, {dtype}, {layout}, {engine}; peak: weights, images and what torch allocates '
          'beside them'.format(**told))
    if args.json:
        text = json.dumps({'conditions': told, 'rows': [asdict(row) for row in rows]}, indent=1) + '\n'
        with one_line(f'--json: {args.json} not written'):
            write_whole(args.json, lambda part: part.write_text(text, encoding='utf-8'))
    if args.plot:
        with one_line(f'--plot: {args.plot} not written'):
            draw(args.plot, (9, 1.5 + 0.5 * len(rows)), partial(_paint, rows=rows))


def _check(args: argparse.Namespace) -> None:
    """Refuse before any work what would be refused after it."""
    if args.onnx and (args.device != 'cpu' or args.amp or args.channels_last):
        raise PruningError('--onnx is timed on the CPU, in float32; drop --device, --amp and --channels-last')
    for name in args.models:
        if not (timm.is_model(name) or Path(name).is_dir() or '/' in name or ':' in name):
            load_model(name)  # says what is wrong with it
    if args.json:
        check_place(args.json, '--json')
    if args.plot:
        check_place(args.plot, '--plot')
        if args.plot.suffix != '.png':
            raise PruningError(f'--plot {args.plot}: only .png is drawn; name such a file')
        new_figure((1, 1))  # matplotlib is there


def _table(rows: Sequence[Timed]) -> str:
    table = [(
        'model', 'batch', 'latency, ms', 'p10-p90', 'images/s', 'peak, MB', 'weights, MB', 'MACs', 'speed-up',
        'by MACs', 'ratio',
    )]
    for row in rows:
        peak = '-' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:.1f}'
        against = ('-',) * 3 if row.dense is None else (f'{x:.2f}' for x in (row.speedup, row.promised, row.kept))
        table.append((
            row.model, f'{row.batch_size}', f'{row.median_ms:.2f}', f'{row.p10_ms:.2f}-{row.p90_ms:.2f}',
            f'{row.images_per_second:.1f}', peak, f'{row.weight_bytes / 1e6:.1f}', format_count(row.macs), *against,
        ))
    return aligned_table(table)


def _describe(args: argparse.Namespace) -> Dict[str, Any]:
    """What the numbers depend on."""
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
    clock, gain = figure.subplots(1, 2, width_ratios=(3, 2))
    medians, lows, highs = np.array([(row.median_ms, row.p10_ms, row.p90_ms) for row in rows]).T
    colours = [_GREY if row.dense is None else _BLUE for row in rows]
    at = _names_along(clock, rows)
    clock.barh(at, medians, xerr=(medians - lows, highs - medians), color=colours, ecolor='#c0392b', capsize=2)
    clock.set(xlabel='latency, ms: median, p10 to p90')
    pruned = [row for row in rows if row.dense is not None]
    at = _names_along(gain, pruned)
    gain.barh(at - 0.2, [row.promised for row in pruned], 0.4, color=_GREY, label='by MACs')
    gain.barh(at + 0.2, [row.speedup for row in pruned], 0.4, color=_BLUE, label='by the clock')
    gain.set(xlabel='speed-up')
    figure.legend(loc='outside lower right', ncols=2, fontsize='small')


def _names_along(axis: Any, rows: Sequence[Timed]) -> np.ndarray:
    at = np.arange(len(rows))
    axis.set(yticks=at, yticklabels=[f'{row.model}, batch {row.batch_size}' for row in rows])
    axis.tick_params(labelsize='x-small')
    axis.invert_yaxis()
    return at
