"""Residual blocks that go, and what of them stays: nothing, an activation, a projection."""
import copy
import json

import numpy as np
import pytest
import timm
import torch
from helpers import distance, masked, randomise
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.plan import make_plan
from timm_epfs.pruner import trace_model
from timm_epfs.report import count_macs
from timm_epfs.surgery import apply_plan, inflate_checkpoint, slice_checkpoint
from timm_epfs.zoo import base_of

PROJECTED = ('downsample', 'act2')


def basic(stages, blocks):
    return {
        f'layer{stage}.{block}': PROJECTED if stage > 1 and not block else ()
        for stage in range(1, stages + 1) for block in range(blocks)
    }


class Net(nn.Module):
    """A stem, one block, a head."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.head(self.block(self.stem(x))).mean((2, 3))


class Block(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self._forward(self, x)


def conv(kernel=3):
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2)


def deep(m, x):
    return m.b(m.a(x).relu())


# what a block is, and its shortcut; None where no part of it can go
SHAPES = {
    'plain': (Block(lambda m, x: x + deep(m, x), a=conv(), b=conv()), ()),
    'activation after the sum': (
        Block(lambda m, x: m.act(x + deep(m, x)), a=conv(), b=conv(), act=nn.SiLU()), ('act',)),
    'relu after the sum, of any input': (
        Block(lambda m, x: m.act(x + deep(m, x)), a=conv(), b=conv(), act=nn.ReLU(inplace=True)), ('act',)),
    'projection': (
        Block(lambda m, x: deep(m, x) + m.bn(m.p(x)), a=conv(), b=conv(), p=conv(1), bn=nn.BatchNorm2d(8)),
        ('p', 'bn')),
    'projection of what was normalised': (
        Block(lambda m, x: (lambda y: deep(m, y) + m.p(y))(m.n(x)), n=nn.BatchNorm2d(8), a=conv(), b=conv(), p=conv(1)),
        ('n', 'p')),
    'projection, then a function': (
        Block(lambda m, x: torch.relu(deep(m, x) + m.p(x)), a=conv(), b=conv(), p=conv(1)), None),
    'function in the shortcut': (Block(lambda m, x: deep(m, x) + m.p(x.tanh()), a=conv(), b=conv(), p=conv(1)), None),
    'function between children': (
        Block(lambda m, x: deep(m, x) + m.bn(m.p(x).tanh()), a=conv(), b=conv(), p=conv(1), bn=nn.BatchNorm2d(8)),
        None),
    'child that changes its input': (
        Block(lambda m, x: deep(m, m.act(x)) + m.p(x), a=conv(), b=conv(), p=conv(1), act=nn.ReLU(inplace=True)),
        ('act', 'p')),
    'branches that are alike': (Block(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()), None),
    'nothing to scale': (Block(lambda m, x: m.p(x) + m.q(x).tanh(), p=conv(1), q=conv()), None),
}


@pytest.mark.parametrize('what', SHAPES)
def test_what_of_a_block_can_go(what):
    block, shortcut = SHAPES[what]
    torch.manual_seed(0)
    model = randomise(Net(copy.deepcopy(block))).eval()
    image = torch.randn(2, 3, 8, 8)
    traced = trace_model(model, image[:1])
    found = {s.name: s.shortcut for s in traced.structures if s.kind == 'blocks'}
    assert found == ({} if shortcut is None else {'block': shortcut})
    if found:
        check(model, traced, ['block'], image)


def check(model, traced, gone, images):
    """Masked is cut, and the cost is what torch counts. Returns the cut model's plan and the model."""
    keep = {s.name: np.arange(0 if s.name in gone else s.units) for s in traced.structures}
    plan = make_plan(traced, keep, {}, *base_of(model))
    slim = apply_plan(copy.deepcopy(model), plan)
    with torch.no_grad():
        zeroed = masked(model, traced.structures, keep)(images)
        assert distance(model(images), zeroed) > 1e-3
        assert distance(zeroed, slim(images)) < 1e-5
    assert plan.cost['macs'][1] == count_macs(slim, (images[:1],), {})
    assert plan.cost['params'][1] == sum(p.numel() for p in slim.parameters())
    assert plan.removed_blocks().keys() == set(gone)
    return plan, slim


