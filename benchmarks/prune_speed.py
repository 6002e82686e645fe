"""``timm_epfs.prune(name, macs=0.5)`` whole, against torch-pruning's own one-shot at a fixed ratio of 0.5.

Both rank by L2 on the CPU, in one process, turn by turn; medians. Ours traces, scores, meets the budget, verifies and
writes a plan; theirs traces, scores and cuts. ``python benchmarks/prune_speed.py`` writes results/prune_speed.json and
.md; models that are in the file already are left out, ``--redo`` measures them again.
"""
import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict

import timm
import torch
import torch_pruning as tp
from common import RESULTS, header_line, measure_missing, write_results
from torch import nn
from torch_pruning_recipe import one_shot

import timm_epfs
from timm_epfs.report import count_macs

MODELS = (
    'resnet18', 'resnet50', 'mobilenetv2_100', 'efficientnet_b0', 'densenet121', 'vgg16_bn', 'convnext_tiny',
    'regnety_032', 'vit_base_patch16_224', 'vit_large_patch16_224',
)


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    path = args.results / 'prune_speed.json'
    results = measure_missing(
        path, 'models', args.models, lambda name: compare(name, args.repeats), args.redo,
        before=lambda: compare('resnet18', 1),  # imports and caches are warm before the first measurement
        threads=args.threads, repeats=args.repeats,
    )
    write_results(path, results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=list(MODELS))
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--redo', action='store_true', help='measure everything again')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def compare(name: str, repeats: int) -> Dict[str, Any]:
    """Median seconds of both, the model's creation included (``whole``) and not (``cut``), and the MACs left."""
    seconds: Dict[str, list] = {'ours_whole': [], 'theirs_whole': [], 'ours_cut': [], 'theirs_cut': []}
    for turn in range(repeats):
        for side, prune in (('ours', ours), ('theirs', theirs))[::1 if turn % 2 else -1]:
            seconds[f'{side}_whole'].append(timed(lambda p=prune: p(name)))
            model = timm.create_model(name).eval()
            seconds[f'{side}_cut'].append(timed(lambda p=prune, m=model: p(m)))
            del model
    row: Dict[str, Any] = {key: statistics.median(values) for key, values in seconds.items()}
    row.update({f'ratio_{part}': row[f'ours_{part}'] / row[f'theirs_{part}'] for part in ('whole', 'cut')})
    dense = macs_of(timm.create_model(name))
    row.update(ours_macs_left=macs_of(ours(name)) / dense, theirs_macs_left=macs_of(theirs(name)) / dense)
    return row


def timed(work: Callable[[], nn.Module]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return seconds


def ours(model) -> nn.Module:
    return timm_epfs.prune(model, macs=0.5)


def theirs(model) -> nn.Module:
    model = timm.create_model(model).eval() if isinstance(model, str) else model
    return one_shot(model, example(model), tp.importance.GroupMagnitudeImportance(p=2))


def example(model: nn.Module) -> torch.Tensor:
    return torch.randn(1, *model.pretrained_cfg['input_size'])


def macs_of(model: nn.Module) -> float:
    return count_macs(model.to('meta').eval(), (example(model).to('meta'),), {})


def markdown(results: Dict[str, Any]) -> str:
    lines = [
        '# Seconds to prune: timm_epfs to half the MACs, torch-pruning at a fixed ratio of 0.5',
        '',
        f'Median of {results["repeats"]}, {results["threads"]} threads, turn by turn in one process. '
        'Ratios are ours over theirs: below 1, ours is faster.',
        header_line(results['machine']),
        '',
        '| model | ours, with creation | theirs | ratio | ours, model given | theirs | ratio | MACs left | theirs |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for name, row in results['models'].items():
        times = ' | '.join(
            f'{row[f"ours_{part}"]:.2f} | {row[f"theirs_{part}"]:.2f} | {row[f"ratio_{part}"]:.2f}'
            for part in ('whole', 'cut')
        )
        lines.append(f'| {name} | {times} | {row["ours_macs_left"]:.3f} | {row["theirs_macs_left"]:.3f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
