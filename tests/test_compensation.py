"""Cut models that make up for what went: against closed forms, exact recovery, and what is left alone."""
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
from timm_epfs.activations import lockstep, places_to_join
from timm_epfs.core import PruningError
from timm_epfs.plan import make_plan
from timm_epfs.surgery import compensation, cut_copy, reconstruction
from timm_epfs.trace import trace


def cut(model, keep, example):
    """Cut a copy of a model to the units of ``keep``; structures that it doesn't name keep all."""
    traced = trace(model, (example,))
    units = {s.name: keep.get(s.name, np.arange(s.units)) for s in traced.structures}
    assert set(keep) <= set(units), list(units)
    slim = cut_copy(model, make_plan(traced, units, {}))
    slim.pruning_plan = make_plan(traced, units, {})
    return slim.eval()


class Pair(nn.Module):
    """A layer whose second half of outputs are linear combinations of the first, and one that reads them.

    A constant in them becomes a bias. In a transposed convolution it can't: each output position reads other taps.
    """

    def __init__(self, first, second, dim, constant=1.0):
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            half = first.weight.shape[dim] // 2
            mix = torch.randn(half, half) / half ** 0.5
            weight = first.weight.transpose(0, dim)
            weight[half:] = torch.einsum('oi,i...->o...', mix, weight[:half])
            first.bias[half:] = mix @ first.bias[:half] + constant

    def forward(self, x):
        return self.second(self.first(x))


PAIRS = {
    'linear': (lambda: Pair(nn.Linear(5, 8), nn.Linear(8, 4), 0), (5,)),
    'linear of tokens': (lambda: Pair(nn.Linear(5, 8), nn.Linear(8, 4), 0), (6, 5)),
    'conv1d': (lambda: Pair(nn.Conv1d(5, 8, 3), nn.Conv1d(8, 4, 3, stride=2), 0), (5, 12)),
    'conv2d': (lambda: Pair(nn.Conv2d(5, 8, 3), nn.Conv2d(8, 4, 3, dilation=2), 0), (5, 9, 9)),
    'conv3d': (lambda: Pair(nn.Conv3d(3, 4, 2), nn.Conv3d(4, 4, 2), 0), (3, 5, 5, 5)),
    'transposed': (lambda: Pair(nn.Conv2d(5, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2), 0, 0.0), (5, 7, 7)),
    'after a transposed': (lambda: Pair(nn.ConvTranspose2d(5, 8, 2, stride=2), nn.Conv2d(8, 4, 3), 1), (5, 5, 5)),
}


