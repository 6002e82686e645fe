"""Deferred initialisation: nobody sees a difference, and what was cut is drawn for the shape that is left."""
import copy
import math

import pytest
import timm
import torch
from timm.layers import lecun_normal_, trunc_normal_, trunc_normal_tf_
from timm.models._efficientnet_builder import _init_weight_goog
from torch import nn
from torch.nn import init

from timm_epfs.surgery import DeferredInit


def built(make, deferred):
    torch.manual_seed(0)
    if not deferred:
        return make()
    with DeferredInit():
        return make()


def weight(*steps):
    def make():
        tensor = torch.empty(48, 32)
        for step in steps:
            with torch.no_grad():
                step(tensor)
        return tensor
    return make


@pytest.mark.parametrize('steps', [
    [init.uniform_], [init.normal_], [init.zeros_], [init.ones_], [init.eye_], [init.orthogonal_], [init.trunc_normal_],
    [init.xavier_uniform_], [init.xavier_normal_], [init.kaiming_normal_], [init.kaiming_uniform_], [lecun_normal_],
    [lambda w: init.constant_(w, 3.0)], [lambda w: init.kaiming_uniform_(w, a=math.sqrt(5))],
    [lambda w: init.kaiming_uniform_(w, mode='fan_out', nonlinearity='relu')],
    [lambda w: trunc_normal_(w, std=0.02)], [lambda w: trunc_normal_tf_(w, std=0.02)],
    [lambda w: w.data.normal_(0, 0.1)], [lambda w: w.view(-1).uniform_(-1, 1)], [lambda w: w.normal_(std=0.3).mul_(2)],
    # parts, reads and other writes in between
    [init.ones_, lambda w: w[3].zero_()], [init.ones_, lambda w: w[:, 1:4].mul_(5)], [init.normal_, torch.Tensor.abs_],
    [init.normal_, lambda w: w.t().mul_(2)], [init.normal_, lambda w: w.mul_(w.std())],
    [init.ones_, lambda w: w.add_(torch.arange(32))], [init.normal_, lambda w: w.div_(w.norm(dim=1, keepdim=True))],
    [init.normal_, lambda w: w.copy_(torch.ones(32))], [init.normal_, lambda w: torch.clamp(w, 0, 1, out=w)],
    [init.normal_, lambda w: w.__setitem__(w > 0, 0)], [init.normal_, lambda w: w[0].copy_(w[1])],
])
def test_one_tensor_is_what_it_would_be(steps):
    assert torch.equal(built(weight(*steps), deferred=True), built(weight(*steps), deferred=False))


@pytest.mark.parametrize('read', [
    lambda w: w.std(), lambda w: w[0], lambda w: w.tolist()[0][0], lambda w: w.numpy(), lambda w: float(w[0, 0]),
    lambda w: torch.cat([w, w]), lambda w: copy.deepcopy(w), lambda w: w.to(torch.float64), lambda w: torch.stack((w,)),
    lambda w: nn.functional.linear(input=torch.ones(32), weight=w), lambda w: list(w)[0], lambda w: w.reshape(-1),
    lambda w: torch.utils._pytree.tree_map(torch.sum, {'w': w})['w'], lambda w: torch.where(w > 0, w, -w),
    lambda w: w.data.clone(), lambda w: w.flatten()[0].item(), lambda w: w @ w.t(), lambda w: copy.copy(w).sum(),
])
def test_reading_sees_initialised_values(read):
    def make():
        return read(nn.Parameter(init.ones_(torch.full((48, 32), math.nan)), requires_grad=False))

    want, got = built(make, deferred=False), built(make, deferred=True)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'test_convnext', 'swin_tiny_patch4_window7_224'])
def test_a_model_is_initialised_as_ever(name):
    dense, deferred = (built(lambda: timm.create_model(name), way) for way in (False, True))
    for tensors in ('named_parameters', 'named_buffers'):
        want, got = (dict(getattr(model, tensors)()) for model in (dense, deferred))
        assert want.keys() == got.keys()
        for key, tensor in want.items():
            assert got[key].shape == tensor.shape and got[key].requires_grad == tensor.requires_grad
            if tensor.numel() > 500 and tensor.is_floating_point() and tensor.min() < tensor.max():
                assert scale(got[key]) == pytest.approx(scale(tensor), rel=0.25), key
            elif tensor.numel() > 1 and tensor.min() == tensor.max():
                assert torch.equal(got[key], tensor), key


