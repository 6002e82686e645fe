"""``timm-epfs benchmark``: dense against pruned by the clock, beside what the MACs promise."""
import argparse
import json
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..cli.arguments import model_args, positive
from ..core import PruningError, aligned_table, check_place, format_count, one_line, step, write_whole
from ..latency.clock import Forward, in_turns, peak_memory
from ..report import count_macs, draw, new_figure, random_images, size_on_disk
from ..surgery import build_base
from ..version import __version__
from .export import load_model, onnx_forward, trace_program, write_onnx

__all__ = ['Timed', 'add_benchmark_arguments', 'benchmark']

LEAST = 5  # turns, however slow a model is
_GREY, _BLUE = '#c8c8c8', '#1f4e8c'


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument(
        'models', nargs='+', metavar='NAME|DIR',
        help='a pruned model, by its name or the folder it was saved in, is timed against its base; any other, alone')
    parser.add_argument('-b', '--batch-size', nargs='+', type=positive, default=[1], metavar='N', help='(1)')
    parser.add_argument('--img-size', type=positive, metavar='N', help="image size in pixels (the model's own)")
    parser.add_argument('--device', default='cpu', help='device to run on (cpu)')
    parser.add_argument('--seconds', type=float, default=10.0, metavar='X', help='for each model and batch size (10)')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='(bfloat16)')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile (inductor)')
    engine.add_argument('--onnx', action='store_true', help='run by ONNX Runtime')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all that was measured')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw a picture (.png)')
    parser.set_defaults(run=benchmark)


@dataclass(frozen=True)
class Timed:
    """What was measured of one model at one batch size.

    Attributes:
        model: Its name or folder.
        dense: Name of the model that it was cut from, timed in the same turns; None for one that is timed alone.
        batch_size: Images a forward.
        forwards: How many were timed.
        median_ms, p10_ms, p90_ms: Milliseconds of a forward: half, a tenth and nine tenths took less.
        images_per_second: At the median.
        peak_bytes: Weights, images and what a forward allocates beside them; None under ONNX Runtime, which has an
            allocator of its own.
        weight_bytes: Size of the weights.
        macs: Of one image.
        speedup: The dense model's median over this one's.
        promised: The dense model's MACs over this one's.
        kept: ``speedup`` over ``promised``.
    """
    model: str
    dense: Optional[str]
    batch_size: int
    forwards: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    images_per_second: float
    peak_bytes: Optional[int]
    weight_bytes: int
    macs: float
    speedup: Optional[float] = None
    promised: Optional[float] = None
    kept: Optional[float] = None


def benchmark(args: argparse.Namespace) -> None:
    """Run the command."""
    _check(args)
    rows: List[Timed] = []
    for name in args.models:
        with step(f'building {name}'):
            models = _contestants(name, args)
        for batch_size in args.batch_size:
            with step(f'timing {name} at batch {batch_size}'):
                rows += _against_each_other(models, batch_size, args)
    conditions = _conditions(args)
    print(_table(rows))
    print('{device}, threads: {threads}, {dtype}, {layout}, {engine}; peak: weights, images and what torch allocates '
          'beside them'.format(**conditions))
    if args.json:
        text = json.dumps({'conditions': conditions, 'rows': [asdict(row) for row in rows]}, indent=1) + '\n'
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


def _contestants(name: str, args: argparse.Namespace) -> Dict[str, nn.Module]:
    """The model and, where it was pruned, the dense one before it, ready to run."""
    model = load_model(name, img_size=args.img_size)
    models, plan = {name: model}, getattr(model, 'pruning_plan', None)
    if plan is not None:
        own = model_args(plan.base, args.img_size, {})
        dense = build_base(plan.base, {**plan.base_args, **own}).eval()
        if getattr(dense, 'num_classes', None) != getattr(model, 'num_classes', None):  # its head was changed
            dense.reset_classifier(model.num_classes)
        models = {plan.base: dense, **models}
    with one_line(f"--device {args.device} can't be used"):
        for each in models.values():
            each.requires_grad_(False).to(args.device)
            if args.channels_last:
                each.to(memory_format=torch.channels_last)
    return models


def _against_each_other(models: Dict[str, nn.Module], batch_size: int, args: argparse.Namespace) -> List[Timed]:
    images = random_images(next(iter(models.values())), args.img_size, batch_size).to(args.device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()  # after some models of one class, it would run the next ones eagerly
    forwards = [_forward(model, images, args) for model in models.values()]
    with torch.inference_mode(), torch.autocast(images.device.type, getattr(torch, args.amp_dtype), enabled=args.amp):
        for name, forward in zip(models, forwards):  # what is compiled or chosen once isn't timed
            with one_line(f'{name} can\'t be run on images of {tuple(images.shape)}'):
                forward()
        measured = in_turns(forwards, images.device, args.seconds, LEAST)
        peaks = [None if args.onnx else peak_memory(forward, images.device) for forward in forwards]

    rows: List[Timed] = []
    for (name, model), taken, peak in zip(models.items(), measured, peaks):
        p10, median, p90 = (1000 * np.quantile(taken.times, (0.1, 0.5, 0.9))).tolist()
        weights = size_on_disk(model)
        row = Timed(
            name, None, batch_size, len(taken.times), median, p10, p90, 1000 * batch_size / median,
            None if peak is None else peak + weights + images.nbytes, weights, count_macs(model, (images[:1],), {}),
        )
        rows.append(_compared(rows[0], row) if rows else row)
    return rows


def _forward(model: nn.Module, images: Tensor, args: argparse.Namespace) -> Forward:
    if args.onnx:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / 'model.onnx'
            write_onnx(trace_program(model, images), path)
            return partial(onnx_forward(path), images)
    if args.torchcompile:
        with one_line(f'--torchcompile {args.torchcompile} can\'t be used'):
            model = torch.compile(model, backend=args.torchcompile, dynamic=False)
    return partial(model, images)


def _compared(dense: Timed, pruned: Timed) -> Timed:
    speedup, promised = dense.median_ms / pruned.median_ms, dense.macs / pruned.macs
    return replace(pruned, dense=dense.model, speedup=speedup, promised=promised, kept=speedup / promised)


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


def _conditions(args: argparse.Namespace) -> Dict[str, Any]:
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