@pytest.mark.parametrize('make, shape', PAIRS.values(), ids=PAIRS)
def test_what_the_rest_can_say_is_recovered(make, shape):
    torch.manual_seed(0)
    dense = make().eval()
    images = torch.randn(96, *shape)
    units = 8 if dense.first.weight.shape[0] != 4 else 4
    slim = cut(dense, {'first': np.arange(units // 2)}, images[:1])
    assert timm_epfs.compensate(slim, dense, images) is slim
    fresh = torch.randn(16, *shape)
    expected = dense(fresh)
    assert (slim(fresh) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert slim.pruning_plan.recipe['compensated'] == {'images': 96}


def test_the_least_squares_of_numpy():
    """Where the rest can't say all, a linear layer's weights are those of ridge regression on all rows."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images = torch.randn(400, 6)
    slim = cut(dense, {'0': np.array([0, 2, 3, 5, 7])}, images[:1])
    before = slim[2].weight.detach().double().numpy().T
    timm_epfs.compensate(slim, dense, images)
    with torch.no_grad():
        x = slim[1](slim[0](images)).double().numpy()
        y = dense(images).double().numpy()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    residual = y - y.mean(0) - centred @ before
    solutions = [
        before + np.linalg.solve(gram + 10.0 ** p * np.diag(gram).mean() * np.eye(5), centred.T @ residual)
        for p in range(-9, 2)
    ]
    after = slim[2].weight.detach().numpy().T
    best = min(solutions, key=lambda w: np.abs(w - after).max())
    np.testing.assert_allclose(after, best, atol=1e-4)
    np.testing.assert_allclose(slim[2].bias.detach().numpy(), y.mean(0) - x.mean(0) @ best, atol=1e-4)


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    return randomise(timm.create_model('resnet20_cifar')).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def twins(model):
    """Make each second unit of conv1 of each block a copy of the one before it."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(('.conv1', '.bn1')):
                for tensor in (*module.parameters(), *module.buffers()):
                    if tensor.ndim:
                        tensor[1::2] = tensor[::2]
    return model


def test_a_network_of_twins_is_recovered(resnet, images):
    dense = twins(copy.deepcopy(resnet))
    keep = {
        name: np.arange(0, module.out_channels, 2) for name, module in dense.named_modules() if name.endswith('.conv1')}
    slim = cut(dense, keep, images[:1])
    fresh = torch.randn(16, 3, 32, 32)
    expected = dense(fresh)
    assert (slim(fresh) - expected).abs().max() > 0.1 * expected.abs().max()
    timm_epfs.compensate(slim, dense, images)
    assert (slim(fresh) - expected).abs().max() < 1e-4 * expected.abs().max()


def error(model, dense, images):
    with torch.no_grad():
        return float((model(images) - dense(images)).square().mean())


@pytest.mark.filterwarnings('ignore:compensate. layers with more inputs')
@pytest.mark.parametrize('name, size', [
    ('resnet20_cifar', 32), ('test_vit', 96), ('test_convnext', 96), ('test_efficientnet', 96), ('regnety_002', 64),
])
def test_networks_come_nearer_to_the_dense_one(name, size):
    torch.manual_seed(0)
    dense = randomise(timm.create_model(name)).eval()
    pixels = torch.randn(96, 3, size, size)
    slim = timm_epfs.prune(dense, macs=0.7)
    fresh = torch.randn(32, 3, size, size)
    before = error(slim, dense, fresh)
    timm_epfs.compensate(slim, dense, pixels)
    assert error(slim, dense, fresh) < 0.9 * before


def test_nothing_cut_nothing_changed(resnet, images):
    slim = cut(resnet, {}, images[:1])
    timm_epfs.compensate(slim, resnet, images)
    for name, tensor in slim.state_dict().items():
        assert tensor.equal(resnet.state_dict()[name]), name


def test_batches_do_not_matter_and_runs_agree(resnet, images):
    slims = [timm_epfs.prune(resnet, macs=0.6) for _ in range(3)]
    for slim, data in zip(slims, (images, images, [(part, None) for part in images.split(5)])):
        timm_epfs.compensate(slim, resnet, data)
    first, again, split = (slim.state_dict() for slim in slims)
    for name, tensor in first.items():
        assert again[name].equal(tensor)
        torch.testing.assert_close(split[name], tensor, rtol=1e-3, atol=1e-4)


def test_what_follows_a_removed_block_makes_up_for_it(resnet, images):
    traced = trace(resnet, (images[:1],))
    block = next(s for s in traced.structures if s.kind == 'blocks' and s.name.startswith('layer2'))
    slim = cut(resnet, {block.name: np.arange(0)}, images[:1])
    timm_epfs.compensate(slim, resnet, images)
    changed = {name for name, tensor in slim.state_dict().items() if not tensor.equal(resnet.state_dict()[name])}
    assert {'layer2.2.conv1.weight', 'layer3.0.conv1.weight'} <= changed
    assert not any(name.startswith(('conv1', 'layer1')) for name in changed)


def test_modes_and_the_dense_model_stay(resnet, images):
    dense = copy.deepcopy(resnet)
    slim = timm_epfs.prune(dense, macs=0.6).train()
    slim.bn1.eval()
    timm_epfs.compensate(slim, dense, images)
    assert slim.training and not slim.bn1.training and slim.layer1.training
    for name, tensor in dense.state_dict().items():
        assert tensor.equal(resnet.state_dict()[name])
    assert not dense.training


def test_half_precision(resnet, images):
    dense = copy.deepcopy(resnet).bfloat16()
    slim = timm_epfs.prune(dense, macs=0.6)
    before = error(slim, dense, images.bfloat16())
    timm_epfs.compensate(slim, dense, images)
    assert slim.conv1.weight.dtype == torch.bfloat16
    assert error(slim, dense, images.bfloat16()) < 0.8 * before


def test_a_layer_in_two_places_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.middle(self.middle(self.first(x)))
            return self.last(x)

    torch.manual_seed(0)
    dense, rows = Twice().eval(), torch.randn(64, 6)
    slim = cut(dense, {'first': np.arange(5)}, rows[:1])
    before = slim.middle.weight.clone()
    timm_epfs.compensate(slim, dense, rows)
    assert slim.middle.weight.equal(before)


def test_few_images_are_said(resnet):
    slim = timm_epfs.prune('test_vit', macs=0.7)
    dense = timm.create_model('test_vit')
    with pytest.warns(UserWarning, match='layers with more inputs than there are rows.*give more images'):
        timm_epfs.compensate(slim, dense, torch.randn(2, 3, 160, 160))


class Forking(nn.Module):
    """Goes another way for images that are dark on average."""

    def __init__(self):
        super().__init__()
        self.first, self.dark, self.light = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.dark(x) if x.device.type == 'cpu' and x.mean() < 0 else self.light(x)


def test_images_that_join_late_count(resnet, images, monkeypatch):
    """Layers are solved from the images that are there: so a network of twins is recovered whenever they come."""
    dense = twins(copy.deepcopy(resnet))
    keep = {
        name: np.arange(0, module.out_channels, 2) for name, module in dense.named_modules() if name.endswith('.conv1')}
    slim = cut(dense, keep, images[:1])
    monkeypatch.setattr(compensation, 'BATCH', 8)
    monkeypatch.setattr(lockstep, 'HELD', 8_000_000)
    monkeypatch.setattr(lockstep, 'FEWEST', 8)
    places = []

    def note(*args):
        places.extend(places_to_join(*args))
        return places

    monkeypatch.setattr(reconstruction, 'places_to_join', note)
    timm_epfs.compensate(slim, dense, images)
    assert places[0] == 0 and len(places) == 8 and len(set(places)) > 2
    assert slim.pruning_plan.recipe['compensated'] == {'images': 64}
    fresh = torch.randn(16, 3, 32, 32)
    expected = dense(fresh)
    assert (slim(fresh) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_errors_leave_the_model_as_it_was(resnet, images):
    slim = timm_epfs.prune(resnet, macs=0.6)
    before = copy.deepcopy(slim.state_dict())
    other = timm.create_model('resnet32_cifar')
    wide = timm.create_model('resnet20_cifar', num_classes=7)
    for dense, data, message in (
            (resnet, [], 'found no images; give at least one batch'),
            (resnet, images[:, :1], r"can't run images of shape \(1, 32, 32\)"),
            (resnet, [{'image': images}], 'keys image; give tensors'),
            (wide, images, r"not the plan's base.*fc.bias would be cut to \(7,\), the model has \(10,\)"),
            (slim, images, "not the plan's base.*give the dense model that was cut"),
    ):
        with pytest.raises(PruningError, match=message):
            timm_epfs.compensate(slim, dense, data)
    with pytest.raises(PruningError, match='no pruning_plan, so it wasn\'t cut by timm_epfs'):
        timm_epfs.compensate(other, resnet, images)
    for name, tensor in slim.state_dict().items():
        assert tensor.equal(before[name])
    assert 'compensated' not in slim.pruning_plan.recipe


def test_other_ways_are_said(monkeypatch):
    monkeypatch.setattr(compensation, 'BATCH', 20)
    torch.manual_seed(0)
    dense = Forking().eval()
    slim = cut(dense, {'first': np.arange(5)}, torch.ones(1, 6))
    shift = dense.first(torch.zeros(1, 6)).mean()
    lights = [torch.linalg.pinv(dense.first.weight).sum(1)[None] * sign for sign in (4 - shift.item(), -4.0)]
    before = slim.light.weight.clone()
    with pytest.raises(PruningError, match='takes another way'):
        timm_epfs.compensate(slim, dense, [light.repeat(20, 1) for light in lights])
    assert slim.light.weight.equal(before)


def run(path, rank, world):
    torch.manual_seed(0)
    dense = randomise(timm.create_model('resnet20_cifar')).eval()
    pixels = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    slim = timm_epfs.prune(dense, macs=0.6)
    timm_epfs.compensate(slim, dense, pixels[rank::world])
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
