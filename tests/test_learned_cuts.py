"""What learners cut: exactly what was masked, to the budget, and an ordinary model is left."""
import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import distance, randomise
from loop import EXAMPLE, build, outputs, sgd, train
from timm.models.resnet import BasicBlock
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.learn import METHODS

MODELS = [
    ('resnet18', {}, 64, ('filters', 'blocks')),
    ('resnet50', {'layers': (1, 1, 2, 1), 'base_width': 32}, 64, ('filters', 'blocks')),
    ('resnext50_32x4d', {'layers': (1, 1, 2, 1)}, 64, ('filters', 'groups')),
    ('mobilenetv3_small_050', {}, 64, ('filters',)),
    ('efficientnet_b0', {}, 64, ('filters', 'blocks')),
    ('densenet121', {'block_config': (2, 2, 2, 2)}, 64, ('filters',)),
    ('vgg11_bn', {}, 32, ('filters',)),
    ('regnety_002', {}, 64, ('filters', 'groups')),
    ('convnext_atto', {'depths': (1, 1, 2, 1)}, 64, ('filters', 'blocks')),
    ('deit_tiny_patch16_224', {'img_size': 64, 'depth': 3}, 64, ('filters', 'heads', 'blocks')),
    ('swin_tiny_patch4_window7_224', {'img_size': 56, 'embed_dim': 48, 'depths': (2, 1, 1, 1)}, 56,
     ('filters', 'heads', 'blocks')),
    ('mixer', {}, 64, ('filters', 'blocks')),
]


@pytest.mark.parametrize('name, args, size, structures', MODELS, ids=[row[0] for row in MODELS])
def test_cut_is_masked_after_training(name, args, size, structures):
    model = randomise(build(name, **args))
    learner = timm_epfs.EPFS(
        model, macs=0.6, steps=5, kinds=structures, floor=0.1, example_input=torch.empty(1, 3, size, size),
        refit=False)
    train(model, learner, sgd(model, 0.003), 5, size=size)
    slim = learner.export()
    assert type(slim) is type(build(name, **args))
    assert distance(outputs(model, size), outputs(slim, size)) < 1e-4
    dense, left = slim.pruning_plan.cost['macs']
    assert left / dense == pytest.approx(0.6, abs=0.01) and learner.alive <= left / dense + 1e-6
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    kinds = {cut.structure.kind for cut in slim.pruning_plan.cuts if len(cut.keep) < cut.structure.units}
    assert 'channels' in kinds


@pytest.mark.parametrize('name, structures', [
    ('resnet18', ('blocks',)), ('regnety_002', ('groups',)), ('deit_tiny_patch16_224', ('heads',)),
])
def test_one_kind_alone(name, structures):
    args = {'img_size': 64, 'depth': 2} if name.startswith('deit') else {}
    model = randomise(build(name, **args))
    learner = timm_epfs.EPFS(
        model, l1=0.5, l2=None, lr=0.6, steps=4, kinds=structures, center=0, refit=False, example_input=EXAMPLE)
    train(model, learner, sgd(model, 0.001), 4)
    slim = learner.export()
    assert distance(outputs(model), outputs(slim)) < 1e-4
    cut = {c.structure.kind for c in slim.pruning_plan.cuts if len(c.keep) < c.structure.units}
    assert cut == {s.kind for s in learner.structures}
    gone = slim.pruning_plan.removed_blocks()
    assert bool(gone) == ('blocks' in structures)
    assert not any(isinstance(slim.get_submodule(name), BasicBlock) for name in gone)


@pytest.mark.parametrize('method', METHODS)
def test_every_method_meets_the_budget_and_cuts_what_it_masked(method):
    model = randomise(build())
    learner = METHODS[method](model, macs=0.5, steps=6, example_input=EXAMPLE)
    optimizer = sgd(model)
    train(model, learner, optimizer, 6)
    assert learner.finished
    train(model, learner, optimizer, 2, first=6)  # fine-tuning under masks that stay
    slim = learner.export()
    assert distance(outputs(model), outputs(slim)) < 1e-4
    dense, left = slim.pruning_plan.cost['macs']
    assert left / dense == pytest.approx(0.5, abs=0.01)
    assert slim.pruning_plan.recipe['method'] == method
    assert all(isinstance(value, float) for value in learner.log().values())


