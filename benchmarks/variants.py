"""Make the plans of ``timm_epfs/variants`` that aren't learned: ``python benchmarks/variants.py [NAME ...]``, or all.

In these, every layer is cut by about the same share and its first units stay: they offer widths to train, nothing more.
To replace one by a learned plan, overwrite its file and remove its name from the list below.
"""
import argparse
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Dict

import numpy as np
from tqdm import tqdm

import timm_epfs
from timm_epfs.plan import Plan
from timm_epfs.zoo.variants import plan_path

CIFAR_RESNETS = ('resnet32_cifar', 'resnet44_cifar', 'resnet110_cifar')
# Share of the MACs that is removed, by base; the name says it in whole percents.
REMOVED: Dict[str, float] = {
    'resnet34': 0.5,
    'resnet50': 0.5,
    'mobilenetv2_100': 0.5,
    'efficientnet_b0': 0.5,
    'convnext_tiny': 0.5,
    'deit_small_patch16_224': 0.5,
    **dict.fromkeys(CIFAR_RESNETS, 0.5),
    'vgg16_bn_cifar': 0.475,
}
VARIANTS = {f'{base}_epfs{int(100 * removed)}': (base, removed) for base, removed in REMOVED.items()}
NEAR, STEP = 0.003, 0.00025  # how far from the share a plan may be, and by how much more is asked to get there


def main() -> None:
    args = parse_args()
    for name in tqdm(args.names or VARIANTS, unit='plan'):
        make(name).save(args.output / plan_path(name).name)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(VARIANTS))
    parser.add_argument('--output', type=Path, default=plan_path('').parent, metavar='DIR', help='folder of the plans')
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in VARIANTS]
    if unknown:
        parser.error(f'no plan is made here for {unknown[0]!r}; one of {", ".join(VARIANTS)}')
    return args


def make(name: str) -> Plan:
    """The plan of a variant, just at or above the share that its name says is removed."""
    base, wanted = VARIANTS[name]
    # base= leaves the base's arguments at their defaults, so that those of create_model's caller count.
    pruner = timm_epfs.Pruner(base, base=base)
    for more in np.arange(0, NEAR, STEP):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            plan = pruner.plan(macs=round(float(1 - wanted - more), 5), criterion='uniform', scope='local')
        dense, pruned = plan.cost['macs']
        if wanted <= 1 - pruned / dense <= wanted + NEAR:
            return replace(plan, recipe={
                **plan.recipe,
                'method': 'one-shot, not learned: every layer is cut alike and its first units stay',
                'data': 'none',
                'date': date.today().isoformat(),
                'command': f'python benchmarks/variants.py {name}',
            })
    raise SystemExit(f'{name}: no plan within {NEAR:.1%} of the share that its name says')


if __name__ == '__main__':
    main()
