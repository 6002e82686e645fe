"""Models built from their plan: no number is drawn for what goes, and what stays is drawn for its own shape."""
import copy
import doctest
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hand_plans import identity
from timm.layers import lecun_normal_, trunc_normal_, trunc_normal_tf_
from timm.models._efficientnet_builder import _init_weight_goog
from torch import nn
from torch.nn import init

import timm_epfs
from timm_epfs.core import Member, PruningError, Structure
from timm_epfs.plan import Cut, Plan
from timm_epfs.surgery import Skeleton, apply_plan, build_base, construction
from timm_epfs.surgery.construction import parameters_as_they_are_made


def scale(tensor):
    """Deviation of a distribution around zero, not moved by single entries far out."""
    return tensor.detach().abs().float().mean().item()


def cut_first(layer, **kept):
    """A plan that keeps the first entries of some dims of a layer: ``weight0=3`` of dim 0 of its weight."""
    cuts = []
    for place, left in kept.items():
        name, dim = place[:-1], int(place[-1])
        units = getattr(layer, name).shape[dim]
        cuts.append(Cut(Structure(place, 'channels', units, (identity(name, dim, 'per', units),)), np.arange(left)))
    return Plan(None, {}, tuple(cuts))


def conv(initialise, in_chs, out_chs, **kwargs):
    layer = nn.Conv2d(in_chs, out_chs, 3, **kwargs)
    initialise(layer)
    return layer


def depthwise(in_chs, out_chs):
    return conv(_init_weight_goog, out_chs, out_chs, groups=out_chs)


def goog_linear(in_chs, out_chs):
    layer = nn.Linear(in_chs, out_chs)
    _init_weight_goog(layer)
    return layer


def of_weight(initialise, **kwargs):
    return partial(conv, lambda layer: initialise(layer.weight, **kwargs))


@pytest.mark.parametrize('make', [
    nn.Linear, goog_linear, depthwise, partial(conv, _init_weight_goog), partial(conv, lambda layer: None),
    of_weight(init.kaiming_normal_), of_weight(init.kaiming_normal_, mode='fan_out', nonlinearity='relu'),
    of_weight(init.kaiming_uniform_), of_weight(init.xavier_uniform_), of_weight(init.xavier_normal_),
    of_weight(init.orthogonal_), of_weight(lecun_normal_), of_weight(trunc_normal_, std=0.02),
    of_weight(trunc_normal_tf_, std=0.02), of_weight(init.trunc_normal_, std=0.02), of_weight(init.normal_, std=0.01),
    of_weight(lambda weight: weight.data.normal_(0, (2 / weight.shape[0]) ** 0.5)),
    of_weight(lambda weight: trunc_normal_(weight, std=weight[0].numel() ** -0.5)),
    lambda in_chs, out_chs: nn.ConvTranspose2d(out_chs, in_chs, 2),
])
def test_a_cut_layer_is_initialised_as_a_plain_one_of_its_shape(make):
    """Fans are all different, dense and cut, so that taking one for another shows."""
    dense, plain = partial(make, 200, 500), make(40, 300)
    shapes = {name: tensor.shape for name, tensor in plain.named_parameters()}
    kept = {f'{name}{dim}': length for name, shape in shapes.items() for dim, length in enumerate(shape[:2])}
    groups = getattr(plain, 'groups', 1)
    plan = replace(cut_first(dense(), **kept), attributes={'groups': groups} if groups > 1 else {})
    layer = Skeleton(plan, dense).initialised()
    assert str(layer) == str(plain)
    for name, tensor in plain.named_parameters():
        got = getattr(layer, name)
        assert got.shape == tensor.shape and got.requires_grad
        assert scale(got) == pytest.approx(scale(tensor), rel=0.12, abs=1e-12), name


class Scaled(nn.Module):
    """Values that are not random, in parameters and in buffers, some tied, some frozen."""

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.linspace(0, 1, 6))
        self.gain = nn.Parameter(torch.full((6, 1), 0.1), requires_grad=False)
        self.fc = nn.Linear(4, 6)
        self.twin = nn.Linear(4, 6)
        self.twin.weight = self.fc.weight
        self.register_buffer('table', torch.arange(6.).flip(0), persistent=False)


def scaled_plan():
    members = tuple(identity(name, 0, 'per', 6) for name in ('steps', 'gain', 'fc.weight', 'fc.bias', 'table'))
    return Plan(None, {}, (Cut(Structure('fc', 'channels', 6, members), np.array([1, 5])),))


