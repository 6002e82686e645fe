"""What a model is worth at a latency, before any training: cut by ``latency=``, by ``macs=``, by torch-pruning.

``python benchmarks/latency_top1.py resnet56_cifar --data-dir cifar10-jpeg`` takes the options of ``training_free.py``.
All cuts of a row are as fast: the budgets of those that can't be given a latency are searched until the measured time
is right. Ours choose units by the images and are compensated with them; torch-pruning's BatchNorm is recalibrated.
Writes results/latency_top1_<model>.json and .md. Run it on a machine that runs nothing else.
"""
import argparse
import copy
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict

import torch
from common import RESULTS, header_line, measure_missing, write_results
from torch import nn
from training_free import Job, add_job_arguments, parse_job

import timm_epfs
from timm_epfs.core import DEFAULT_KINDS
from timm_epfs.latency import least_seconds
from timm_epfs.report import count_macs, top1

SHARES = (0.7, 0.5)
CUTS = ('latency=', 'latency=, widths only', 'macs=', 'torch-pruning')


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    job = LatencyJob(args, args.seed)
    names = {f'{cut} at {share:g}': (cut, share) for share in SHARES for cut in CUTS}
    path = args.results / f'latency_top1_{args.model}.json'

    def measure(name: str) -> Dict[str, Any]:
        return job.measure_cut(*names[name]) if name in names else job.measure_dense()

    results = measure_missing(
        path, 'cuts', ['dense', *names], measure, model=args.model, images=args.data_dir.name, threads=args.threads)
    write_results(path, results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_job_arguments(parser)
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of images')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parse_job(parser)


class LatencyJob(Job):
    """A dense model with its images, and cuts of it that take a given time."""

    @cached_property
    def widths_pruner(self) -> timm_epfs.Pruner:
        """Cuts channels alone."""
        return timm_epfs.Pruner(self.model, data=self.batches[0], kinds=DEFAULT_KINDS)

    @property
    def image(self) -> torch.Tensor:
        return self.batches[0][0][0][:1]

    def measure_cut(self, cut: str, share: float) -> Dict[str, Any]:
        """Cost and top-1 of one cut."""
        fit, test = self.batches
        if cut == 'torch-pruning':
            slim = self._at_share(share, lambda macs: self._cut_by_torch_pruning(macs)[0])
            timm_epfs.recalibrate_bn(slim, fit)
        elif cut == 'macs=':
            slim = self._at_share(share, lambda macs: self.pruner(macs=macs, compensate=False))
        else:
            slim = (self.pruner if cut == 'latency=' else self.widths_pruner)(latency=share, compensate=False)
        if cut != 'torch-pruning':
            timm_epfs.compensate(slim, self.model, fit)
        dense, left = least_seconds([self.model, slim], (self.image,), {})
        plan = getattr(slim, 'pruning_plan', None)
        return {
            'macs_ratio': self._macs(slim) / self._macs(self.model),
            'params_ratio': _params(slim) / _params(self.model),
            'latency_ms': [1e3 * dense, 1e3 * left],
            'blocks_gone': len(plan.removed_blocks()) if plan else 0,
            'top1': top1([slim], test)[0],
        }

    def _macs(self, model: nn.Module) -> float:
        return count_macs(copy.deepcopy(model), (self.image,), {})

    def _at_share(self, share: float, cut: Callable[[float], nn.Module]) -> nn.Module:
        """The cut whose measured share of the time comes nearest, by bisection over its share of the MACs."""
        low, high, found = 0.05, 0.95, []
        for _ in range(7):
            macs = (low + high) / 2
            slim = cut(macs)
            dense, left = least_seconds([self.model, slim], (self.image,), {})
            found.append((abs(left / dense - share), len(found), slim))
            low, high = (low, macs) if left / dense > share else (macs, high)
        return min(found)[2]


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def markdown(results: Dict[str, Any]) -> str:
    cuts = results['cuts']
    lines = [
        f'# {results["model"]} at a latency, without training',
        '',
        f'Images: {results["images"]}. Dense top-1: {cuts["dense"]["top1"]:.2f} %, on {cuts["dense"]["test_images"]:,} '
        f'images. Batch 1, threads: {results["threads"]}; the fastest forwards. All cuts of ours are compensated.',
        header_line(results['machine']),
        '',
        '| asked | cut by | time | MACs | parameters | blocks gone | top-1 | lost |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name, row in cuts.items():
        if name != 'dense':
            cut, _, share = name.rpartition(' at ')
            dense, left = row['latency_ms']
            lines.append(
                f'| {share} | {cut} | {left / dense:.2f} | {row["macs_ratio"]:.3f} | {row["params_ratio"]:.3f} '
                f'| {row["blocks_gone"]} | {row["top1"]:.2f} | {cuts["dense"]["top1"] - row["top1"]:.2f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
