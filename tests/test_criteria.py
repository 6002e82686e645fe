"""Scores against closed forms in numpy and against torch-pruning on its own graph of the same network."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_epfs
from timm_epfs.core import Member, PruningError, Structure
from timm_epfs.importance import CRITERIA, score


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.drop(x.flatten(1)))


class Attention(nn.Module):
    """Three heads of two dims."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 18)
        self.proj = nn.Linear(6, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 2)).movedim(-3, 0).transpose(-2, -3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)).mean(-2)


def units(n, k=1):
    return np.arange(n * k).reshape(n, k)


CONV_STRUCTURES = (
    Structure('conv1', 'channels', 8, (
        Member('conv1.weight', 0, 'out', units(8)),
        Member('bn1.weight', 0, 'per', units(8)),
        Member('bn1.bias', 0, 'per', units(8)),
        Member('bn1.running_mean', 0, 'per', units(8)),
        Member('bn1.running_var', 0, 'per', units(8)),
        Member('conv2.weight', 1, 'in', units(8)),
    )),
    Structure('conv2', 'channels', 6, (
        Member('conv2.weight', 0, 'out', units(6)),
        Member('bn2.weight', 0, 'per', units(6)),
        Member('bn2.bias', 0, 'per', units(6)),
        Member('fc.weight', 1, 'in', units(6, 16)),
    )),
)
HEADS = Structure('qkv', 'heads', 3, (
    Member('qkv.weight', 0, 'out', np.arange(18).reshape(3, 3, 2).swapaxes(0, 1).reshape(3, 6)),
    Member('qkv.bias', 0, 'per', np.arange(18).reshape(3, 3, 2).swapaxes(0, 1).reshape(3, 6)),
    Member('proj.weight', 1, 'in', units(3, 2)),
))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ConvNet()
    for norm in (net.bn1, net.bn2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.running_mean)
    return net.eval()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)) for n in (4, 3)]


def rows(net, name):
    """Entries that a unit owns, by layer, for the two structures of ConvNet."""
    w = {key: value.numpy().astype(np.float64) for key, value in net.state_dict().items()}
    if name == 'conv1':
        out, into, norm = w['conv1.weight'], w['conv2.weight'].swapaxes(0, 1), w['bn1.weight']
    else:
        out, into, norm = w['conv2.weight'], w['fc.weight'].T, w['bn2.weight']
    return [part.reshape(len(norm), -1) for part in (out, into, norm)]


def closed_form(net, name, criterion):
    out, into, norm = rows(net, name)
    if criterion == 'l1':
        raw = sum(np.abs(w).sum(1) for w in (out, into, norm))
    elif criterion in ('l2', 'lamp'):
        raw = sum((w ** 2).sum(1) for w in (out, into, norm)) / 3
    elif criterion == 'bn_scale':
        raw = np.abs(norm[:, 0])
    elif criterion == 'fpgm':
        raw = sum(np.linalg.norm(w[:, None] ** 2 - w[None] ** 2, axis=-1).sum(1) for w in (out, into))
    if criterion == 'lamp':
        return np.array([value / raw[raw >= value].sum() for value in raw])
    return raw / raw.mean()


@pytest.mark.parametrize('criterion', ['l1', 'l2', 'fpgm', 'bn_scale', 'lamp'])
def test_closed_form(net, criterion):
    scores = score(net, CONV_STRUCTURES, criterion)
    assert list(scores) == ['conv1', 'conv2']
    for name, values in scores.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, closed_form(net, name, criterion), rtol=1e-4)


def groups_of(net):
    graph = tp.DependencyGraph().build_dependency(net, torch.randn(1, 3, 8, 8))
    layers = {'conv1': net.conv1, 'conv2': net.conv2}
    return graph, {
        name: graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        for name, layer in layers.items()}


