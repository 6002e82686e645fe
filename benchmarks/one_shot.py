"""The main job on real input: top-1 dense, after a one-shot cut, and after ``recalibrate_bn``, for each criterion.

``python benchmarks/one_shot.py --checkpoint resnet56.safetensors --data-dir cifar10-jpeg`` writes
results/one_shot_resnet56_cifar.json and .md.
"""
import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import timm
import torch
from common import RESULTS, header, header_line, write_json, write_results
from timm.models import load_checkpoint
from torch import nn
from tqdm import tqdm

import timm_epfs
from timm_epfs.report import top1
from timm_epfs.zoo.cifar import checkpoint_filter_fn

sys.path.insert(0, str(Path(__file__).parent / 'comparison'))

from cifar10_images import Images, load  # noqa: E402

BATCH = 128
RECALIBRATION, TAYLOR, OBDC = 2048, 1024, 256  # training images
RANDOM_SEEDS = (0, 1, 2)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    model = timm.create_model(args.model).eval()
    load_checkpoint(model, str(args.checkpoint), filter_fn=checkpoint_filter_fn)
    cfg = model.pretrained_cfg
    images = load(args.data_dir, args.cache)
    test = some(images, 'test', cfg, args.test_images)
    train = some(images, 'train', cfg, RECALIBRATION)

    path = args.results / f'one_shot_{args.model}.json'
    results = {
        'machine': header(), 'model': args.model, 'macs': args.macs,
        'images': {
            'test': len(test.targets), 'recalibration': RECALIBRATION, 'taylor': TAYLOR, 'obdc': OBDC,
        },
    }
    rows = results['rows'] = [dense(model, train, test)]
    runs = [(c, seed) for c in timm_epfs.CRITERIA for seed in (RANDOM_SEEDS if c == 'random' else (None,))]
    for criterion, seed in tqdm(runs, unit='cut'):
        rows.append(one_shot(model, criterion, seed, args.macs, train, test))
        write_json(path, results)
    write_results(path, results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='resnet56_cifar')
    parser.add_argument('--checkpoint', type=Path, required=True, help='safetensors of the dense model')
    parser.add_argument('--data-dir', type=Path, required=True, help='CIFAR-10: folders or tar files of images')
    parser.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir()) / 'cifar10.safetensors',
                        help='where decoded images are kept')
    parser.add_argument('--macs', type=float, default=0.7, help='share of the MACs to keep')
    parser.add_argument('--test-images', type=int, help='use at most so many, all by default')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def some(
        images: Dict[str, torch.Tensor],
        split: str,
        config: Dict[str, Any],
        count: Optional[int],
        seed: int = 0,
) -> Images:
    """Batches of ``count`` images of a split, drawn at random with a seed, or of all in a random order."""
    order = np.random.default_rng(seed).permutation(len(images[f'{split}.targets']))[:count]
    pixels, targets = (images[f'{split}.{what}'][order] for what in ('pixels', 'targets'))
    return Images(pixels, targets, config, BATCH, torch.device('cpu'), training=False)


def dense(model: nn.Module, train: Images, test: Images) -> Dict[str, Any]:
    """The row of the model before any cut."""
    return {'criterion': 'dense', 'macs_ratio': 1.0, 'params_ratio': 1.0, **_both(copy.deepcopy(model), train, test)}


def one_shot(
        model: nn.Module,
        criterion: str,
        seed: Optional[int],
        macs: float,
        train: Images,
        test: Images,
) -> Dict[str, Any]:
    start = time.perf_counter()
    slim = timm_epfs.prune(model, macs=macs, criterion=criterion, data=_data(criterion, train), seed=seed or 0)
    seconds = time.perf_counter() - start
    ratios = {f'{name}_ratio': left / whole for name, (whole, left) in slim.pruning_plan.cost.items()}
    return {'criterion': criterion, 'seed': seed, **ratios, 'seconds': seconds, **_both(slim, train, test)}


def _data(criterion: str, train: Images) -> Optional[List[Tuple[torch.Tensor, torch.Tensor]]]:
    """Training batches for the criteria that look at gradients."""
    if not timm_epfs.CRITERIA[criterion].needs:
        return None
    count = OBDC if criterion == 'obdc' else TAYLOR
    return [batch for _, batch in zip(range(count // BATCH), train)]


def _both(model: nn.Module, train: Images, test: Images) -> Dict[str, float]:
    before, = top1([model], test)
    timm_epfs.recalibrate_bn(model, train)
    return {'top1': before, 'top1_recalibrated': top1([model], test)[0]}


def markdown(results: Dict[str, Any]) -> str:
    images = results['images']
    lines = [
        f'# {results["model"]}, cut once to {results["macs"]:.0%} of its MACs, not fine-tuned',
        '',
        f'Top-1 on {images["test"]:,} test images. BatchNorm was recalibrated on {images["recalibration"]:,} training '
        f'images; taylor ranked by {images["taylor"]:,} of them, obdc by {images["obdc"]:,}.',
        header_line(results['machine']),
        '',
        '| criterion | MACs | parameters | top-1 % | after `recalibrate_bn` |',
        '|---|---|---|---|---|',
    ]
    for name in dict.fromkeys(row['criterion'] for row in results['rows']):
        rows = [row for row in results['rows'] if row['criterion'] == name]
        macs, params = (np.mean([row[f'{quantity}_ratio'] for row in rows]) for quantity in ('macs', 'params'))
        scores = ' | '.join(_mean([row[key] for row in rows]) for key in ('top1', 'top1_recalibrated'))
        seeds = f' ({len(rows)} seeds)' if len(rows) > 1 else ''
        lines.append(f'| {name}{seeds} | {macs:.3f} | {params:.3f} | {scores} |')
    return '\n'.join(lines) + '\n'


def _mean(values: List[float]) -> str:
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


if __name__ == '__main__':
    main()