@pytest.mark.parametrize('name, args, want', [
    ('resnet18', {}, basic(4, 2)),
    ('resnet18', {'act_layer': 'silu'}, {block: children or ('act2',) for block, children in basic(4, 2).items()}),
    ('resnet20_cifar', {}, basic(3, 3)),
    ('regnety_002', {}, None),
    ('repvgg_a0', {}, None),
    ('resnetv2_50', {'layers': (1, 2)}, None),
])
def test_blocks_of_known_families(name, args, want):
    model = randomise(timm.create_model(name, num_classes=7, **args)).eval()
    traced = trace_model(model)
    found = {s.name: s.shortcut for s in traced.structures if s.kind == 'blocks'}
    assert any(found.values()) and (want is None or found == want)
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    plan, _ = check(model, traced, list(found)[::2] + list(found)[1::4], images)
    assert timm_epfs.Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_without_its_blocks_a_model_is_rebuilt_saved_and_cut_again(tmp_path):
    model = randomise(timm.create_model('resnet20_cifar')).eval()
    traced = trace_model(model)
    images = torch.randn(2, 3, 32, 32)
    plan, slim = check(model, traced, ['layer2.0', 'layer2.1', 'layer3.0'], images)
    slim.pruning_plan = plan
    assert isinstance(slim.layer2[0], nn.Sequential) and isinstance(slim.layer2[1], nn.Identity)
    assert not slim.layer2[0].training

    dense, left = model.state_dict(), slim.state_dict()
    assert slice_checkpoint(dense, plan).keys() == left.keys() < dense.keys()
    assert {n: t.shape for n, t in inflate_checkpoint(left, plan).items()} == {n: t.shape for n, t in dense.items()}
    rebuilt = timm_epfs.rebuild(timm_epfs.Plan.from_json(plan.to_json())).eval()
    rebuilt.load_state_dict(left)
    assert torch.equal(rebuilt(images), slim(images))
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'slim')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(loaded(images), slim(images))

    again = timm_epfs.prune(slim, macs=0.6, kinds=['channels', 'blocks'])
    assert again.pruning_plan.removed_blocks().keys() >= plan.removed_blocks().keys()
    once = timm_epfs.rebuild(again.pruning_plan).eval()
    once.load_state_dict(again.state_dict())
    assert torch.equal(once(images), again(images))


def test_a_projection_is_cut_along_with_what_stays():
    """The shortcut's own channels still belong to their structures."""
    model = randomise(timm.create_model('resnet20_cifar', shortcut='B')).eval()
    traced = trace_model(model)
    keep = {s.name: np.arange(0) if s.name == 'layer2.0' else np.arange(max(1, s.units // 2)) for s in traced.structures
            if s.kind != 'blocks' or s.name == 'layer2.0'}
    keep = {s.name: keep.get(s.name, np.arange(s.units)) for s in traced.structures}
    slim = apply_plan(copy.deepcopy(model), make_plan(traced, keep, {}))
    images = torch.randn(2, 3, 32, 32)
    assert slim.layer2[0].downsample[0].weight.shape[:2] == (16, 8)
    with torch.no_grad():
        assert distance(masked(model, traced.structures, keep)(images), slim(images)) < 1e-5


@pytest.mark.parametrize('shortcut, message', [
    (['conv9'], 'block layer2.0.conv9 is missing'),
    (['downsample', 'downsample'], 'each once'),
    (['..'], 'names of children'),
    ([1], 'names of children'),
    ('downsample', 'a list'),
])
def test_shortcuts_that_are_none_are_refused(shortcut, message):
    model = timm.create_model('resnet20_cifar')
    traced = trace_model(model)
    keep = {s.name: np.arange(0 if s.name == 'layer2.0' else s.units) for s in traced.structures}
    data = json.loads(make_plan(traced, keep, {}).to_json())
    cut, = (cut for cut in data['cuts'] if cut['name'] == 'layer2.0')
    cut['shortcut'] = shortcut
    with pytest.raises(PruningError, match=message):
        apply_plan(model, timm_epfs.Plan.from_dict(data))