@pytest.mark.parametrize('criterion, importance', [
    ('l1', tp.importance.GroupMagnitudeImportance(p=1)),
    ('l2', tp.importance.GroupMagnitudeImportance(p=2)),
    ('fpgm', tp.importance.FPGMImportance()),
    ('lamp', tp.importance.LAMPImportance()),
    ('bn_scale', tp.importance.BNScaleImportance()),
])
def test_torch_pruning(net, criterion, importance):
    _, groups = groups_of(net)
    if criterion == 'fpgm':
        del groups['conv2']  # behind the flatten torch-pruning measures column to column, we unit to unit
    scores = score(net, CONV_STRUCTURES, criterion)
    for name, group in groups.items():
        np.testing.assert_allclose(scores[name], importance(group).numpy(), rtol=1e-5)


def test_torch_pruning_taylor(net, data):
    _, groups = groups_of(net)
    for images, targets in data:
        F.cross_entropy(net(images), targets).backward()
    expected = {name: tp.importance.GroupTaylorImportance()(group).numpy() for name, group in groups.items()}
    net.zero_grad()
    scores = score(net, CONV_STRUCTURES, 'taylor', data=data)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-4)


def test_torch_pruning_obdc(net, data):
    """torch-pruning's own hooks, on the empirical Fisher: it draws no labels where it is given a loss."""
    graph, groups = groups_of(net)
    importance = tp.importance.OBDCImportance(num_classes=5)
    pruner = SimpleNamespace(
        DG=graph, ignored_layers=[net.fc], root_module_types=[nn.Conv2d, nn.Linear],
        _downstream_node_as_root_if_attention=lambda group: group)
    importance._prepare_model(net, pruner)
    for images, targets in data:
        F.cross_entropy(net(images), targets).backward()
        importance.step()
    expected = {name: importance(group).numpy() for name, group in groups.items()}
    importance._rm_hooks(net)
    scores = score(net, CONV_STRUCTURES, 'obdc', data=data, loss_fn=F.cross_entropy)
    for name, values in expected.items():
        # It adds 1e-10 to a Fisher averaged over batches, here it is averaged over images: hence atol.
        np.testing.assert_allclose(scores[name], values, rtol=1e-4, atol=1e-6)


def test_obdc_draws_from_the_models_own_predictions(net, data):
    scores = score(net, CONV_STRUCTURES, 'obdc', data=data, seed=3)
    same = score(net, CONV_STRUCTURES, 'obdc', data=[(x, (y + 1) % 5) for x, y in data], seed=3)
    other = score(net, CONV_STRUCTURES, 'obdc', data=data, seed=4)
    np.testing.assert_array_equal(scores['conv1'], same['conv1'])
    assert np.abs(scores['conv1'] - other['conv1']).max() > 1e-3


def test_heads():
    model = Attention()
    qkv, proj = model.qkv.weight.detach().double().numpy(), model.proj.weight.detach().double().numpy()
    # qkv rows are (q, k, v) by head by dim; proj columns are head by dim.
    raw = (qkv.reshape(3, 3, -1) ** 2).sum((0, 2)) + (proj.reshape(8, 3, 2) ** 2).sum((0, 2))
    np.testing.assert_allclose(score(model, [HEADS])['qkv'], raw / raw.mean(), rtol=1e-5)


@pytest.mark.parametrize('criterion', ['taylor', 'obdc'])
def test_silent_head_is_worth_nothing(criterion):
    """A head whose output columns are zero gets no gradient through its values, queries and keys."""
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.proj.weight[:, 2:4] = 0
    batch = torch.randn(4, 5, 8), torch.randint(8, (4,))
    values = score(model, [HEADS], criterion, data=[batch])['qkv']
    assert values[1] < 1e-6 and values[0] > 0.1 and values[2] > 0.1


