"""Seconds and peak memory of what ``prune(data=images)`` does: statistics, sensitivity, compensation.

``python benchmarks/training_free_cost.py`` writes results/training_free_cost.json and .md. Weights and images are
random, at 70 % of the MACs. Each step runs in a process of its own; memory is what it holds at most beyond the model,
the images and what was there before it. Steps that are in the file already are left out.
"""
import argparse
import re
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict

import timm
import torch
from common import RESULTS, header_line, measure_missing, write_results

import timm_epfs

MODELS = {'tf_efficientnet_lite0': 512, 'resnet50': 256, 'convnext_tiny': 256, 'vit_base_patch16_224': 256}  # images
STEPS = ('statistics', 'sensitivity', 'compensation')


def main() -> None:
    args = parse_args()
    names = [f'{step} of {model}' for model in args.models for step in args.steps]
    results = measure_missing(
        args.results / 'training_free_cost.json', 'steps', names, lambda name: measured(name, args.threads),
        threads=args.threads)
    write_results(args.results / 'training_free_cost.json', results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=list(MODELS), choices=list(MODELS))
    parser.add_argument('--steps', nargs='+', default=list(STEPS), choices=STEPS)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def measured(name: str, threads: int) -> Dict[str, Any]:
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(measure, name, threads).result()


def measure(name: str, threads: int) -> Dict[str, Any]:
    """Run one step in this process."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, _, model_name = name.partition(' of ')
    model = timm.create_model(model_name).eval()
    size = model.pretrained_cfg['input_size']
    images = list(torch.randn(MODELS[model_name], *size).split(5))
    with torch.no_grad():
        model(images[0])
    work = prepared(step, model, images)
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    before, start = memory('VmRSS'), time.perf_counter()
    work()
    return {
        'images': MODELS[model_name], 'seconds': round(time.perf_counter() - start, 1),
        'peak_gb': round(memory('VmHWM') - before, 2)}


def prepared(step: str, model: torch.nn.Module, images: list) -> Callable[[], Any]:
    if step == 'compensation':
        slim = timm_epfs.prune(model, macs=0.7)
        return lambda: timm_epfs.compensate(slim, model, images, num_images=sum(map(len, images)))
    pruner = timm_epfs.Pruner(model, data=images)
    if step == 'statistics':
        return lambda: pruner.scores('obs')
    pruner.scores('obs')
    return pruner.sensitivity


def memory(what: str) -> float:
    """Memory of this process in GB."""
    return int(re.search(rf'{what}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1e6


def markdown(results: Dict[str, Any]) -> str:
    lines = [
        '# Seconds and peak memory of `prune(data=images)`',
        '',
        f'{results["threads"]} threads, each step in a process of its own, random weights and images, 70 % of the '
        'MACs. Memory is beyond the model and the images. Statistics (with the scores of `obs`) and sensitivity use at '
        'most 334 images of 224 x 224, of which 42 are kept to measure on, and are computed once for any number of '
        'budgets.',
        header_line(results['machine']),
        '',
        '| model | images | ' + ' | '.join(f'{step}, s | GB' for step in STEPS) + ' |',
        '|---|---|' + '---|---|' * len(STEPS),
    ]
    for model, images in MODELS.items():
        rows = [results['steps'].get(f'{step} of {model}') for step in STEPS]
        cells = [f'{row["seconds"]:.0f} | {row["peak_gb"]:.2f}' if row else '– | –' for row in rows]
        lines.append(f'| {model} | {images} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
