"""The trace, piece by piece: labels and groups against brute force, each group of rules on a module made for it."""
import copy
import doctest
import importlib
import math
import pkgutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Dict

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import distance, drop, flat, masked, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import RmsNorm, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.prune import random_unstructured
from torchvision.ops import DeformConv2d, nms, roi_align

import timm_epfs
import timm_epfs.trace
from timm_epfs.core import PruningError
from timm_epfs.plan import Plan, make_plan
from timm_epfs.pruner import trace_model
from timm_epfs.surgery import apply_plan
from timm_epfs.trace import rule
from timm_epfs.trace.grouping import group_units
from timm_epfs.trace.labels import Labels
from timm_epfs.trace.rules import RULES

# -- labels ---------------------------------------------------------------------------------------------------------

LENGTH = 4
pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, LENGTH - 1)), max_size=6)
pinned = st.lists(st.tuples(st.integers(0, 5), st.integers(0, LENGTH - 1)), max_size=2)
seeds = st.integers(0, 2 ** 16)


def brute_force(nodes: int, ties, pins):
    """Smallest node of its unit and pinned, by node: every tie merges two sets, one after the other."""
    sets = [{i} for i in range(nodes)]
    for a, b in ties:
        if sets[a] is not sets[b]:
            sets[a] |= sets[b]
            for i in sets[b]:
                sets[i] = sets[a]
    return [min(s) for s in sets], [bool(s & {0, *pins}) for s in sets]


@settings(derandomize=True, deadline=None)
@given(pairs=pairs, pinned=pinned)
def test_ties_and_pins_are_what_brute_force_finds(pairs, pinned):
    labels = Labels()
    known = [labels.fresh(LENGTH) for _ in range(6)]
    ties, pins = [], []
    for a, b, shift in pairs:
        other = np.roll(known[b], shift)
        labels.tie(known[a], other)
        ties += zip(known[a].tolist(), other.tolist())
    for a, i in pinned:
        labels.pin(known[a][i:i + 1])
        pins.append(int(known[a][i]))
    solution = labels.solve()
    unit, is_pinned = brute_force(labels.size, ties, pins)
    assert solution.unit.tolist() == unit
    assert solution.pinned.tolist() == is_pinned


def test_a_label_tied_to_none_is_pinned():
    labels = Labels()
    a, b = labels.fresh(3), labels.fresh(3)
    assert labels.tie(a, None) is None
    solution = labels.solve()
    assert solution.pinned[a].all() and not solution.pinned[b].any()


def left(solution, label: np.ndarray, gone: np.ndarray) -> np.ndarray:
    return ~np.isin(solution.unit[label], gone)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(pairs=pairs, pinned=pinned, seed=seeds)
