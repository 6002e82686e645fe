"""Make a run's pruned model a variant: ``python benchmarks/cifar10/ship.py resnet20_cifar/epfs_filters-50-0``.

Writes the plan and the weights into timm_epfs/variants and what was measured into model_cards, for the card. A variant
is named for the share of the MACs that its experiment asked to remove, its weights for the images.
"""
import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import write_json  # noqa: E402
from data import TAGS  # noqa: E402

from timm_epfs.cards import check_metrics  # noqa: E402
from timm_epfs.plan import Plan  # noqa: E402
from timm_epfs.variants import plan_path, weights_path  # noqa: E402

CARDS = HERE.parents[1] / 'model_cards'
MOST = 1_500_000  # bytes that weights in the package may have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='+', metavar='RUN', help='as in results: model/experiment-seed')
    parser.add_argument('--runs', type=Path, default=HERE / 'runs')
    parser.add_argument('--results', type=Path, default=HERE / 'results')
    args = parser.parse_args()
    for name in args.names:
        result = json.loads((args.results / f'{name}.json').read_text())
        print(ship(result, args.runs / name / 'pruned' / 'model.safetensors'))


def ship(result: Dict[str, Any], weights: Path) -> str:
    """Returns the variant's name, with the tag."""
    size = weights.stat().st_size
    if size > MOST:
        raise SystemExit(f'{result["name"]}: the weights have {size} bytes, {MOST} may be shipped')
    base, _, experiment = result['name'].partition('/')
    name = f'{base}_epfs{round(100 * (1 - result["experiment"]["options"]["macs"]))}'
    tag = TAGS[result['images']]
    plan = Plan.from_dict(result['plan'])
    told = {
        'criterion': plan.recipe.get('criterion', 'learned masks'), 'data': result['images'],
        'date': result['machine']['date'], 'epochs': result['epochs'], 'seed': result['seed'],
        'command': f'python benchmarks/cifar10/run.py {base}/{experiment.rpartition("-")[0]}',
    }
    replace(plan, base_args={}, recipe={**plan.recipe, **told}).save(plan_path(name))
    shutil.copy(weights, weights_path(name, tag))
    write_json(CARDS / f'{name}.{tag}.json', check_metrics(_metrics(result)))
    return f'{name}.{tag}'


def _metrics(result: Dict[str, Any]) -> Dict[str, Any]:
    machine, latency = result['machine'], result['latency']
    values = [
        {'top1': round(top1, 2), 'latency_ms': round(ms, 3)}
        for top1, ms in zip((result['top1'][when] for when in ('dense', 'finetuned')), result['latency_ms'])
    ]
    return {
        'dataset': result['images'], 'dense': values[0], 'pruned': values[1],
        'latency': {
            'machine': f'{machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]}, {latency["device"]}',
            **{key: latency[key] for key in ('batch_size', 'dtype', 'threads')},
        },
    }


if __name__ == '__main__':
    main()