def test_layer_norm_counts():
    model = Attention()
    nn.init.normal_(model.norm.weight)
    stream = Structure('stream', 'channels', 8, (
        Member('norm.weight', 0, 'per', units(8)), Member('qkv.weight', 1, 'in', units(8))))
    raw = model.norm.weight.detach().square() + model.qkv.weight.detach().square().sum(0)
    np.testing.assert_allclose(score(model, [stream])['stream'], (raw / raw.mean()).numpy(), rtol=1e-5)


def test_grouped_and_transposed_convolutions():
    """Dim 1 of both belongs to positions inside a group: in channels of one, out channels of the other."""
    model = nn.ModuleDict({
        'grouped': nn.Conv2d(8, 12, 3, groups=4),
        'up': nn.ConvTranspose2d(6, 5, 2),
        'depthwise': nn.Conv2d(5, 5, 3, groups=5),
    })
    into = Structure('in', 'channels', 2, (Member('grouped.weight', 1, 'in', units(2)),))
    out = Structure('out', 'channels', 5, (
        Member('up.weight', 1, 'out', units(5)), Member('depthwise.weight', 0, 'out', units(5))))
    scores = score(model, [into, out])
    for name, raw in (
            ('in', model['grouped'].weight.detach().square().sum((0, 2, 3))),
            ('out', model['up'].weight.detach().square().sum((0, 2, 3))),  # depthwise isn't scored, as in torch-pruning
    ):
        np.testing.assert_allclose(scores[name], (raw / raw.mean()).numpy(), rtol=1e-5)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_structure_of_raw_parameters_has_scores(criterion):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.gamma = nn.Parameter(torch.tensor([1., -3., 2., 0.5]))

        def forward(self, x):
            return self.norm(x) * self.gamma

    structures = [
        Structure('gamma', 'channels', 4, (Member('gamma', 0, 'per', units(4)),)),
        Structure('norm', 'channels', 4, (Member('norm.weight', 0, 'per', units(4)),)),
    ]
    data = [(torch.randn(6, 4), torch.randint(4, (6,)))]
    values = score(Scaled(), structures, criterion, data=data)['gamma']
    assert values.shape == (4,) and np.isfinite(values).all()
    if criterion == 'l1':
        np.testing.assert_allclose(values, np.array([1, 3, 2, 0.5]) / 1.625, rtol=1e-6)
    if criterion == 'bn_scale':  # by l2
        np.testing.assert_allclose(values, np.array([1, 9, 4, 0.25]) / 3.5625, rtol=1e-6)


@pytest.mark.parametrize('criterion', [name for name in CRITERIA if name not in ('random', 'uniform')])
def test_all_zero_structure_scores_zero(net, data, criterion):
    with torch.no_grad():
        for tensor in (net.conv1.weight, net.bn1.weight, net.conv2.weight):
            tensor.zero_()
    scores = score(net, CONV_STRUCTURES, criterion, data=data)
    np.testing.assert_array_equal(scores['conv1'], np.zeros(8))
    assert np.isfinite(scores['conv2']).all()


def test_uniform_cuts_every_layer_alike_and_keeps_its_first_units():
    slim = timm_epfs.prune('test_resnet', macs=0.5, criterion='uniform')
    rounding = {16: 2, 32: 4, 48: 4, 96: 16, 192: 16}  # no width is further than this from the share of all
    least, most = [], []
    for cut in (cut for cut in slim.pruning_plan.cuts if cut.structure.kind == 'channels'):
        np.testing.assert_array_equal(cut.keep, np.arange(len(cut.keep)))
        left, units = len(cut.keep), cut.structure.units
        least.append((left - rounding[units]) / units)
        most.append((left + rounding[units]) / units)
    assert max(least) <= min(most) and len(least) > 3


def test_random():
    many = [Structure(name, 'channels', 5, ()) for name in 'abc']
    scores = score(nn.Identity(), many, 'random', seed=1)
    alone = score(nn.Identity(), many[2:], 'random', seed=1)
    other = score(nn.Identity(), many, 'random', seed=-2)
    np.testing.assert_array_equal(scores['c'], alone['c'])
    assert len({tuple(values) for values in (*scores.values(), *other.values())}) == 6
    assert all(0 <= value < 1 for values in scores.values() for value in values)


