"""Cutting: the cut model is the masked one, rebuilt ones are the cut one, and nothing is half cut."""
import copy
import doctest

import numpy as np
import pytest
import timm
import torch
from hand_plans import NORM_TENSORS, VIT, VIT_ARGS, identity, resnet_plan, vit_plan
from timm.models import FeatureInfo
from torch import nn

from timm_epfs.core import Member, PruningError, Structure, configs
from timm_epfs.plan import Cut, Plan
from timm_epfs.surgery import (
    apply_plan,
    attributes,
    build_base,
    cut_copy,
    inflate_checkpoint,
    rebuild,
    slice_checkpoint,
)


def resnet():
    """A ResNet-18 with BatchNorm statistics and affine values that are not all alike."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name in NORM_TENSORS:
                getattr(module, name).data.uniform_(0.5, 1.5)
    return model, resnet_plan(model, 'resnet18', num_classes=5)


def vit():
    torch.manual_seed(0)
    model = timm.create_model(VIT, **VIT_ARGS).eval()
    return model, vit_plan(model)


def torchvision_resnet():
    torch.manual_seed(0)
    model = build_base('torchvision/resnet18', {'num_classes': 5}).eval()
    return model, resnet_plan(model, 'torchvision/resnet18', num_classes=5)


def images(plan):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def masked(model, plan):
    """A dense copy whose consumers read zeros from every unit that goes."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    for cut in plan.cuts:
        for member in cut.structure.members:
            if member.role == 'in':
                gone = np.setdiff1d(np.arange(cut.structure.units), cut.keep)
                tensors[member.tensor].data.index_fill_(member.dim, torch.from_numpy(member.index[gone].ravel()), 0)
    return model


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


BASES = pytest.mark.parametrize('make', [resnet, vit, torchvision_resnet])


@BASES
def test_the_cut_model_is_the_masked_one(make):
    model, plan = make()
    x = images(plan)
    with torch.no_grad():
        want = masked(model, plan)(x)
        got = apply_plan(copy.deepcopy(model), plan)(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - model(x)).abs().max() > 1e-3 * want.abs().max()


@BASES
def test_the_rebuilt_model_is_the_cut_one(make):
    model, plan = make()
    cut = apply_plan(copy.deepcopy(model), plan)
    again = rebuild(Plan.from_json(plan.to_json())).eval()
    assert shapes(again) == shapes(cut) != shapes(model)
    assert str(again) == str(cut)
    again.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images(plan)), cut(images(plan)))
    assert again.pruning_plan is not None and copy.deepcopy(again).pruning_plan.to_json() == plan.to_json()


@BASES
def test_a_sliced_checkpoint_is_the_cut_models(make):
    model, plan = make()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sliced = slice_checkpoint(dense, plan)
    want = apply_plan(model, plan).state_dict()
    assert sliced.keys() == want.keys() and all(torch.equal(sliced[name], want[name]) for name in want)

    inflated = inflate_checkpoint(sliced, plan)
    assert {name: tensor.shape for name, tensor in inflated.items()} == {n: t.shape for n, t in dense.items()}
    again = slice_checkpoint(inflated, plan)
    assert all(torch.equal(again[name], want[name]) for name in want)
    kept_only = inflate_checkpoint(slice_checkpoint({n: torch.ones_like(t) for n, t in dense.items()}, plan), plan)
    assert sum(t.sum() for t in kept_only.values()) == sum(t.numel() for t in want.values())


def test_meta_copies_are_cut_like_real_ones():
    model, plan = resnet()
    on_meta = rebuild(plan, device='meta')
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {'meta'}
    assert shapes(on_meta) == shapes(apply_plan(model, plan))


def test_composed_plans_cut_as_one_after_the_other():
    model, first = resnet()
    twice = apply_plan(copy.deepcopy(model), first)
    later = resnet_plan(twice, 'resnet18', keep=lambda units, seed: np.arange(0, units, 3))
    apply_plan(twice, later)
    once = apply_plan(model, first.compose(later))
    want = twice.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in once.state_dict().items())


def test_a_cut_copy_shares_nothing_and_copies_nothing_that_goes():
    model, plan = resnet()
    model.layer1[1].bn2.weight = model.layer1[0].bn2.weight  # neither is cut
    model.pruning_plan = plan
    model.kept = model(images(plan))  # has a history, which a deep copy refuses
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = apply_plan(timm.create_model('resnet18', num_classes=5), plan)
    slim = cut_copy(model, plan)
    assert shapes(slim) == shapes(want) and slim.pruning_plan is plan
    addresses = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, slim)]
    assert not addresses[0] & addresses[1]
    assert slim.layer1[1].bn2.weight is slim.layer1[0].bn2.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_examples_run():
    assert doctest.testmod(attributes).failed == doctest.testmod(configs).failed == 0


