"""The weights that come with timm_epfs: logits on a fixed input, and top-1 where the images are at hand.

``CIFAR10_DIR`` names the images: a folder with test.tar or test/, or torchvision's copy. What is compared with comes
from ``benchmarks/comparison/ship.py``, which writes shipped.json.
"""
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from card_facts import numbers, recipe, section, table
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader, Subset

from timm_epfs.hub import CARD, FIGURE, is_ours
from timm_epfs.plan import Plan
from timm_epfs.pruner import trace_model
from timm_epfs.surgery import build_base
from timm_epfs.zoo import variants

ROOT = Path(__file__).parents[1]
CARDS = ROOT / 'model_cards'
SHIPPED = json.loads((ROOT / 'tests' / 'shipped.json').read_text())
EACH = pytest.mark.parametrize('name', SHIPPED)
SAMPLE = 1000
TOLERANCE = 1e-2  # of logits, which are about 5, between processors: rounding makes 1e-6
UNDECIDED = 0.1  # images whose best two logits are closer may be decided by the decoder of JPEG or the processor


def shipped(name):
    return timm.create_model(name, pretrained=True).eval()


def test_all_weights_are_known_and_small():
    pairs = [(name, tag) for name in variants.names() for tag in variants.tags(name)]
    found = {f'{name}.{tag}': variants.weights_path(name, tag) for name, tag in pairs}
    assert set(found) == set(SHIPPED)
    assert all(path.stat().st_size < 1.6e6 for path in found.values())


@EACH
def test_logits_are_those_of_the_model_that_was_measured(name):
    model = shipped(name)
    _, height, width = model.pretrained_cfg['input_size']
    pixels = torch.arange(3 * height * width).view(1, 3, height, width)
    with torch.inference_mode():
        logits = model(torch.sin(pixels / 10))[0]
    torch.testing.assert_close(logits, torch.tensor(SHIPPED[name]['logits']), rtol=0, atol=TOLERANCE)


@EACH
def test_a_name_without_tag_is_the_same(name):
    tagged = shipped(name).state_dict()
    for key, tensor in shipped(name.partition('.')[0]).state_dict().items():
        assert torch.equal(tensor, tagged[key])


@pytest.mark.parametrize('name', [path.stem.partition('.')[0] for path in sorted(CARDS.glob('*.json'))])
def test_it_can_be_cut_further_wherever_its_base_can(name):
    plan = Plan.load(variants.plan_path(name))
    found = trace_model(build_base(plan.base, device='meta')).structures
    assert {cut.structure.name for cut in plan.cuts} == {structure.name for structure in found}


@pytest.mark.parametrize('name', [path.stem for path in sorted(CARDS.glob('*.json'))])
def test_its_card_says_what_was_measured_and_what_was_cut(name):
    card, metrics = (CARDS / name / CARD).read_text(encoding='utf-8'), json.loads((CARDS / f'{name}.json').read_text())
    model = timm.create_model(name, pretrained=name in SHIPPED)
    plan, data, rows = model.pruning_plan, ModelCard(card).data, table(card)
    dense = build_base(plan.base, plan.base_args, 'meta')
    assert is_ours(card) and f'\n# {name}\n' in card and (CARDS / name / FIGURE).is_file()
    assert (f"'hf-hub:timm-epfs/{name}'" in card) == (name in SHIPPED) != (f"create_model('{name}'" in card)

    result, = data.eval_results
    assert (data.library_name, data.license) == ('timm', model.pretrained_cfg['license'])
    assert (data.model_name, result.dataset_name, result.metric_value) == (
        name, metrics['dataset'], metrics['pruned']['top1'])
    assert recipe(card) == json.loads(json.dumps(plan.recipe))

    before, after = (metrics[of] for of in ('dense', 'pruned'))
    assert numbers(rows['top-1, %']) == pytest.approx([before['top1'], after['top1'], after['top1'] - before['top1']])
    if 'latency' in metrics:
        assert numbers(rows['latency, ms'][:2]) == pytest.approx([before['latency_ms'], after['latency_ms']], abs=0.005)
        assert metrics['latency']['machine'] in ' '.join(card.split())
    else:
        assert rows['latency, ms'] == ['not measured'] * 3
    for row, pair in (('MACs', plan.cost['macs']), ('parameters', [parameters(each) for each in (dense, model)])):
        assert numbers(rows[row][:2]) == pytest.approx(list(pair), rel=1e-3)
        assert numbers(rows[row][2:]) == pytest.approx([100 * (pair[1] / pair[0] - 1)], abs=0.05)
    cuts = [cut for cut in plan.cuts if len(cut.keep) < cut.structure.units]
    assert f'{len(cuts)} of {len(plan.cuts)} structures' in section(card, 'What was cut')


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@EACH
@pytest.mark.skipif('CIFAR10_DIR' not in os.environ, reason='CIFAR10_DIR names no images')
def test_top1_on_the_first_images(name, monkeypatch):
    monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks' / 'comparison'), str(ROOT / 'benchmarks'), *sys.path])
    from cifar10_images import open_split

    model, right, near = shipped(name), 0, 0
    dataset = open_split(Path(os.environ['CIFAR10_DIR']), 'test')
    dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        for images, target in DataLoader(Subset(dataset, range(SAMPLE)), batch_size=250):
            logits = model(images)
            right += int((logits.argmax(1) == target).sum())
            near += int((logits.topk(2).values.diff().abs() < UNDECIDED).sum())
    assert near < 0.02 * SAMPLE and abs(right - SHIPPED[name]['right']) <= near