def test_frozen_layers_are_scored_like_the_others(net, data):
    free = score(net, CONV_STRUCTURES, 'taylor', data=data)
    net.requires_grad_(False)
    with torch.no_grad():
        frozen = score(net, CONV_STRUCTURES, 'taylor', data=data)
    np.testing.assert_array_equal(frozen['conv1'], free['conv1'])


def test_half_precision_weights(net):
    with torch.no_grad():
        net.fc.weight.mul_(1000)  # sums of squares beyond the range of float16
    full = score(net, CONV_STRUCTURES, 'l2')
    half = score(net.half(), CONV_STRUCTURES, 'l2')
    np.testing.assert_allclose(half['conv2'], full['conv2'], rtol=1e-2)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_model_and_random_state_are_untouched(net, data, criterion):
    net.train()
    net.bn1.eval()
    net.conv2.weight.requires_grad = False
    net.conv1.weight.grad = grad = torch.ones_like(net.conv1.weight)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    frozen = [parameter.requires_grad for parameter in net.parameters()]
    parameters = list(net.parameters())
    images, targets = (torch.cat(parts) for parts in zip(*data))
    loader = DataLoader(TensorDataset(images, targets), batch_size=4, shuffle=True)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    score(net, CONV_STRUCTURES, criterion, data=loader)

    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == frozen
    assert all(now is then for now, then in zip(net.parameters(), parameters))
    assert net.conv1.weight.grad is grad and bool((grad == 1).all())
    assert all(parameter.grad is None for parameter in net.parameters() if parameter is not net.conv1.weight)
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
    assert not any(getattr(module, hook) for module in net.modules() for hook in hooks)


def test_modes_are_restored_after_an_error(net, data):
    net.train()
    with pytest.raises(PruningError, match='ZeroDivisionError'):
        score(net, CONV_STRUCTURES, 'taylor', data=data, loss_fn=lambda outputs, targets: 1 / 0)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize('criterion, kwargs, message', [
    ('taylr', {}, "nearest is 'taylor'.*l1, l2, fpgm, bn_scale, lamp, random, uniform, taylor, obdc"),
    ('taylor', {}, 'give data='),
    ('obdc', {'data': []}, 'no batch'),
    ('taylor', {'data': [torch.zeros(2, 3, 8, 8)]}, 'found a float32 tensor'),
])
def test_errors(net, criterion, kwargs, message):
    with pytest.raises(PruningError, match=message) as info:
        score(net, CONV_STRUCTURES, criterion, **kwargs)
    assert '\n' not in str(info.value)


@pytest.mark.parametrize('member', [
    Member('nowhere.weight', 0, 'out', units(4)),
    Member('conv1.bias', 0, 'per', units(4)),  # there, but None
    Member('conv1.weight', 1, 'in', units(4)),  # three entries
    Member('bn1.weight', 1, 'per', units(4)),
])
def test_structures_of_another_model(net, member):
    with pytest.raises(PruningError, match='model that the structures were found on'):
        score(net, [Structure('s', 'channels', 4, (member,))])


def test_bn_scale_needs_a_batch_norm_somewhere():
    with pytest.raises(PruningError, match='no BatchNorm'):
        score(Attention(), [HEADS], 'bn_scale')


def test_structure_without_parameters(net):
    structure = Structure('s', 'channels', 8, (Member('bn1.running_mean', 0, 'per', units(8)),))
    with pytest.raises(PruningError, match='no parameter'):
        score(net, [structure])


def test_meta_weights(net):
    net = net.to('meta')
    with pytest.raises(PruningError, match='meta device'):
        score(net, CONV_STRUCTURES)
    assert score(net, CONV_STRUCTURES, 'random')['conv2'].shape == (6,)