def test_what_is_left_of_a_reshaped_dim_is_a_box(pairs, pinned, seed):
    """Whatever units go: a reshape of the entries that stay has the lengths of the axes that stay."""
    labels = Labels()
    known = [labels.fresh(LENGTH) for _ in range(4)]
    whole = labels.fresh(2 * LENGTH)
    split = labels.split(whole.reshape(2, LENGTH))
    known.append(split[1])
    known.append(labels.fresh(LENGTH))
    merged = labels.merge(known[:2])
    boxes = [(whole.reshape(2, LENGTH), split), (merged, known[:2])]
    for a, b, shift in pairs:
        labels.tie(known[a], np.roll(known[b], shift))
    for a, i in pinned:
        labels.pin(known[a][i:i + 1])
    solution = labels.solve()
    free = np.unique(solution.unit[~solution.pinned])
    gone = np.random.default_rng(seed).permutation(free)[:len(free) // 2]
    for entries, (rows, columns) in boxes:
        box = left(solution, rows, gone)[:, None] & left(solution, columns, gone)[None]
        np.testing.assert_array_equal(left(solution, entries, gone), box)


@settings(derandomize=True, deadline=None)
@given(pairs=pairs, seed=seeds)
def test_tied_counts_stay_equal(pairs, seed):
    labels = Labels()
    known = [labels.fresh(LENGTH) for _ in range(6)]
    for a, b, shift in pairs:
        labels.tie(known[a], np.roll(known[b], shift))
    a, b = np.concatenate(known[:2]), np.concatenate(known[2:4])
    labels.tie_counts(a, b)
    solution = labels.solve()
    gone = np.random.default_rng(seed).permutation(np.unique(solution.unit[~solution.pinned]))[:3]
    assert left(solution, a, gone).sum() == left(solution, b, gone).sum()


def test_a_split_prefers_the_longer_axis_and_attention_its_heads():
    labels = Labels()
    entries = labels.fresh(8).reshape(2, 4)
    heads, inner = labels.split(entries)
    solution = labels.solve()
    assert solution.pinned[heads].all() and not solution.pinned[inner].any()
    labels.mark_heads(heads)
    solution = labels.solve()
    assert solution.pinned[inner].all() and not solution.pinned[heads].any()
    assert {solution.kinds[int(solution.unit[node])] for node in heads} == {'heads'}


# -- groups ---------------------------------------------------------------------------------------------------------

dims = st.lists(st.lists(st.integers(-1, 7), max_size=12).map(np.array), max_size=4)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(dims=dims, others=dims)
def test_groups_are_the_units_with_equal_counts_in_each_dim(dims, others):
    dims, others = ([dim.astype(np.int64) for dim in some] for some in (dims, others))
    order = list(dict.fromkeys(unit for dim in dims for unit in dim.tolist() if unit >= 0))
    counts = [Counter(dim.tolist()) for dim in (*dims, *others)]
    groups = defaultdict(list)
    for unit in order:
        groups[tuple(count[unit] for count in counts)].append(unit)
    expected = [group for group in groups.values() if len(group) > 1]
    assert [group.tolist() for group in group_units(dims, others, 8)] == expected


# -- rules ----------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    """Layers and a function that uses them."""

    def __init__(self, fn, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.fn = fn

    def forward(self, x):
        return self.fn(self, x)


def conv(n: int, m: int, kernel: int = 1, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n, m, kernel, padding=kernel // 2, **kwargs)


def traced_and_exact(module: nn.Module, image: torch.Tensor):
    """Trace a module, and check masked against cut for whatever is said to be exact, two shares of it."""
    torch.manual_seed(0)
    module = randomise(module).eval()
    traced = trace_model(module, image[:1])
    for share in (0.3, 0.6) if any(s.exact for s in traced.structures) else ():
        keep = drop(traced.structures, share)
        cut = apply_plan(copy.deepcopy(module), make_plan(traced, keep, {}))
        with torch.no_grad():
            zeroed = flat(masked(module, traced.structures, keep)(image))
            assert distance(flat(module(image)), zeroed) > 1e-3
            assert distance(zeroed, flat(cut(image))) < 1e-5
    return traced


def found(traced) -> Dict[str, int]:
    return {s.name: s.units if s.exact else -s.units for s in traced.structures if s.kind != 'blocks'}


def compared(m, x):
    ids = torch.arange(5, device='cpu')
    assert m.pad in ids and (m.pad == ids).sum() == 1 and (m.pad != ids).sum() == 4
    assert (np.arange(3) == m.pad).sum() == 1
    return m.b(m.a(x).relu())


def attention(net, x):
    b, n, c = x.shape
    q, k, v = net.qkv(x).reshape(b, n, 3, net.heads, net.width).permute(2, 0, 3, 1, 4).unbind(0)
    out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return net.proj(out.transpose(1, 2).reshape(b, n, net.heads * net.width))


def folded(net, x):
    b, n, _ = x.shape
    y = net.a(x).view(b, n, net.heads, net.width).transpose(1, 2).reshape(b * net.heads, n, net.width)
    y = net.c(y.transpose(1, 2)).transpose(1, 2).reshape(b, net.heads, n, net.width)
    return net.b(y.transpose(1, 2).reshape(b, n, net.heads * net.width))


def assigned(net, x):
    y = net.a(x).transpose(0, 1)
    out = torch.zeros_like(y)
    out[:, [0]] = y[:, :1]
    z = torch.zeros(2, y.shape[0], device=x.device)
    z[[0, 1]] = y.mean((2, 3)).t()[:1]
    return net.b(out.transpose(0, 1) + z[:1, :, None, None])


def detected(net, x):
    y = net.a(x).relu()
    corners = net.o(y)[0].flatten(1).t().sigmoid() * 4
    boxes = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:] + 1], 1)
    boxes = boxes[nms(boxes, net.s(y)[0].flatten(), 0.3)]
    boxes = boxes[torch.where(boxes[:, 0] > 0.5)[0]]
    return net.b(net.f(roi_align(y[:1], [boxes], 2).flatten(1)).relu()).mean(0)


def computed(layer):
    """A layer whose weight hooks compute, as it is after a forward without gradients: it can be copied."""
    layer.weight = layer.weight.detach()
    return layer