def scale(tensor):
    """Deviation of a distribution around zero, not moved by single entries far out."""
    return tensor.detach().abs().float().mean().item()


def test_what_is_overwritten_is_never_drawn():
    with DeferredInit():
        state = torch.get_rng_state()
        layer = nn.Linear(64, 64)
        gone = nn.Linear(64, 64)
        del gone
        layer.load_state_dict({'weight': torch.ones(64, 64), 'bias': torch.ones(64)})
    assert torch.equal(torch.get_rng_state(), state)
    assert (layer.weight == 1).all() and (layer.bias == 1).all()


def test_nothing_is_drawn_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        with DeferredInit():
            layer = nn.Linear(4, 4)
            raise KeyError
    assert torch.equal(torch.get_rng_state(), state) and layer.weight.shape == (4, 4)
    assert torch.equal(torch.ones(2).fill_(3), torch.full((2,), 3.0))


def test_memory_that_another_parameter_shares_is_initialised_when_one_is_cut():
    with DeferredInit() as deferred:
        one = nn.Parameter(torch.full((6, 4), math.nan))
        init.ones_(one)
        other = nn.Parameter(one.data)
        one = nn.Parameter(deferred.resized(one, (3, 4)))
    assert torch.equal(one.data, torch.ones(3, 4)) and torch.equal(other.data, torch.ones(6, 4))


def test_nothing_is_resized_that_holds_values():
    with DeferredInit() as deferred:
        assert deferred.resized(torch.zeros(4), (2,)) is None
        tensor = init.normal_(torch.empty(4))
        tensor.sum()
        assert deferred.resized(tensor, (2,)) is None


def test_other_dtypes_and_the_meta_device():
    with DeferredInit():
        half = nn.Linear(64, 64, dtype=torch.bfloat16)
        meta = nn.Linear(64, 64, device='meta')
    assert half.weight.dtype == torch.bfloat16 and 0.1 < half.weight.abs().max() <= 0.125
    assert meta.weight.is_meta


def conv(initialise, *args, **kwargs):
    def make(in_chs, out_chs):
        layer = nn.Conv2d(in_chs, out_chs, 3, *args, **kwargs)
        initialise(layer)
        return layer
    return make


def depthwise(in_chs, out_chs):
    layer = nn.Conv2d(out_chs, out_chs, 3, groups=out_chs)
    _init_weight_goog(layer)
    return layer


def goog_linear(in_chs, out_chs):
    layer = nn.Linear(in_chs, out_chs)
    _init_weight_goog(layer)
    return layer


@pytest.mark.parametrize('make', [
    nn.Linear, goog_linear, depthwise, conv(_init_weight_goog), conv(lambda m: None),
    conv(lambda m: init.kaiming_normal_(m.weight)),
    conv(lambda m: init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')),
    conv(lambda m: init.kaiming_uniform_(m.weight)), conv(lambda m: init.xavier_uniform_(m.weight)),
    conv(lambda m: init.xavier_normal_(m.weight)), conv(lambda m: lecun_normal_(m.weight)),
    conv(lambda m: trunc_normal_(m.weight, std=0.02)), conv(lambda m: init.normal_(m.weight, std=0.01)),
    conv(lambda m: trunc_normal_(m.weight, std=m.weight[0].numel() ** -0.5)),
    lambda in_chs, out_chs: nn.LSTM(in_chs, out_chs),
    lambda in_chs, out_chs: nn.ConvTranspose2d(in_chs, out_chs, 2),
])
def test_a_cut_layer_is_drawn_as_a_plain_one_of_its_shape(make):
    """Fans are all different, dense and cut, so that taking one for another shows."""
    plain = make(40, 300)
    with DeferredInit() as deferred:
        layer = make(200, 500)
        dense = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
        for name, tensor in plain.named_parameters():
            if tensor.shape != dense[name]:
                setattr(layer, name, nn.Parameter(deferred.resized(getattr(layer, name), tensor.shape)))
        deferred.refit(layer, dense)
    for name, tensor in plain.named_parameters():
        got = getattr(layer, name)
        assert got.shape == tensor.shape
        assert scale(got) == pytest.approx(scale(tensor), rel=0.12, abs=1e-12), name