def layer_plan(name, tensors, units, keep, **attributes):
    """Cut dims of single tensors: ``tensors`` maps a tensor's name to its dim."""
    members = tuple(identity(tensor, dim, 'out', units) for tensor, dim in tensors.items())
    return Plan(None, {}, (Cut(Structure(name, 'channels', units, members), np.array(keep)),), attributes)


@pytest.mark.parametrize('layer, dims, attributes, want', [
    (nn.Linear(6, 4), {'weight': 1}, {}, {'in_features': 2, 'out_features': 4}),
    (nn.Conv2d(6, 4, 1), {'weight': 1}, {}, {'in_channels': 2, 'out_channels': 4}),
    (nn.Conv2d(6, 6, 3, groups=6), {'weight': 0, 'bias': 0}, {'groups': 2}, {'in_channels': 2, 'out_channels': 2}),
    (nn.ConvTranspose2d(6, 4, 1), {'weight': 0}, {}, {'in_channels': 2, 'out_channels': 4}),
    (nn.BatchNorm2d(6), dict.fromkeys(NORM_TENSORS, 0), {}, {'num_features': 2}),
    (nn.BatchNorm2d(6, affine=False), dict.fromkeys(NORM_TENSORS[2:], 0), {}, {'num_features': 2}),
    (nn.LayerNorm(6), {'weight': 0, 'bias': 0}, {}, {'normalized_shape': (2,)}),
    (timm.layers.RmsNorm(6), {'weight': 0}, {}, {'normalized_shape': (2,)}),
    (nn.GroupNorm(3, 6), {'weight': 0, 'bias': 0}, {'num_groups': 1}, {'num_channels': 2, 'num_groups': 1}),
    (nn.Embedding(9, 6), {'weight': 1}, {}, {'num_embeddings': 9, 'embedding_dim': 2}),
    (nn.PReLU(6), {'weight': 0}, {}, {'num_parameters': 2}),
])
def test_modules_know_their_new_shapes(layer, dims, attributes, want):
    apply_plan(layer, layer_plan('', dims, 6, [1, 4], **attributes))
    assert {name: getattr(layer, name) for name in want} == want
    assert all(layer.state_dict()[name].shape[dim] == 2 for name, dim in dims.items())


class Odd(nn.Module):
    """Integers wherever timm's models keep them."""
    table = [{'width': 8}]

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.layers[1].weight = self.layers[0].weight
        self.layers[0].weight.requires_grad = False
        self.splits = (4, 2)
        self.nested = [{'sizes': [3, 5]}]
        self.feature_info = FeatureInfo([{'num_chs': 8, 'reduction': 2, 'module': 'layers'}], (0,))
        self.register_buffer('scratch', torch.arange(6.), persistent=False)
        self.on = True
        self.ratio = 0.5

    @property
    def fixed(self):
        return 7


def test_attributes_are_set_along_paths():
    model = Odd()
    other = copy.copy(model)
    apply_plan(model, Plan(None, {}, (), {
        'splits.1': 1, 'nested.0.sizes.1': 4, 'feature_info.0.num_chs': 3, 'table.0.width': 2,
        'layers.0.in_features': 5,
    }))
    assert model.splits == (4, 1) and model.nested == [{'sizes': [3, 4]}]
    assert isinstance(model.feature_info, FeatureInfo) and model.feature_info.channels() == [3]
    assert model.layers[0].in_features == 5
    assert model.table == [{'width': 2}] and Odd.table == [{'width': 8}]
    assert other.nested == [{'sizes': [3, 5]}] and other.splits == (4, 2)


@pytest.mark.parametrize('attributes, message', [
    ({'layers.2.in_features': 1}, 'attribute layers.2.in_features is missing'),
    ({'splits.9': 1}, 'splits.9 is missing'),
    ({'splits.x': 1}, 'splits.x is missing'),
    ({'nested.0.size': 1}, 'nested.0.size is missing'),
    ({'__dict__.on': 1}, '__dict__.on is missing'),
    ({'on': 0}, 'attribute on is not an integer'),
    ({'ratio': 0}, 'attribute ratio is not an integer'),
    ({'fixed': 1}, 'attribute fixed is not an integer that can be set'),
    ({'splits.0': 5}, 'attribute splits.0 is 4 and the plan says 5'),
])
def test_attributes_that_do_not_fit_are_refused(attributes, message):
    with pytest.raises(PruningError, match=message):
        apply_plan(Odd(), Plan(None, {}, (), attributes))


def test_tied_tensors_stay_tied():
    model = Odd()
    want = model.layers[0].weight[[0, 5]]
    apply_plan(model, layer_plan('a', {'layers.1.weight': 0}, 6, [0, 5]))
    assert model.layers[0].weight is model.layers[1].weight
    assert torch.equal(model.layers[0].weight, want)
    assert not model.layers[0].weight.requires_grad
    assert [layer.out_features for layer in model.layers] == [2, 2]


