"""The same model gives the same plan, whatever ran in this process before, and a trace leaves nothing in it."""
import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn

import timm_epfs
from timm_epfs.learn.center_loss import find_classifier
from timm_epfs.pruner import trace_model

IMAGE = torch.randn(1, 3, 16, 16)


@pytest.fixture(autouse=True)
def empty_caches():
    yield
    recipe.cache_clear()
    for each in (MASKS, ORDERED, SHAPES, Masking.kept):
        each.clear()
    globals()['LAST'], Masking.calls = None, 0


def structures(model, x=IMAGE):
    return sorted((s.name, s.kind, s.units) for s in trace_model(model, x).structures)


# -- functions with an lru_cache ------------------------------------------------------------------------------------

@functools.lru_cache(256)
def recipe(pattern, lengths):
    """As in einops: what to do for a pattern is kept by its integers, and holds them."""
    return {'split': lambda b, n, c: (b, n, lengths[0], c // lengths[0]), 'merge': lambda b, n, *_: (b, n, -1)}[pattern]


class Attention(nn.Module):
    """Attention that reads its number of heads from an attribute of any name."""

    def __init__(self, name='heads'):
        super().__init__()
        setattr(self, name, 4)
        self.name, self.qkv, self.out = name, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        heads = getattr(self, self.name)
        q, k, v = (t.view(recipe('split', (heads,))(*t.shape)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)
        return self.out(x.reshape(recipe('merge', ())(*x.shape[:3])))


class Net(nn.Module):
    def __init__(self, **blocks):
        super().__init__()
        self.patch, self.blocks, self.head = nn.Conv2d(3, 32, 4, 4), nn.ModuleDict(blocks), nn.Linear(32, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks.values():
            x = x + block(x)
        return self.head(x.mean(1))


def test_integers_of_one_trace_are_not_found_in_the_next():
    for name in ('heads', 'num_heads'):
        model = Net(one=Attention(name), two=Attention(name))
        fresh = structures(model)
        assert [kind for _, kind, _ in fresh].count('heads') == 2
        assert recipe.cache_info().currsize == 0
        slim = timm_epfs.prune(model, macs=0.6, example_input=IMAGE)
        assert set(slim.pruning_plan.attributes) <= {f'blocks.one.{name}', f'blocks.two.{name}'}
        model(IMAGE)
        assert structures(model) == fresh and slim(IMAGE).shape == (1, 5)


def cached_as_in_transformers(function):
    cached = functools.lru_cache(maxsize=10)(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return cached(*args, **kwargs)

    wrapper.cached = cached
    return wrapper


class Biased(nn.Module):
    """Adds a bias by an index that a function with a cache makes, on the CPU or wherever the input is."""

    def __init__(self, how):
        super().__init__()
        self.how, self.size = how, (4, 4)
        self.proj, self.table = nn.Linear(32, 32), nn.Parameter(torch.randn(16, 32))
        self.instance_index = functools.lru_cache(self.make_index)

    @staticmethod
    @cached_as_in_transformers
    def static_index(size):
        return (torch.arange(size[0])[:, None] + torch.arange(size[1])).flatten()

    @functools.lru_cache(8)  # noqa: B019
    def method_index(self, size):
        return self.make_index(size)

    @property
    @functools.lru_cache(8)  # noqa: B019
    def property_index(self):
        return self.make_index(self.size)

    def make_index(self, size):
        return (torch.arange(size[0], device=self.table.device)[:, None] + torch.arange(
            size[1], device=self.table.device)).flatten()

    def forward(self, x):
        index = getattr(self, f'{self.how}_index')
        index = index if self.how == 'property' else index(self.size)
        return self.proj(x).relu() * self.table[index.to(x.device)]


@pytest.mark.parametrize('how', ['static', 'method', 'property', 'instance'])
def test_functions_that_keep_tensors(how):
    Biased.static_index.cached.cache_clear()
    caches = [Biased.static_index.cached, Biased.method_index, Biased.property_index.fget]
    model = Net(mlp=nn.Sequential(Biased(how), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)))
    before = [cache.cache_info().currsize for cache in caches]
    fresh = structures(model)
    assert [cache.cache_info().currsize for cache in caches] == before and ('blocks.mlp.1', 'channels', 64) in fresh
    model(IMAGE)
    assert structures(model) == fresh
    slim = timm_epfs.prune(model, macs=0.7, example_input=IMAGE)
    assert slim(IMAGE).shape == (1, 5)
    if how == 'instance':
        slim.blocks.mlp[0].size = (2, 8)
        assert slim(IMAGE).shape == (1, 5) and slim.blocks.mlp[0].instance_index.cache_info().currsize == 2


REGISTRY_CALLS = []


@functools.lru_cache
def registry():
    REGISTRY_CALLS.append(1)
    return {'act': torch.relu}


def test_what_is_found_by_name_stays_the_same_object():
    class Registered(nn.Conv2d):
        def forward(self, x):
            return registry()['act'](super().forward(x))

    registry()['act'] = torch.sigmoid
    structures(nn.Sequential(Registered(3, 8, 1), nn.Conv2d(8, 2, 1)))
    assert len(REGISTRY_CALLS) == 1 and registry()['act'] is torch.sigmoid


# -- dicts, lists and variables -------------------------------------------------------------------------------------

MASKS = {}
ORDERED = OrderedDict()
SHAPES = []
SCALES = {'half': torch.tensor([0.5]), 'same': torch.tensor([1.0])}
LAST = None


def ones(n, x):
    return torch.ones(n, device=x.device)


class Masking(nn.Module):
    kept = {}
    calls = 0

    def __init__(self, mask):
        super().__init__()
        self.mask, self.dim = mask, 32

    def forward(self, x):
        global LAST
        type(self).calls += 1
        SHAPES.append(x.shape)
        LAST = x
        return x * self.mask(self.dim, x) * SCALES['half'].to(x.device)


def global_mask(n, x):
    if n not in MASKS:
        MASKS[n] = ones(n, x)
    return MASKS[n]


def ordered_mask(n, x):
    ORDERED[n] = ORDERED[n] if n in ORDERED else ones(n, x)
    ORDERED.move_to_end(n)
    return ORDERED[n]


def class_mask(n, x):
    return Masking.kept[n] if n in Masking.kept else Masking.kept.setdefault(n, ones(n, x))


@pytest.mark.parametrize('mask', [global_mask, ordered_mask, class_mask])
def test_collections_that_a_forward_writes_to(mask):
    model = Net(one=nn.Sequential(nn.Linear(32, 32), Masking(mask), nn.Linear(32, 32)))
    fresh = structures(model)
    assert ('blocks.one.0', 'channels', 32) in fresh
    assert MASKS == ORDERED == Masking.kept == {} and SHAPES == [] and LAST is None and Masking.calls == 0
    out = model(IMAGE)  # with the mask's values, if it was made anew
    assert not out.is_meta and LAST is not None
    kept = [dict(MASKS), dict(ORDERED), dict(Masking.kept), list(SHAPES)]
    assert structures(model) == fresh
    assert find_classifier(model, (IMAGE.to('meta'),), {}) == ('head', 32, 5)
    assert [dict(MASKS), dict(ORDERED), dict(Masking.kept), list(SHAPES)] == kept and not LAST.is_meta
    assert torch.equal(model(IMAGE), out)


def test_everything_is_put_back_after_an_error():
    def failing_mask(n, x):
        MASKS[n] = x
        raise ValueError('no mask')

    with pytest.raises(timm_epfs.PruningError, match='no mask'):
        structures(Net(one=Masking(failing_mask)))
    assert MASKS == {} and SHAPES == []