def repeated(function, times, x):
    for _ in range(times):
        x = function(x)
    return x


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 12)
# what it is: the module, its input, and the units found by structure, negative where cutting isn't exact
RULE_ROWS = {
    'flatten': (
        Net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=conv(3, 8, 3), b=nn.Linear(8 * 64, 5)), IMAGE, {'a': 8}),
    'permute': (
        Net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)), a=conv(3, 8), b=nn.Linear(8, 5)), IMAGE, {'a': 8}),
    'concatenation': (
        Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 6), b=conv(3, 4), c=conv(10, 5)),
        IMAGE, {'a': 6, 'b': 4}),
    'chunks that are multiplied': (
        Net(lambda m, x: m.b(torch.mul(*m.a(x).chunk(2, 1))), a=conv(3, 12), b=conv(6, 5)), IMAGE, {'a': 6}),
    'chunks that go separate ways': (
        Net(lambda m, x: m.b(m.a(x).chunk(2, 1)[0]) + m.c(m.a(x).chunk(2, 1)[1]), a=conv(3, 12), b=conv(6, 5),
            c=conv(6, 5)), IMAGE, {'a': 6}),
    'split by attributes': (
        Net(lambda m, x: (lambda y, z: m.b(y) + m.c(z))(*m.a(x).split([m.n, m.k], 1)), a=conv(3, 12), b=conv(4, 5),
            c=conv(8, 5), n=4, k=8), IMAGE, {'a': 4, 'a#2': 8}),
    'slices by an attribute': (
        Net(lambda m, x: m.b(m.a(x)[:, :m.n]) + m.c(m.a(x)[:, m.n:]), a=conv(3, 12), b=conv(4, 5), c=conv(8, 5), n=4),
        IMAGE, {'a': 4, 'a#2': 8}),
    'every other channel': (
        Net(lambda m, x: m.b(m.a(x)[:, ::2]), a=conv(3, 8), b=conv(4, 5)), IMAGE, {'a': 4}),
    'padding by an attribute': (
        Net(lambda m, x: m.c(F.pad(m.a(x), (0, 0, 0, 0, 0, m.more)) + m.b(x)), a=conv(3, 6), b=conv(3, 10),
            c=conv(10, 5), more=4), IMAGE, {'a': 6, 'b': 4}),
    'stack': (
        Net(lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)),
        IMAGE, {'a': 8}),
    'expand': (
        Net(lambda m, x: m.b(m.a(x) * m.g(x.mean((2, 3), keepdim=True)).sigmoid().expand(-1, -1, 8, 8)), a=conv(3, 8),
            g=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': 8}),
    'repeat': (
        Net(lambda m, x: m.b(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 8), b=conv(16, 5)), IMAGE, {'a': 8}),
    'flip': (
        Net(lambda m, x: m.c(m.a(x).flip(1) + m.b(x)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)), IMAGE, {'a': 8}),
    'im2col': (
        Net(lambda m, x: m.b(F.unfold(m.a(x), 3, padding=1).transpose(1, 2)), a=conv(3, 8), b=nn.Linear(72, 5)),
        IMAGE, {'a': 8}),
    'im2col and back': (
        Net(lambda m, x: m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (8, 8), 2, stride=2)), a=conv(3, 8), b=conv(8, 5)),
        IMAGE, {'a': 8}),
    'windows': (
        Net(lambda m, x: m.b(m.a(x).unfold(2, 3, 1).mean(-1)), a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': 8}),
    'shuffle': (
        Net(lambda m, x: m.b(m.a(x).view(2 if x.shape[0] > 1 else 1, 2, m.n // 2, 8, 8).transpose(1, 2).flatten(1, 2)),
            a=conv(3, 8), b=conv(8, 5), n=8), IMAGE, {'a': 4}),
    'gather of channels': (
        Net(lambda m, x: m.b(m.a(x)[:, torch.tensor([1, 0, 2, 2], device=x.device)]), a=conv(3, 8), b=conv(4, 5)),
        IMAGE, {}),
    'softmax over channels': (
        Net(lambda m, x: m.b(m.a(x).softmax(1)), a=conv(3, 8), b=conv(8, 5)), IMAGE, {}),
    'mean over channels': (
        Net(lambda m, x: m.b(m.a(x)) + m.a(x).mean(1, keepdim=True), a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': -8}),
    'pooling and upsampling': (
        Net(lambda m, x: m.b(F.interpolate(F.adaptive_avg_pool2d(F.max_pool2d(m.a(x), 2), 2), scale_factor=2)),
            a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': 8}),
    'batch norm and PReLU': (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.PReLU(8), conv(8, 5)), IMAGE, {'0': 8}),
    'group norm of whole groups': (
        nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), conv(8, 5)), IMAGE, {'0': 4}),
    'group norm of single channels': (
        nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), conv(8, 5)), IMAGE, {'0': 8}),
    'group norm of one group': (
        nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 5)), IMAGE, {'0': -8}),
    'layer norm': (
        nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 5)), TOKENS, {'0': -8}),
    'RMS norm': (
        nn.Sequential(nn.Linear(12, 8), RmsNorm(8), nn.Linear(8, 5)), TOKENS, {'0': -8}),
    'standardised weights': (
        nn.Sequential(StdConv2d(3, 8, 3, padding=1), StdConv2d(8, 6, 3, padding=1), conv(6, 5)), IMAGE,
        {'0': -8, '1': 6}),
    'transposed convolution': (
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), conv(6, 5)), IMAGE, {'0': 8, '1': 6}),
    'transposed convolution in groups': (
        nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), conv(6, 5)), IMAGE,
        {'0': 4, '1': 3}),
    'depthwise': (
        nn.Sequential(conv(3, 8), conv(8, 8, 3, groups=8), conv(8, 5)), IMAGE, {'0': 8}),
    'depthwise with a multiplier': (
        nn.Sequential(conv(3, 8), conv(8, 16, 3, groups=8), nn.ReLU(), conv(16, 5)), IMAGE, {'0': 8}),
    'few wide groups': (
        nn.Sequential(conv(3, 12), conv(12, 16, 3, groups=2), nn.ReLU(), conv(16, 5)), IMAGE, {'0': 6, '1': 8}),
    'many narrow groups': (
        nn.Sequential(conv(3, 16), conv(16, 16, 3, groups=8), nn.ReLU(), conv(16, 5)), IMAGE, {'0': 8}),
    'matrices without a module': (
        Net(lambda m, x: (x @ m.v).relu() @ m.w, v=nn.Parameter(torch.randn(12, 8)), w=nn.Parameter(torch.randn(8, 5))),
        TOKENS, {'v': 8}),
    'einsum': (
        Net(lambda m, x: torch.einsum('bchw,oc->bohw', m.a(x).relu(), m.w), a=conv(3, 8),
            w=nn.Parameter(torch.randn(5, 8))), IMAGE, {'a': 8}),
    'embedding': (
        Net(lambda m, x: m.b(m.e(torch.arange(5, device=x.device)) + m.a(x)), e=nn.Embedding(5, 8), a=nn.Linear(12, 8),
            b=nn.Linear(8, 5)), TOKENS, {'e': 8}),
    "a number that is compared with all a tensor's entries": (
        Net(compared, a=nn.Linear(12, 8), b=nn.Linear(8, 5), pad=0), TOKENS, {'a': 8}),
    'LSTM': (
        Net(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(12, 8, batch_first=True), b=nn.Linear(8, 5)), TOKENS, {'a': 8}),
    'attention heads': (
        Net(attention, qkv=nn.Linear(12, 48), proj=nn.Linear(16, 12), heads=4, width=4), TOKENS, {'qkv': 4}),
    "torch's encoder": (
        nn.Sequential(nn.Linear(12, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)),
        TOKENS, {'0': -8, '1.self_attn': 2, '1.linear1': 16}),
    'a convolution over folded heads': (
        Net(folded, a=nn.Linear(12, 16), c=nn.Conv1d(4, 4, 3, padding=1), b=nn.Linear(16, 5), heads=4, width=4), TOKENS,
        {'a': 4}),
    'pixel shuffle': (
        Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 32), b=conv(8, 5)), IMAGE, {'a': 8}),
    'pixel unshuffle': (
        Net(lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 8), b=conv(32, 5)), IMAGE, {'a': 8}),
    'unit length': (
        Net(lambda m, x: m.b(F.normalize(m.a(x)) * m.a(x)), a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': -8}),
    'expand from one entry': (
        Net(lambda m, x: m.b(m.a(x) * x.mean((1, 2, 3), keepdim=True).expand_as(m.a(x))), a=conv(3, 8), b=conv(8, 5)),
        IMAGE, {'a': 8}),
    'assignment by an index': (
        Net(assigned, a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': 8}),
    'unpooling': (
        Net(lambda m, x: m.b(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2)), a=conv(3, 8),
            b=conv(8, 5)), IMAGE, {'a': 8}),
    'sampling at an affine grid': (
        Net(lambda m, x: m.b(F.grid_sample(m.a(x), F.affine_grid(
            m.d(m.c(x).relu().mean((2, 3))).view(-1, 2, 3), m.a(x).shape, False), align_corners=False)),
            a=conv(3, 8), c=conv(3, 6), d=nn.Linear(6, 6), b=conv(8, 5)), IMAGE, {'a': 8, 'c': 6}),
    'triangles': (
        Net(lambda m, x: m.b((m.w.tril() @ m.a(x)).relu()), a=nn.Linear(12, 8), b=nn.Linear(8, 5),
            w=nn.Parameter(torch.randn(5, 5))), TOKENS, {'a': 8}),
    'triangles of each channel': (
        Net(lambda m, x: m.b(m.a(x).triu(1)), a=conv(3, 8), b=conv(8, 5)), IMAGE, {'a': 8}),
    'a triangle of channels': (
        Net(lambda m, x: m.c(m.b(m.a(x).tril().relu()).relu()), a=nn.Linear(12, 8), b=nn.Linear(8, 6),
            c=nn.Linear(6, 5)), TOKENS, {'b': 6}),
    'deformable convolution': (
        Net(lambda m, x: m.b(m.c(m.a(x), m.o(x)).relu()), a=conv(3, 8), o=conv(3, 18), b=conv(6, 5),
            c=DeformConv2d(8, 6, 3, padding=1)), IMAGE, {'a': 8, 'c': 6}),
    'weight norm': (
        nn.Sequential(*map(parametrizations.weight_norm, (conv(3, 8), conv(8, 6, 3))), conv(6, 5)), IMAGE,
        {'0': 8, '1': 6}),
    'weight norm by hooks': (
        nn.Sequential(*map(computed, map(weight_norm, (conv(3, 8), conv(8, 6, 3)))), conv(6, 5)), IMAGE,
        {'0': 8, '1': 6}),
    'spectral norm': (
        nn.Sequential(*map(parametrizations.spectral_norm, (conv(3, 8), conv(8, 6, 3))), conv(6, 5)), IMAGE,
        {'0': -8, '1': -6}),
    'spectral norm by hooks': (
        nn.Sequential(*map(spectral_norm, (conv(3, 8), conv(8, 6, 3))), conv(6, 5)), IMAGE, {'0': -8, '1': -6}),
    'pruning masks': (
        nn.Sequential(*map(computed, (random_unstructured(conv(3, 8), 'weight', 0.2),
                                      random_unstructured(conv(8, 6), 'weight', 0.2))), conv(6, 5)),
        IMAGE, {'0': 8, '1': 6}),
    'boxes that are chosen by their scores': (
        Net(detected, a=conv(3, 8), o=conv(8, 4), s=conv(8, 1), f=nn.Linear(8 * 4, 6), b=nn.Linear(6, 5)), IMAGE,
        {'a': 8, 'f': 6}),
    'as many steps as numbers say': (
        Net(lambda m, x: m.c(repeated(m.a, 1 + int(x.abs().sum() > 0), m.b(x))), a=conv(8, 8), b=conv(3, 8),
            c=conv(8, 5)), IMAGE, {'b': 8}),
    'what a mask lets through': (
        Net(lambda m, x: m.b(m.a(x).movedim(1, -1)[x.mean(1) > 0]).mean(0), a=conv(3, 8), b=nn.Linear(8, 5)), IMAGE,
        {'a': 8}),
}


@pytest.mark.parametrize('what', RULE_ROWS)
def test_rule(what):
    module, shape, units = RULE_ROWS[what]
    traced = traced_and_exact(copy.deepcopy(module), torch.randn(shape))
    assert found(traced) == units


def test_a_trace_leaves_mode_and_weights():
    module = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(), conv(8, 5)).train()
    module[2].eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    trace_model(module, torch.zeros(1, 3, 8, 8))
    assert [m.training for m in module.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


# -- attributes -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    width: int
    groups: int


def holding(**attributes):
    module = nn.Identity()
    vars(module).update(attributes)
    return module


ATTRIBUTE_ROWS = {
    'an attribute': (lambda m, y: y.reshape(-1, 2, m.width), {'width': 4}, {'width': 2}),
    'half of an attribute': (lambda m, y: y.reshape(-1, 2, m.twice // 2), {'twice': 8}, {'twice': 4}),
    'a multiple of an attribute': (
        lambda m, y: y.reshape(-1, m.heads, 2).relu().reshape(-1, m.heads * 2), {'heads': 4}, {'heads': 2}),
    'an entry of a tuple': (lambda m, y: y.reshape(-1, *m.shape), {'shape': (2, 4)}, {'shape': (2, 2)}),
    'a length that was read from a tensor': (lambda m, y: y.reshape(-1, 2, y.shape[-1] // 2), {}, {}),
    'an attribute below a name with an underscore': (
        lambda m, y: y.reshape(-1, 2, m._inner.width), {'_inner': holding(width=4)}, {'_inner.width': 2}),
    'a setting of an object': (
        lambda m, y: y.reshape(-1, 2, m.config.widths[-1]), {'config': SimpleNamespace(depth=3, widths=[2, 4])},
        {'config.depth': 3, 'config.widths': [2, 2]}),
    'a setting of a frozen dataclass': (
        lambda m, y: y.reshape(-1, m.config.groups, m.config.width), {'config': Config(4, 2)},
        {'config': Config(2, 2)}),
    'a setting of a dict in an object': (
        lambda m, y: y.reshape(-1, 2, m.config.encoder['width']), {'config': SimpleNamespace(encoder={'width': 4})},
        {'config.encoder': {'width': 2}}),
    'an attribute that a length is compared with': (
        lambda m, y: y if y.shape[-1] == m.width else None, {'width': 8}, {'width': 4}),
    'an attribute of that value that is not used': (
        lambda m, y: y.reshape(-1, 2, y.shape[-1] // 2), {'stride': 4}, {'stride': 4}),
}


@pytest.mark.parametrize('what', ATTRIBUTE_ROWS)
def test_attributes_follow(what):
    """Eight channels, two times four, of which half of the four go."""
    reshape, attributes, expected = ATTRIBUTE_ROWS[what]

    def forward(net, x):
        return net.b(reshape(net, net.a(x)).relu().flatten(1))

    torch.manual_seed(0)
    module = Net(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 5), **attributes).eval()
    rows = torch.randn(3, 12)
    traced = trace_model(module, rows)
    (structure,) = traced.structures
    keep = {structure.name: np.arange(structure.units)[::2]}
    cut = apply_plan(copy.deepcopy(module), make_plan(traced, keep, {}))
    assert cut.a.out_features == 4
    assert {name: attrgetter(name)(cut) for name in expected} == expected
    with torch.no_grad():
        assert distance(masked(module, traced.structures, keep)(rows), cut(rows)) < 1e-5


class Scaled(nn.Module):
    """Mixes by channels whose number it reads from a config."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(12, config.width), nn.Linear(config.width, 12)

    def forward(self, x):
        y = self.up(x).relu().view(-1, 2, self.config.width // 2).transpose(1, 2).reshape(-1, self.config.width)
        return self.down(y)


def test_layers_that_share_a_config_get_their_own_where_they_are_cut():
    config = SimpleNamespace(width=8, eps=1e-5)
    model = nn.Sequential(Scaled(config), Scaled(config), Scaled(config), nn.Linear(12, 5)).eval()
    traced = trace_model(model, torch.zeros(1, 12))
    units = {'0.up': 4, '1.up': 4, '2.up': 4}
    assert {name: found(traced)[name] for name in units} == units
    keep = {s.name: np.arange({'0.up': 2, '1.up': 3}.get(s.name, s.units)) for s in traced.structures}
    plan = Plan.from_json(make_plan(traced, keep, {}).to_json())
    cut = apply_plan(copy.deepcopy(model), plan)
    assert [layer.config.width for layer in cut[:3]] == [4, 6, 8] and config.width == 8
    x = torch.randn(2, 12)
    assert distance(masked(model, traced.structures, keep)(x), cut(x)) < 1e-5


def test_a_setting_that_stands_for_two_widths_holds_both():
    def forward(net, x):
        y = net.b(net.a(x).relu().view(-1, net.config.width))
        return net.d(net.c(y.relu()).relu().view(-1, net.config.width))

    net = Net(forward, a=nn.Linear(12, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 8), d=nn.Linear(8, 5),
              config=SimpleNamespace(width=8))
    traced = trace_model(net, torch.zeros(1, 12))
    assert found(traced) == {'b': 6}
    assert traced.fixed['a'] == traced.fixed['c'] == (
        8, 'config.width is one number, and what it is the length of would be cut differently')


def test_a_number_in_the_code_costs_coverage_and_breaks_nothing():
    def forward(net, x):
        y = net.c(net.b(net.a(x).relu()))
        return net.d(y.view(y.shape[0], 4, 16).mean(1))

    module = Net(forward, a=nn.Linear(12, 10), b=nn.Linear(10, 6), c=nn.Linear(6, 64), d=nn.Linear(16, 5))
    traced = traced_and_exact(module, torch.randn(2, 12))
    assert found(traced) == {'a': 10, 'b': 6}
    (skipped,) = traced.skipped
    assert skipped.where.partition(':')[0].endswith('test_trace.py')


# -- operations and modules of one's own ----------------------------------------------------------------------------

@torch.library.custom_op('timm_epfs_tests::scaled_relu', mutates_args=())
def scaled_relu(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.relu() * scale[:, None, None]


@scaled_relu.register_fake
def _(x, scale):
    return torch.empty_like(x)


@torch.library.custom_op('timm_epfs_tests::flip', mutates_args=())
def flip(x: torch.Tensor, dims: int) -> torch.Tensor:
    """Shares its name with an operation of ATen's, and nothing else."""
    return x.cumsum(1)


@flip.register_fake
def _(x, dims):
    return torch.empty_like(x)


def with_custom_op(op):
    return Net(op, a=conv(3, 8), b=conv(8, 6), c=conv(6, 5), scale=nn.Parameter(torch.rand(6) + 0.5))


def test_an_unknown_operation_is_opaque():
    traced = traced_and_exact(with_custom_op(lambda m, x: m.c(scaled_relu(m.b(m.a(x)), m.scale))), torch.randn(IMAGE))
    assert found(traced) == {'a': 8}
    (skipped,) = traced.skipped
    assert 'timm_epfs_tests::scaled_relu' in skipped.why
    path, _, line = skipped.where.partition(':')
    assert path.endswith('test_trace.py') and 'scaled_relu' in open(__file__).read().splitlines()[int(line) - 1]


def test_an_operation_of_the_same_name_in_another_namespace_is_another():
    traced = traced_and_exact(with_custom_op(lambda m, x: m.c(flip(m.b(m.a(x)), 1))), torch.randn(IMAGE))
    assert found(traced) == {'a': 8}


def test_a_rule_from_outside_makes_an_operation_cuttable(monkeypatch):
    monkeypatch.delitem(RULES, 'timm_epfs_tests::scaled_relu', raising=False)

    @rule('timm_epfs_tests::scaled_relu')
    def _(rec, out, x, scale):
        labels = list(rec.labels_of(x))
        labels[1] = rec.labels.tie(labels[1], rec.labels_of(scale)[0])
        return labels

    try:
        traced = traced_and_exact(
            with_custom_op(lambda m, x: m.c(scaled_relu(m.b(m.a(x)), m.scale))), torch.randn(IMAGE))
    finally:
        del RULES['timm_epfs_tests::scaled_relu']
    assert found(traced) == {'a': 8, 'b': 6}
    assert not traced.skipped


class Mixer(nn.Module):
    """A user's own module: raw parameters, its own widths, a gate."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.up = nn.Parameter(torch.randn(2 * hidden, dim) / math.sqrt(dim))
        self.shift = nn.Parameter(torch.randn(1, hidden))
        self.down = nn.Linear(hidden, dim)

    def forward(self, x):
        value, gate = F.linear(x, self.up).split(self.hidden, dim=-1)
        return x + self.down((value + self.shift) * gate.sigmoid())


def test_a_module_of_ones_own():
    module = nn.Sequential(nn.Linear(12, 8), Mixer(8, 6), nn.Linear(8, 5))
    traced = traced_and_exact(module, torch.randn(2, 12))
    assert found(traced) == {'0': 8, '1#2': 6}
    assert traced.attributes['1.hidden']({'0': 8, '1#2': 4}) == 4


def test_a_module_that_is_called_twice():
    module = Net(lambda m, x: m.d(m.b(m.a(x).relu()).relu() + m.b(m.c(x))), a=conv(3, 8), b=conv(8, 6), c=conv(3, 8),
                 d=conv(6, 5))
    traced = traced_and_exact(module, torch.randn(IMAGE))
    assert found(traced) == {'a': 8, 'b': 6}
    assert {m.tensor for m in traced.structures[0].members} >= {'a.weight', 'c.weight', 'b.weight'}


def test_tied_weights_stay_tied():
    module = Net(lambda m, x: m.d(m.b(m.a(x).relu()) + m.c(m.a(x))), a=conv(3, 8), b=conv(8, 6), c=conv(8, 6),
                 d=conv(6, 5))
    module.c.weight = module.b.weight
    traced = traced_and_exact(module, torch.randn(IMAGE))
    assert found(traced) == {'a': 8, 'b': 6}
    keep = drop(traced.structures)
    cut = apply_plan(copy.deepcopy(module), make_plan(traced, keep, {}))
    assert cut.b.weight is cut.c.weight


def test_inputs_and_outputs_of_any_structure():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(6, 8)
            self.logits, self.box = nn.Linear(8, 5), nn.Linear(8, 4)

        def forward(self, image, extra=None):
            hidden = self.a(image['pixels']).relu() + self.b(extra)
            return {'logits': self.logits(hidden), 'rest': (self.box(hidden), [hidden.mean()])}

    inputs = {'image': {'pixels': torch.randn(2, 12)}, 'extra': torch.randn(2, 6)}
    torch.manual_seed(0)
    module = Model().eval()
    traced = trace_model(module, inputs)
    assert [s.units for s in traced.structures] == [8]
    slim = timm_epfs.prune(module, macs=0.5, example_input=inputs)
    out = slim(**inputs)
    assert out['logits'].shape == (2, 5) and out['rest'][0].shape == (2, 4)


def test_widths_that_stay_are_named_with_what_fixes_them():
    net = Net(lambda m, x: m.c(m.b(m.a(x)).softmax(1)), a=conv(3, 8), b=conv(8, 6), c=conv(6, 5))
    fixed = trace_model(net, torch.zeros(1, 3, 8, 8)).fixed
    assert fixed.keys() == {'b', 'c'} and fixed['c'] == (5, 'the model returns it')
    assert fixed['b'][0] == 6 and '_softmax at' in fixed['b'][1] and 'test_trace.py' in fixed['b'][1]
    assert 'b (6): _softmax at' in str(timm_epfs.inspect(net, example_input=torch.zeros(1, 3, 8, 8)))
    with pytest.raises(PruningError, match='this model has channels to cut, and kinds= leaves them out'):
        timm_epfs.prune(net, macs=0.5, example_input=torch.zeros(1, 3, 8, 8), kinds=['heads'])


def test_what_a_model_returns_is_not_cut():
    module = Net(lambda m, x: (m.b(m.a(x)), m.a(x)), a=conv(3, 8), b=conv(8, 5))
    assert trace_model(module, torch.zeros(1, 3, 8, 8)).structures == ()


@pytest.mark.parametrize('fails', [
    lambda m, x: m.a(x.flatten(1)),
    lambda m, x: m.nothing(x),
    lambda m, x: {}['key\nof two lines'],
])
def test_a_forward_that_fails_is_one_line(fails):
    with pytest.raises(PruningError) as e:
        trace_model(Net(fails, a=conv(3, 8)), torch.zeros(1, 3, 8, 8))
    assert '\n' not in str(e.value) and '(1, 3, 8, 8)' in str(e.value)


def test_numbers_decide_where_shapes_do_not_and_nothing_of_them_is_left():
    module, shape, _ = RULE_ROWS['boxes that are chosen by their scores']
    image, state = torch.randn(shape)[:1], torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    traced = trace_model(module, image)
    assert 'nms' in traced.on_numbers and traced.unseen == {}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    without_data = trace_model(module, image.to('meta'))  # random numbers instead
    assert [s.name for s in without_data.structures] == [s.name for s in traced.structures]
    assert 'traced on numbers' in str(timm_epfs.inspect(module, example_input=image))


def test_parameters_that_no_forward_uses_are_named_if_they_may_not_fit():
    net = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 5), c=conv(8, 7), d=conv(9, 7))
    with pytest.warns(UserWarning, match='no forward used c.weight, so nothing of them was cut'):
        timm_epfs.prune(net, macs=0.5, example_input=torch.zeros(1, 3, 8, 8))


def test_attention_is_cut_by_dims_of_heads_where_heads_are_not_asked_for():
    model = timm.create_model('test_vit').eval()
    slim = timm_epfs.prune(model, macs=0.7, kinds=['channels', 'head_dims', 'groups'])
    attention = [c for c in slim.pruning_plan.cuts if 'attn' in c.structure.name]
    dense, cut = model.blocks[0].attn, slim.blocks[0].attn
    assert attention and {c.structure.kind for c in attention} == {'head_dims'}
    assert all(c.structure.units == dense.head_dim and not c.structure.exact for c in attention)
    assert cut.num_heads == dense.num_heads and cut.scale == dense.scale
    assert cut.attn_dim == cut.num_heads * cut.head_dim and cut.qkv.out_features == 3 * cut.attn_dim
    assert any(len(c.keep) < c.structure.units for c in attention)
    assert slim(torch.zeros(1, *model.default_cfg['input_size'])).shape == (1, 1000)


@pytest.mark.parametrize('name', [m.name for m in pkgutil.walk_packages(timm_epfs.trace.__path__, 'timm_epfs.trace.')])
def test_docstrings_say_what_is_so(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