def test_buffers_outside_the_state_dict_are_cut():
    model = apply_plan(Odd(), layer_plan('a', {'scratch': 0}, 6, [0, 5]))
    assert model.scratch.tolist() == [0, 5] and 'scratch' not in model.state_dict()


def test_dtype_and_memory_format_stay():
    layer = nn.Conv2d(6, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    apply_plan(layer, layer_plan('a', {'weight': 1}, 6, [1, 3]))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_plan_for_another_base_changes_nothing():
    model, plan = resnet()
    cuts = plan.cuts + layer_plan('a', {'layer1.0.conv9.weight': 0, 'fc.weight': 1, 'fc.bias': 1}, 600, [0]).cuts
    bad = Plan('resnet18', {}, cuts, {'num_features': 9999})
    before = dict(model.named_parameters())
    with pytest.raises(PruningError, match=r'not the plan.s base \(base resnet18\): layer1.0.conv9.weight is missing; '
                                           r'fc.weight has shape \(5, 512\) where dim 1 should have 600; '
                                           r'fc.bias has shape .* and 1 more'):
        apply_plan(model, bad)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_cutting_twice_is_refused():
    model, plan = resnet()
    apply_plan(model, plan)
    with pytest.raises(PruningError, match=r'layer1.0.conv1.weight has shape \(32, 64, 3, 3\)'):
        apply_plan(model, plan)


def test_layers_that_were_left_out_are_passed_over():
    model, plan = resnet()
    head = Structure('global_pool', 'channels', 512, (identity('fc.weight', 1, 'in', 512),))
    plan = Plan('resnet18', {}, (*plan.cuts, Cut(head, np.arange(100))))
    headless = apply_plan(timm.create_model('resnet18', num_classes=0).eval(), plan)
    assert headless(torch.randn(1, 3, 32, 32)).shape == (1, 512)


def test_checkpoints_of_another_base_are_refused():
    model, plan = resnet()
    state_dict = model.state_dict()
    with pytest.raises(PruningError, match='layer1.0.conv1.weight is missing.* 45 more.*unwrapped'):
        slice_checkpoint({f'module.{name}': tensor for name, tensor in state_dict.items()}, plan)
    with pytest.raises(PruningError, match=r'layer1.0.bn1.weight has shape \(32,\)'):
        slice_checkpoint({**state_dict, 'layer1.0.bn1.weight': torch.ones(32)}, plan)
    with pytest.raises(PruningError, match='weights that were saved with the plan'):
        inflate_checkpoint({'layer1.0.bn1.weight': torch.ones(3)}, plan)


def test_checkpoints_may_lack_buffers_that_are_never_saved():
    model = timm.create_model('swin_tiny_patch4_window7_224')
    name = 'layers.0.blocks.1.attn_mask'
    assert name in dict(model.named_buffers()) and name not in model.state_dict()
    units = model.layers[0].blocks[1].mlp.fc1.out_features
    structure = Structure('a', 'channels', 2, (
        Member(name, 0, 'per', np.arange(2)[:, None]),
        Member('layers.0.blocks.1.mlp.fc1.bias', 0, 'per', np.arange(units).reshape(2, -1)),
    ))
    plan = Plan('swin_tiny_patch4_window7_224', {}, (Cut(structure, np.array([1])),))
    sliced = slice_checkpoint(model.state_dict(), plan)
    assert len(sliced['layers.0.blocks.1.mlp.fc1.bias']) == units // 2


@pytest.mark.parametrize('base, args, message', [
    ('resnet81', {}, 'nearest: .*resnet'),
    ('torchvision/resnet81', {}, 'nearest: .*torchvision/resnet'),
    ('hf-hub:someone/resnet18', {}, 'no model is named'),
    ('local-dir:/tmp', {}, 'no model is named'),
    ('resnet18', {'colour': 1}, "resnet18 can't be built with .*unexpected keyword argument 'colour'"),
    ('resnet18', {'num_clases': 1}, 'unknown keyword num_clases= of resnet18; did you mean num_classes='),
    ('resnet18', {'img_size': 64}, "resnet18 can't be built with .*unexpected keyword argument 'img_size'"),
    ('torchvision/resnet18', {'colour': 1}, "torchvision/resnet18 can't be built with"),
    ('resnet18', {'checkpoint_path': 'x.pth'}, "'checkpoint_path', which is not for a plan to set"),
    ('resnet18', {'pretrained': True}, "'pretrained', which is not for a plan to set"),
    ('torchvision/resnet18', {'weights': 'DEFAULT'}, "'weights', which is not for a plan to set"),
    (None, {}, 'names no base'),
])
def test_bases_that_can_not_be_built(base, args, message):
    with pytest.raises(PruningError, match=message) as error:
        rebuild(Plan(base, args, ()))
    assert '\n' not in str(error.value)