def test_what_is_not_random_is_cut_as_it_is():
    model = Skeleton(scaled_plan(), Scaled).initialised()
    want = apply_plan(Scaled(), scaled_plan())
    for name in ('steps', 'gain', 'table'):
        assert torch.equal(getattr(model, name), getattr(want, name))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in want.parameters()]
    assert model.twin.weight is model.fc.weight and model.fc.weight.shape == (2, 4)


def test_weights_are_loaded_without_a_draw():
    shapes = {name: tensor.shape for name, tensor in apply_plan(Scaled(), scaled_plan()).state_dict().items()}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights['twin.weight'] = weights['fc.weight']
    state = torch.get_rng_state()
    skeleton = Skeleton(scaled_plan(), Scaled)
    assert {name: tensor.shape for name, tensor in skeleton.tensors().items()} == shapes
    model = skeleton.with_weights(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.table.tolist() == [4, 0] and model.twin.weight is model.fc.weight
    assert not model.gain.requires_grad


def test_what_goes_is_not_drawn():
    """A model that keeps one channel takes as many random numbers as one that has one."""
    def drawn(make):
        torch.manual_seed(0)
        make()
        return torch.rand(1).item()

    dense = partial(nn.Linear, 64, 64)
    plan = cut_first(dense(), weight0=1, weight1=1, bias0=1)
    assert drawn(lambda: Skeleton(plan, dense).initialised()) == drawn(lambda: nn.Linear(1, 1))


class Relying(nn.Module):
    """A constructor that relies on the shape of a parameter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        with torch.no_grad():
            self.fc.weight.copy_(torch.rand(6, 4))


class Copying(nn.Module):
    """A constructor that copies a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.more = nn.Sequential(copy.deepcopy(self.fc))


@pytest.mark.parametrize('make', [Relying, Copying])
def test_where_a_constructor_does_not_run_so_the_dense_model_is_cut(make):
    members = (identity('fc.weight', 0, 'out', 6), identity('fc.bias', 0, 'out', 6))
    plan = Plan(None, {}, (Cut(Structure('fc', 'channels', 6, members), np.array([1, 5])),))
    torch.manual_seed(0)
    want = apply_plan(make(), plan).state_dict()
    model = Skeleton(plan, in_order(make)).initialised()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    loaded = Skeleton(plan, make).with_weights(want)
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())


def in_order(make):
    """A constructor that draws the same numbers each time."""
    def build():
        torch.manual_seed(0)
        return make()
    return build


def test_errors_are_those_of_the_builder():
    with pytest.raises(PruningError, match='nearest: ') as error:
        timm_epfs.rebuild(Plan('resnet81', {}, ()))
    assert error.value.__context__ is None
    with pytest.raises(PruningError, match="not the plan's base"):
        Skeleton(scaled_plan(), partial(nn.Linear, 2, 2))


def test_a_tensor_that_two_structures_own_is_initialised_once():
    one = Structure('a', 'channels', 3, (Member('weight', 0, 'out', np.arange(6).reshape(3, 2)),))
    two = Structure('b', 'channels', 2, (Member('weight', 0, 'out', np.array([[3], [4]]), length=6),))
    plan = Plan(None, {}, (Cut(one, np.array([0, 2])), Cut(two, np.array([0]))))
    layer = Skeleton(plan, partial(nn.Linear, 4, 6, bias=False)).initialised()
    assert layer.weight.shape == (3, 4) and layer.weight.abs().max() <= 0.5


def test_other_devices_and_dtypes():
    plan = Plan('test_vit', {}, ())
    model = Skeleton(plan, partial(build_base, 'test_vit', {}, 'meta')).initialised()
    assert all(p.is_meta for p in model.parameters())
    model = Skeleton(plan, partial(build_base, 'test_vit', {}, dtype=torch.bfloat16)).initialised()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_other_threads_build_as_ever():
    seen = []
    with parameters_as_they_are_made(lambda module, parameter: seen.append(module)):
        thread = threading.Thread(target=nn.Linear, args=(2, 2))
        thread.start()
        thread.join()
        layer = nn.Linear(2, 2, bias=False)
    assert seen == [layer]


def test_the_meta_device_gives_the_same_model():
    """Skipping initialisers there changes nothing."""
    with torch.device('meta'):
        want = timm.create_model('test_efficientnet')
    got = build_base('test_efficientnet', {}, 'meta')
    assert str(got) == str(want)
    assert [(n, t.shape, t.dtype) for n, t in got.state_dict().items()] == \
        [(n, t.shape, t.dtype) for n, t in want.state_dict().items()]


def test_the_examples_run():
    examples = doctest.testmod(construction)
    assert examples.attempted and not examples.failed