@pytest.mark.parametrize('method', ['epfs', 'sss'])
def test_masks_only_select_and_what_stays_is_refitted_without_them(method):
    model = randomise(build())
    learner = METHODS[method](model, macs=0.5, steps=20, kinds=('filters',), example_input=EXAMPLE)
    optimizer = sgd(model)
    train(model, learner, optimizer, 16)
    assert not learner.finished
    train(model, learner, optimizer, 1, first=16)
    masks = np.concatenate([*learner.values().values()])
    assert learner.finished and set(masks) == {0.0, 1.0} and learner.alive == pytest.approx(0.5, abs=0.01)
    train(model, learner, optimizer, 3, first=17)
    assert np.array_equal(np.concatenate([*learner.values().values()]), masks)
    assert distance(outputs(model), outputs(learner.export())) < 1e-4


@pytest.mark.parametrize('method', ['epfs', 'sss'])
def test_blocks_that_stay_keep_their_size_beside_the_shortcut(method):
    """Against a learner that makes no selection after the same 17 of 20 steps."""
    masks = {}
    for refit in (False, True):
        model = randomise(build('resnet20_cifar'))
        learner = METHODS[method](
            model, macs=0.5, steps=20, kinds=('filters', 'blocks'), refit=refit, example_input=EXAMPLE)
        train(model, learner, sgd(model), 17, size=32)
        assert learner.finished == refit
        masks[refit] = learner.values()
    before, after = masks[False], masks[True]
    blocks = {s.name for s in learner.structures if s.kind == 'blocks'}
    stayed = [name for name in blocks if after[name].any()]
    assert stayed and all(after[name] == before[name] != 1 for name in stayed)
    selected, learned = ({*np.concatenate([m[name] for name in m.keys() - blocks])} for m in (after, before))
    assert selected == {0.0, 1.0} and not learned <= selected
    assert distance(outputs(model), outputs(learner.export())) < 1e-4


def test_one_shot_learners_are_there_to_compare_with():
    model = randomise(build())
    one, again = copy.deepcopy(model), copy.deepcopy(model)
    learner = timm_epfs.OneShot(one, macs=0.5, steps=3, criterion='fpgm', example_input=EXAMPLE)
    optimizer = sgd(one)
    train(one, learner, optimizer, 3)
    train(one, learner, optimizer, 1, first=3)
    slim = learner.export()
    assert distance(outputs(one), outputs(slim)) < 1e-4
    assert learner.alive == pytest.approx(0.5, abs=0.01)

    scratch = timm_epfs.Scratch(again, macs=0.5, example_input=EXAMPLE)
    fresh = scratch.export()
    pruned = timm_epfs.prune(model, macs=0.5, example_input=EXAMPLE)
    kept = [{c.structure.name: c.keep.tolist() for c in m.pruning_plan.cuts} for m in (fresh, pruned)]
    assert kept[0] == kept[1] and fresh.pruning_plan.recipe['method'] == 'scratch'
    assert distance(outputs(fresh), outputs(pruned)) > 1e-2
    assert torch.equal(fresh.conv1[1].weight, torch.ones(len(fresh.conv1[1].weight)))  # a norm at its start again
    train(fresh, timm_epfs.OneShot(fresh, macs=0.9, steps=9), sgd(fresh), 1)


def test_an_early_export_meets_the_budget_too():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=100)
    train(model, learner, sgd(model), 2)
    dense, left = learner.export().pruning_plan.cost['macs']
    assert left / dense == pytest.approx(0.5, abs=0.015) and learner.alive == 1.0


