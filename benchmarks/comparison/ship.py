"""Make a CIFAR run's pruned model a variant: ``python benchmarks/comparison/ship.py resnet20_cifar/epfs_filters-50-0``.

Writes the plan and the weights into timm_epfs/zoo/variants, the measurements and the card with its picture into
model_cards, and what the tests compare with into tests/shipped.json. A variant is named for the share of the MACs that
its experiment removes, unless the experiment's file names it (``variant``); its weights are tagged with the images that
they were trained on. Weights of more than 1.5 MB are stored in half precision; ``--plan-only`` ships none.
"""
import argparse
import json
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import safetensors.torch
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cifar10_images import TAGS, Images, name_of  # noqa: E402
from common import write_json  # noqa: E402
from records import halved, plan_of  # noqa: E402

from timm_epfs.hub import check_metrics, write_card  # noqa: E402
from timm_epfs.plan import Plan  # noqa: E402
from timm_epfs.pruner import example_for  # noqa: E402
from timm_epfs.report import count_macs  # noqa: E402
from timm_epfs.surgery import build_base, rebuild  # noqa: E402
from timm_epfs.zoo.variants import plan_path, weights_path  # noqa: E402

ROOT, CIFAR10 = HERE.parents[1], HERE.parent / 'cifar10'
CARDS, SHIPPED = ROOT / 'model_cards', ROOT / 'tests' / 'shipped.json'
OWNER = 'timm-epfs'  # of the repos that the cards name; hub_upload.py makes them again for its own
CIFAR10_ID = 'uoft-cs/cifar10'  # on the Hub; the images here are the same, compressed
MOST = 1_500_000  # bytes that weights in the package may have
SAMPLE = 1000  # first images of the test split that the tests count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='+', metavar='RUN', help='as in results: model/experiment-seed')
    parser.add_argument('--plan-only', action='store_true', help='the plan without the weights')
    parser.add_argument('--runs', type=Path, default=CIFAR10 / 'runs', help='with the decoded images')
    parser.add_argument('--results', type=Path, default=CIFAR10 / 'results')
    args = parser.parse_args()
    decoded = args.runs / 'images.safetensors'
    results = [args.results / f'{name}.json' for name in args.names]
    weights = [args.runs / name / 'pruned' / 'model.safetensors' for name in args.names if not args.plan_only]
    for path in (decoded, *results, *weights):
        if not path.is_file():
            raise SystemExit(f'{path} is not there: run.py makes it, where its --runs and --results say')
    images = safetensors.torch.load_file(decoded)
    for result, file in zip_longest(results, weights):
        print(ship(json.loads(result.read_text()), file and safetensors.torch.load_file(file), images))


def ship(result: Dict[str, Any], weights: Optional[Dict[str, Tensor]], images: Dict[str, Tensor]) -> str:
    """Returns the variant's name, with the tag where it has weights."""
    experiment = result['name'].rpartition('-')[0]
    asked = json.loads((CIFAR10 / 'experiments' / f'{experiment}.json').read_text())
    percent = int(100 * (1 - asked['options']['macs']) + 1e-6)
    name = asked.get('variant', f'{experiment.partition("/")[0]}_epfs{percent}')
    plan = _plan(result, experiment)
    model, metrics = rebuild(plan), _metrics(result)
    if weights is not None:
        if name_of(images) != result['images']:
            raise SystemExit(f'{result["name"]} was trained on {result["images"]}, the images here are others')
        tag = TAGS[result['images']]
        weights = _small(weights, result['name'])
        model.load_state_dict(weights)
        safetensors.torch.save_file(weights, weights_path(name, tag), metadata={'format': 'pt'})
    plan.save(plan_path(name))
    if weights is not None:
        name = f'{name}.{tag}'
        metrics['pruned']['top1'] = _record(name, model.eval(), images)
    write_json(CARDS / f'{name}.json', check_metrics(metrics))
    (CARDS / name).mkdir(exist_ok=True)
    write_card(CARDS / name, model, f'{OWNER}/{name}', metrics, has_weights=weights is not None)
    return name


def _plan(result: Dict[str, Any], experiment: str) -> Plan:
    """The result's plan for the base with its default arguments, and with its origin in the recipe."""
    plan = plan_of({**result['plan'], 'base_args': {}})
    origin = {
        'criterion': plan.recipe.get('criterion', 'learned masks'), 'data': result['images'],
        'date': result['machine']['date'], 'epochs': result['epochs'], 'seed': result['seed'],
        'command': f'python benchmarks/comparison/run.py cifar10 {experiment}',
        **({'teacher': 'the dense model'} if result['experiment']['options'].get('distill') else {}),
        **({'finetune_center': result['experiment']['center']} if 'center' in result['experiment'] else {}),
    }
    pairs = zip(*(_cost(model.eval()) for model in (build_base(plan.base, {}, 'meta'), rebuild(plan, 'meta'))))
    return replace(plan, recipe={**plan.recipe, **origin}, cost=dict(zip(('macs', 'params'), pairs)))


def _cost(model: nn.Module) -> Tuple[float, float]:
    """MACs of one image of the model's own size, and parameters."""
    return count_macs(model, *example_for(model)), float(sum(parameter.numel() for parameter in model.parameters()))


def _small(weights: Dict[str, Tensor], name: str) -> Dict[str, Tensor]:
    """Weights that may be shipped: in half precision if they are too many."""
    def size() -> int:
        return sum(tensor.nbytes for tensor in weights.values())

    if size() > MOST:
        weights = halved(weights)
    if size() > MOST:
        raise SystemExit(f'{name}: the weights have {size()} bytes in half precision, {MOST} may be shipped')
    return weights


@torch.inference_mode()
def _record(name: str, model: nn.Module, images: Dict[str, Tensor]) -> float:
    """Note what the tests compare with. Returns the top-1 in percent of what is shipped, on all test images."""
    test = Images(images['test.pixels'], images['test.targets'], model.pretrained_cfg, 500, torch.device('cpu'), False)
    right = torch.cat([model(batch).argmax(1) == target for batch, target in test])
    known = json.loads(SHIPPED.read_text()) if SHIPPED.exists() else {}
    pixels = torch.arange(3 * test.size[0] * test.size[1]).view(1, 3, *test.size)
    known[name] = {'logits': model(torch.sin(pixels / 10))[0].tolist(), 'right': int(right[:SAMPLE].sum())}
    write_json(SHIPPED, known)
    return round(100 * float(right.double().mean()), 2)


def _metrics(result: Dict[str, Any]) -> Dict[str, Any]:
    machine, latency = result['machine'], result['latency']
    size = result['experiment']['options'].get('img-size')
    values = [{'top1': round(result['top1'][when], 2)} for when in ('dense', 'finetuned')]
    metrics = {'dataset': result['images'], 'dataset_id': CIFAR10_ID, 'dense': values[0], 'pruned': values[1]}
    if size is not None:  # not the one that the variant's MACs are for, so the latency isn't either
        return {**metrics, 'dataset': f'{result["images"]}, at {size} × {size}'}
    for value, ms in zip(values, result['latency_ms']):
        value['latency_ms'] = round(ms, 3)
    return {**metrics, 'latency': {
        'machine': f'{machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]}, {latency["device"]}',
        **{key: latency[key] for key in ('batch_size', 'dtype', 'threads')},
    }}


if __name__ == '__main__':
    main()
