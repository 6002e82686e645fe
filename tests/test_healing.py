"""Healing: cut models that learn to give their dense model's outputs, and what leaves them as they were."""
import copy
import os
import socket

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import forkserver, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import timm_epfs
from timm_epfs.activations import divergence
from timm_epfs.core import PruningError
from timm_epfs.plan import make_plan
from timm_epfs.trace import trace


def images(count, generator=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(generator))


@pytest.fixture(scope='module')
def dense():
    torch.manual_seed(0)
    return randomise(timm.create_model('resnet20_cifar')).eval()


@pytest.fixture(scope='module')
def cut(dense):
    return timm_epfs.prune(dense, macs=0.8).eval()


def test_outputs_come_nearer_to_the_dense_model(dense, cut):
    slim = copy.deepcopy(cut)
    slim.bn1.requires_grad_(False)
    slim.bn1.bias.grad = torch.ones(16)
    slim.layer3.train()
    state, fresh = torch.get_rng_state(), images(32, 1)
    assert timm_epfs.heal(slim, dense, images(64), steps=20) is slim
    assert torch.get_rng_state().equal(state)
    assert slim.layer3.training and not slim.layer2.training
    changed = {name for name, tensor in slim.state_dict().items() if not tensor.equal(cut.state_dict()[name])}
    assert changed == {n for n, p in cut.named_parameters() if p.ndim == 1 and not n.startswith('bn1')}
    assert [name for name, p in slim.named_parameters() if not p.requires_grad] == ['bn1.weight', 'bn1.bias']
    assert [name for name, p in slim.named_parameters() if p.grad is not None] == ['bn1.bias']
    assert slim.pruning_plan.recipe['healed'] == {'steps': 20, 'images': 64}
    assert 'healed' not in cut.pruning_plan.recipe
    with torch.no_grad():
        before, after = (divergence([model.eval()(fresh)], [dense(fresh)]) for model in (cut, slim))
    assert after < 0.95 * before
    again = copy.deepcopy(cut)
    again.bn1.requires_grad_(False)
    timm_epfs.heal(again, dense, images(64).split(20), steps=20)
    for name, parameter in slim.named_parameters():
        assert parameter.equal(again.get_parameter(name))


@pytest.mark.parametrize('steps', range(1, 4))
def test_any_number_of_steps_will_do(dense, cut, steps):
    slim = timm_epfs.heal(copy.deepcopy(cut), dense, images(16), steps=steps)
    assert slim.pruning_plan.recipe['healed']['steps'] == steps


def test_features_are_matched_as_they_are():
    torch.manual_seed(0)
    dense = randomise(timm.create_model('resnet20_cifar', num_classes=0)).eval()
    slim = timm_epfs.prune(dense, macs=0.7).eval()
    fresh = images(32, 1)

    def error():
        with torch.no_grad():
            return divergence([slim(fresh)], [dense(fresh)], may_be_logits=False)

    before = error()
    timm_epfs.heal(slim, dense, images(64), steps=20)
    assert error() < before


def test_what_gets_no_better_stays(dense):
    traced = trace(dense, (torch.randn(1, 3, 32, 32),))
    same = copy.deepcopy(dense)
    same.pruning_plan = make_plan(traced, {s.name: np.arange(s.units) for s in traced.structures}, {})
    before = copy.deepcopy(same.state_dict())
    with pytest.warns(UserWarning, match='heal: outputs .* stays as it was; give more images'):
        timm_epfs.heal(same, dense, images(16), steps=2)
    assert all(tensor.equal(before[name]) for name, tensor in same.state_dict().items())
    assert 'healed' not in same.pruning_plan.recipe


@pytest.mark.parametrize('make, shape', [
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)), (3, 8, 10)),
    (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), (6,)),
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 1)), (3, 12)),
], ids=['map', 'one number', 'signal'])
def test_outputs_that_are_no_logits_are_matched(make, shape):
    torch.manual_seed(0)
    dense = make().eval()
    data = torch.randn(40, *shape)
    with torch.inference_mode():  # from which autograd couldn't go on
        slim = timm_epfs.prune(dense, params=0.6, example_input=data[:1]).eval()
        data = data + 0
        timm_epfs.heal(slim, dense, data, steps=30)
    assert slim.pruning_plan.recipe['healed']['images'] == 40