def test_the_exported_model_is_an_ordinary_one(tmp_path):
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=3)
    train(model, learner, sgd(model), 3)
    slim = learner.export()
    assert list(slim.state_dict()) == list(build().state_dict())
    assert {type(m) for m in slim.modules()} <= {type(m) for m in build().modules()} | {nn.Identity}
    assert not any(m._forward_pre_hooks for m in slim.modules())
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'slim')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(outputs(loaded), outputs(slim))
    theirs = {t.data_ptr() for t in model.parameters()}
    assert not theirs & {t.data_ptr() for t in slim.parameters()}


def test_streams_are_cut_on_request():
    build_vit = lambda: build('test_vit')  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not any(s.stream for s in timm_epfs.EPFS(build_vit(), macs=0.7, steps=5).structures)
        assert any(s.stream for s in timm_epfs.EPFS(build_vit(), macs=0.7, steps=5, streams=True).structures)


def test_prune_takes_a_compiled_model_but_none_with_masks_on():
    model = build()
    slim = timm_epfs.prune(torch.compile(model, backend='eager'), macs=0.5)
    assert type(slim) is type(model)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=9)
    with pytest.raises(PruningError, match=r'cut it with learner\.export\(\)'):
        timm_epfs.prune(model, macs=0.5)
    learner.remove()
    assert timm_epfs.prune(model, macs=0.5).pruning_plan.cost == slim.pruning_plan.cost


def test_a_learned_cut_is_cut_again_and_the_plan_tells_both():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.7, steps=2)
    train(model, learner, sgd(model), 2)
    slim = timm_epfs.prune(learner.export(), macs=0.7)
    again = timm_epfs.EPFS(slim, macs=0.7, steps=2)
    assert [step['method'] for step in slim.pruning_plan.recipe['steps']] == ['epfs', 'one-shot']
    train(slim, again, sgd(slim), 2)
    plan = again.export().pruning_plan
    assert [step['method'] for step in plan.recipe['steps']] == ['epfs', 'one-shot', 'epfs']
    assert plan.cost['macs'][1] / plan.cost['macs'][0] == pytest.approx(0.343, rel=0.05)


# Soft filter pruning.

@pytest.mark.parametrize('method', ['sfp', 'bn_sfp'])
def test_a_soft_cut_zeroes_the_weakest_and_lets_them_come_back(method):
    model = randomise(build())
    norm, conv = model.layer1[0].bn1.weight, model.layer1[0].conv1.weight
    learner = METHODS[method](model, ratio=0.25, steps=40, steps_per_epoch=2)
    tensor = conv if method == 'sfp' else norm
    strength = (conv.flatten(1).norm(dim=1) if method == 'sfp' else norm.abs()).detach().clone()
    bias = model.layer1[0].bn1.bias.detach().clone()
    optimizer = sgd(model, 0.0)
    train(model, learner, optimizer, 2)
    zero = tensor.detach().flatten(1).norm(dim=1) == 0 if tensor.ndim > 1 else tensor == 0
    assert set(zero.nonzero().flatten().tolist()) == set(strength.argsort()[:round(0.25 * len(norm))].tolist())
    assert torch.equal(bias, model.layer1[0].bn1.bias)  # it still emits β, by which it can come back
    train(model, learner, sgd(model, 0.1), 1, first=2)
    back = tensor.detach().flatten(1).norm(dim=1) if tensor.ndim > 1 else tensor.abs()
    assert (back[zero] > 0).any()


@pytest.mark.parametrize('method', ['sfp', 'bn_sfp'])
def test_the_last_soft_cut_emits_nothing(method):
    """With β far from zero a channel whose γ is zero is a constant, which a cut would lose."""
    model = randomise(build())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(1.0)
    learner = METHODS[method](model, ratio=0.3, steps=4, steps_per_epoch=2)
    train(model, learner, sgd(model), 4)
    slim = learner.export()
    assert distance(outputs(model), outputs(slim)) < 1e-4
    left = {cut.structure.name: len(cut.keep) / cut.structure.units for cut in slim.pruning_plan.cuts}
    learned = [left[s.name] for s in learner.structures]
    assert learned == pytest.approx([0.7] * len(learned), abs=0.04)
