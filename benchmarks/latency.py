"""Are models at half their MACs twice as fast? ``prune(macs=)``, ``prune(latency=)`` at equal time, torch-pruning.

All models of a row take turns in one process, and two forwards that aren't counted precede each that is. The table
shows the fastest forward, since whatever else runs on the machine only makes one slower (medians are in the JSON).
Weights are random: only shapes matter. torch-pruning's one-shot ranks by L2 and rounds widths to 8; its ratio is
searched until its MACs are the same. ``python benchmarks/latency.py`` writes results/latency.json and .md. Rows that
are in the file already are left out, unless with ``--redo``. A ``note`` that was added to a row's JSON by hand is shown
beside it.
"""
import argparse
import copy
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import timm
import torch
import torch_pruning as tp
from common import RESULTS, header_line, measure_missing, one_line, write_results
from torch import nn
from torch_pruning_recipe import one_shot

import timm_epfs
from timm_epfs.latency import least_seconds, time_models
from timm_epfs.report import count_macs

ROWS = (
    'resnet18', 'resnet18@32', 'mobilenetv2_100', 'efficientnet_b0', 'resnet50', 'deit_small_patch16_224',
    'convnext_tiny', 'swin_tiny_patch4_window7_224', 'vgg16_bn',
)
NAMES = {'macs': 'macs=0.5', 'latency': 'latency=', 'torch-pruning': 'torch-pruning'}


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    path = args.results / 'latency.json'

    def measure(row: str) -> Dict[str, Any]:
        name, _, batch = row.partition('@')
        return compare(name, int(batch or 1), args.seconds)

    results = measure_missing(path, 'rows', args.rows, measure, args.redo, threads=args.threads)
    write_results(path, results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('rows', nargs='*', default=list(ROWS), help='name, or name@batch')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=15, help='how long the models of a row take turns')
    parser.add_argument('--redo', action='store_true', help='measure everything again')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def compare(name: str, batch: int, seconds: float) -> Dict[str, Any]:
    """MACs, parameters and milliseconds of all models of a row, and what binds the one that ``macs=0.5`` gives."""
    dense = build(name)
    size = dense.pretrained_cfg['input_size']
    images = torch.randn(batch, *size)
    models = {'dense': dense, 'macs': timm_epfs.prune(dense, macs=0.5)}
    before, after = least_seconds([dense, models['macs']], (images,), {})
    models['latency'] = timm_epfs.prune(dense, latency=after / before, latency_batch_size=batch)
    row: Dict[str, Any] = {'asked': after / before}
    try:
        models['torch-pruning'] = at_equal_macs(name, macs_of(models['macs']))
    except Exception as e:  # their recipe doesn't cut every architecture
        row['error'] = one_line(e, 120)
    measured = time_models(list(models.values()), (images,), {}, seconds, least=8)
    row.update({
        key: {
            'macs': macs_of(model), 'params': sum(p.numel() for p in model.parameters()),
            'median_ms': 1000 * taken.median, 'least_ms': 1000 * min(taken.times), 'forwards': len(taken.times),
        }
        for (key, model), taken in zip(models.items(), measured)
    })
    row['binds'] = binds(dense, models['macs'], batch)
    return row


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def macs_of(model: nn.Module) -> float:
    example = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    return count_macs(copy.deepcopy(model).to('meta').eval(), (example,), {})


def at_equal_macs(name: str, wanted: float) -> nn.Module:
    """torch-pruning's cut whose MACs come nearest, by bisection over its ratio."""
    low, high, best = 0.1, 0.6, None
    for _ in range(7):
        ratio = (low + high) / 2
        model = build(name)
        example = torch.randn(1, *model.pretrained_cfg['input_size'])
        model = one_shot(model, example, tp.importance.GroupMagnitudeImportance(p=2), ratio=ratio, round_to=8)
        macs = macs_of(model)
        if best is None or abs(macs - wanted) < abs(best[0] - wanted):
            best = (macs, model)
        low, high = (ratio, high) if macs > wanted else (low, ratio)
    return best[1]


def binds(dense: nn.Module, slim: nn.Module, batch: int) -> Dict[str, List[float]]:
    """Share of the dense model's calls by kind, and what is left of each, by the table: [share, left]."""
    device = timm_epfs.Pruner(dense).latency(batch)
    left = {cut.structure.name: len(cut.keep) for cut in slim.pruning_plan.cuts}
    pairs = zip(device.calls(device.units), device.calls(left))
    kinds: Dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for (kernel, before), (_, after) in pairs:
        kinds[kind(kernel)] += before, after
    total = sum(before for before, _ in kinds.values())
    return {
        name: [before / total, after / before]
        for name, (before, after) in sorted(kinds.items(), key=lambda item: -item[1][0]) if before > 0.02 * total
    }


def kind(kernel) -> str:
    name = kernel.name.rpartition('.')[2].rstrip('_')
    if name.startswith('conv') and kernel.args[1].sizes[1].const == 1:
        return 'depthwise convolution'
    return {'conv2d': 'convolution', 'scaled_dot_product_attention': 'attention', 'clone': 'copies'}.get(name, name)


def markdown(results: Dict[str, Any]) -> str:
    lines = [
        '# How much faster models at half their MACs run',
        '',
        f'{results["threads"]} thread, float32, contiguous. The models of a row took turns; *ms* is the fastest '
        'forward. *of promise* is the speed-up divided by what the MACs promise (dense MACs / MACs): 1 if half the '
        'MACs take half the time. `latency=` was given the time that the `macs=0.5` model had taken.',
        header_line(results['machine']),
        '',
        '| model | batch | dense ms | cut by | MACs | parameters | ms | speed-up | of promise |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for row, found in results['rows'].items():
        name, _, batch = row.partition('@')
        dense = found['dense']
        for key, label in NAMES.items():
            if key in found:
                cut = found[key]
                macs, params, left = (cut[q] / dense[q] for q in ('macs', 'params', 'least_ms'))
                lines.append(
                    f'| {name} | {batch or 1} | {dense["least_ms"]:.1f} | {label} | {macs:.3f} | {params:.3f} | '
                    f'{cut["least_ms"]:.1f} | {1 / left:.2f} | {macs / left:.2f} |')
            elif 'error' in found:
                lines.append(f'| {name} | {batch or 1} | {dense["least_ms"]:.1f} | {label} | fails | | | | |')
    lines += [
        '', '## Where the time goes', '',
        'Share of the dense model\'s time by kind of call, and how much of that time `macs=0.5` leaves, both from the '
        'table of timed calls. Where more than 0.5 is left, the speed-up falls short of the MACs.', '',
    ]
    for row, found in results['rows'].items():
        parts = ', '.join(f'{name} {share:.0%} → {left:.2f}' for name, (share, left) in found['binds'].items())
        lines.append(f'- {row}: {parts}' + (f' ({found["note"]})' if 'note' in found else ''))
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