def test_errors_leave_the_model_as_it_was(dense, cut):
    slim = copy.deepcopy(cut)
    before = copy.deepcopy(slim.state_dict())
    wide = timm.create_model('resnet20_cifar', num_classes=7)
    sizes = [images(3), torch.randn(3, 3, 40, 40)]
    for teacher, data, options, message in (
            (dense, [], {}, 'found no images; give at least one batch'),
            (dense, images(4)[:, :1], {}, "the model can't be healed: RuntimeError"),
            (dense, sizes, {}, r'needs images of one size, found \(3, 32, 32\) and \(3, 40, 40\); resize them'),
            (wide, images(4), {}, "not the plan's base"),
            (dense, images(4), {'steps': 0}, 'steps=0 was given; give a whole number of at least 1'),
            (dense, images(4), {'steps': True}, 'steps=True was given'),
            (dense, images(4), {'steps': 2.5}, 'steps=2.5 was given'),
    ):
        with pytest.raises(PruningError, match=message):
            timm_epfs.heal(slim, teacher, data, **options)
    with pytest.raises(PruningError, match='no pruning_plan'):
        timm_epfs.heal(wide, dense, images(4))
    with pytest.raises(PruningError, match='has none that may be trained; unfreeze them'):
        timm_epfs.heal(copy.deepcopy(cut).requires_grad_(False), dense, images(4))
    with pytest.raises(PruningError, match='trains in single precision, the model has torch.bfloat16'):
        timm_epfs.heal(copy.deepcopy(cut).bfloat16(), dense, images(4))
    for name, tensor in slim.state_dict().items():
        assert tensor.equal(before[name])


def test_outputs_that_are_not_finite_are_said(dense, cut):
    slim, teacher = copy.deepcopy(cut), copy.deepcopy(dense)
    with torch.no_grad():
        teacher.fc.bias[0] = float('nan')
    before = copy.deepcopy(slim.state_dict())
    with pytest.raises(PruningError, match='dense model aren.t finite'):
        timm_epfs.heal(slim, teacher, images(16))
    assert all(tensor.equal(before[name]) for name, tensor in slim.state_dict().items())
    assert all(p.grad is None for p in slim.parameters())


def test_a_pruner_heals_what_it_cuts(dense):
    pruner = timm_epfs.Pruner(dense, data=images(64))
    slim = pruner(macs=0.6, criterion='l2', compensate=False, heal=10)
    assert slim.pruning_plan.recipe['healed'] == {'steps': 10, 'images': 64}
    expected = pruner(macs=0.6, criterion='l2', compensate=False)
    timm_epfs.heal(expected, dense, images(64), steps=10)
    for name, tensor in slim.state_dict().items():
        assert tensor.equal(expected.state_dict()[name])
    for heal, message in (
            (5, 'heal=5 needs images, found none; give data='), (-1, 'heal=-1 was given; give a whole number'),
            (True, 'heal=True was given'), (2.5, 'heal=2.5 was given')):
        with pytest.raises(PruningError, match=message):
            timm_epfs.prune(dense, macs=0.7, heal=heal)


def run(path, rank, world):
    torch.manual_seed(0)
    model = randomise(timm.create_model('resnet20_cifar')).eval()
    slim = timm_epfs.prune(model, macs=0.6)
    timm_epfs.heal(slim, model, images(48)[rank::world], steps=5)
    save_file(slim.state_dict(), f'{path}/{rank}of{world}.safetensors')


def worker(rank, path, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    run(path, rank, 2)
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    forkserver()
    mp.start_processes(worker, (str(tmp_path), port), nprocs=2, start_method='forkserver')
    first, second = (load_file(tmp_path / f'{rank}of2.safetensors') for rank in (0, 1))
    for name, tensor in first.items():
        assert tensor.equal(second[name])
