"""The weights that come with timm_epfs: logits on a fixed input, and top-1 where the images are at hand.

``CIFAR10_DIR`` names the images: a folder with test.tar or test/, or torchvision's copy. ``benchmarks/cifar10/ship.py``
writes what is compared with into shipped.json.
"""
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, Subset

from timm_epfs.hub import CARD, FIGURE, make_card
from timm_epfs.plan import Plan
from timm_epfs.pruner import trace_model
from timm_epfs.surgery import build_base
from timm_epfs.zoo import variants

ROOT = Path(__file__).parents[1]
CARDS = ROOT / 'model_cards'
SHIPPED = json.loads((ROOT / 'tests' / 'shipped.json').read_text())
EACH = pytest.mark.parametrize('name', SHIPPED)
SAMPLE = 1000


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
    torch.testing.assert_close(logits, torch.tensor(SHIPPED[name]['logits']), rtol=1e-3, atol=1e-3)


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


@EACH
def test_its_card_is_made_of_what_was_measured(name):
    metrics = json.loads((CARDS / f'{name}.json').read_text())
    assert (CARDS / name / CARD).read_text() == make_card(shipped(name), f'timm-epfs/{name}', metrics, FIGURE)


@EACH
@pytest.mark.skipif('CIFAR10_DIR' not in os.environ, reason='CIFAR10_DIR names no images')
def test_top1_on_the_first_images(name, monkeypatch):
    monkeypatch.setattr(sys, 'path', [str(ROOT / 'benchmarks' / 'cifar10'), str(ROOT / 'benchmarks'), *sys.path])
    from data import open_split

    model = shipped(name)
    dataset = open_split(Path(os.environ['CIFAR10_DIR']), 'test')
    dataset.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right = 0
    with torch.inference_mode():
        for images, target in DataLoader(Subset(dataset, range(SAMPLE)), batch_size=250):
            right += int((model(images).argmax(1) == target).sum())
    assert abs(right - SHIPPED[name]['right']) <= 1
