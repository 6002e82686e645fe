"""``timm.create_model`` of a pruned model against its dense base: random weights, and weights from a local folder.

Both in one process on the CPU, turn by turn; medians. The pruned models are at half the MACs. Files are read once
before they are timed, so disks are not compared. ``python benchmarks/create_speed.py`` writes results/create_speed.json
and .md.
"""
import argparse
import gc
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict

import timm
import torch
from common import RESULTS, header, header_line, write_results
from timm.models import save_for_hf
from tqdm import tqdm

import timm_epfs

MODELS = ('resnet18', 'resnet50', 'convnext_tiny', 'vit_base_patch16_224', 'mobilenetv2_100', 'resnet20_cifar')
GOALS = {'random': 1.0, 'local': 0.7}


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    results: Dict[str, Any] = {'machine': header(), 'threads': args.threads, 'repeats': args.repeats, 'models': {}}
    for name in tqdm(args.models, unit='model'):
        results['models'][name] = compare(name, args.repeats)
    write_results(args.results / 'create_speed.json', results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=list(MODELS))
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def compare(name: str, repeats: int) -> Dict[str, float]:
    """Median seconds of both for both kinds of weights, and the ratios."""
    variant = f'bench_{name}_epfs50'
    slim = timm_epfs.prune(name, macs=0.5, criterion='uniform', base=name)
    with tempfile.TemporaryDirectory() as folder:
        dense_dir, slim_dir = Path(folder, 'dense'), Path(folder, 'slim')
        save_for_hf(timm.create_model(name), str(dense_dir), safe_serialization='both')
        (dense_dir / 'pytorch_model.bin').unlink()
        timm_epfs.save_pretrained(slim, slim_dir)
        slim.pruning_plan.save(Path(folder, 'plan.json'))
        timm_epfs.register(variant, Path(folder, 'plan.json'))
        makers: Dict[str, Callable] = {
            'dense_random': lambda: timm.create_model(name),
            'slim_random': lambda: timm.create_model(variant),
            'dense_local': lambda: timm.create_model(f'local-dir:{dense_dir}', pretrained=True),
            'slim_local': lambda: timm.create_model(f'local-dir:{slim_dir}', pretrained=True),
        }
        return medians(makers, repeats)


def medians(makers: Dict[str, Callable], repeats: int) -> Dict[str, float]:
    """Median seconds of each maker. They take turns."""
    seconds: Dict[str, list] = {key: [] for key in makers}
    for turn in range(repeats + 1):
        for key, make in list(makers.items())[::1 if turn % 2 else -1]:
            gc.collect()
            start = time.perf_counter()
            model = make()
            if turn:  # the first is for caches
                seconds[key].append(time.perf_counter() - start)
            del model
    row = {key: statistics.median(values) for key, values in seconds.items()}
    return {**row, **{f'ratio_{kind}': row[f'slim_{kind}'] / row[f'dense_{kind}'] for kind in GOALS}}


def markdown(results: Dict[str, Any]) -> str:
    lines = [
        '# Seconds to create a model at half the MACs against its dense base',
        '',
        f'Medians of {results["repeats"]}, {results["threads"]} threads, turn by turn in one process. '
        f'Goals for the first four: ratio ≤ {GOALS["random"]} with random weights, ≤ {GOALS["local"]} from a folder.',
        header_line(results['machine']),
        '',
        '| model | random: dense | pruned | ratio | from a folder: dense | pruned | ratio |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in results['models'].items():
        cells = [
            f'{row[f"dense_{kind}"]:.3f} | {row[f"slim_{kind}"]:.3f} | {row[f"ratio_{kind}"]:.2f}' for kind in GOALS
        ]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
