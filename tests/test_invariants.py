"""The invariants that every room relies on, over one small model for each way of coupling."""
import copy
import pickle
import random
from functools import cached_property

import numpy as np
import pytest
import timm
import torch
from helpers import MODELS, Row, distance, drop, flat, masked
from timm.layers.format import get_channel_dim
from torch.utils._pytree import tree_leaves

import timm_epfs
from timm_epfs.plan import make_plan
from timm_epfs.report import count_macs
from timm_epfs.surgery import apply_plan
from timm_epfs.trace import meta_copy

# A correct cut gives 1e-7, the order of float32 sums; a wrong one gives 1e-2 and more.
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings('ignore:to meet the budget, residual streams')
BY_NAME = {row.name: row for row in MODELS}
# Models that have no block that can be removed.
WITHOUT_BLOCKS = {
    'vgg16_bn_cifar', 'densenet121', 'torchvision/shufflenet_v2_x0_5', 'legacy_seresnet18', 'dpn48b',
    'cs3darknet_focus_s', 'ghostnet_050', 'rexnet_100', 'ese_vovnet19b_slim_dw', 'test_nfnet', 'resnetv2_50x1_bit',
    'test_efficientnet_gn', 'torchvision/googlenet', 'test_vit_relpos', 'eva02_tiny_patch14_224',
    'eva02_base_patch14_224', 'pvt_v2_b0', 'xcit_nano_12_p16_224',
}


class Case:
    """A model, what it was before ``prune`` and after, and what ``prune`` made of it."""

    def __init__(self, row: Row):
        self.row = row
        self.images = row.images()
        self.model = row.build()
        self.dense = _run(self.model, self.images)
        _make_particular(self.model)
        self.before = _everything(self.model)
        pruner = timm_epfs.Pruner(self.model, example_input=self.example)
        self.slim, self.traced = pruner(macs=0.5), pruner.trace
        self.after = _everything(self.model)
        self.model.eval()
        self.slim.eval().requires_grad_(True)

    @property
    def example(self) -> torch.Tensor:
        return torch.empty(1, 3, self.row.size, self.row.size)

    @property
    def plan(self) -> timm_epfs.Plan:
        return self.slim.pruning_plan

    @cached_property
    def output(self) -> torch.Tensor:
        return _run(self.slim, self.images)

    @cached_property
    def shapes(self):
        """A copy of the pruned model that computes shapes only."""
        return meta_copy(self.slim).eval()


def _make_particular(model):
    """Give a model what a careless copy would lose: another mode inside, a hook, a gradient, a frozen weight."""
    next(model.children()).train()
    model.register_forward_hook(_hook)
    first, second, *_ = model.parameters()
    first.grad = torch.full_like(first, 0.5)
    second.requires_grad_(False)


def _hook(module, args, out):
    return None


def _everything(model):
    """All that a caller could notice of a model and of the world."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_state_dict_hooks')
    return {
        'tensors': {name: id(t) for name, t in tensors.items()},
        'bits': {name: t.detach().clone() for name, t in tensors.items()},
        'requires_grad': {name: t.requires_grad for name, t in tensors.items()},
        'grads': {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()},
        'attributes': {name: {k: _plain(v) for k, v in vars(m).items()} for name, m in model.named_modules()},
        'classes': {name: type(m) for name, m in model.named_modules()},
        'hooks': {name: [len(getattr(m, kind)) for kind in hooks] for name, m in model.named_modules()},
        'torch': torch.get_rng_state(),
        'numpy': np.random.get_state()[1].copy(),
        'python': random.getstate(),
        'grad_mode': torch.is_grad_enabled(),
    }


def _plain(value):
    return repr(value) if isinstance(value, (int, float, str, tuple, list)) else type(value)


def _same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@torch.no_grad()
def _run(model, images) -> torch.Tensor:
    return flat(model(images))


def _macs(model, example) -> float:
    return count_macs(meta_copy(model).eval(), (example.to('meta'),), {})


@pytest.fixture(scope='module', params=MODELS, ids=lambda row: row.id)
def case(request):
    return Case(request.param)


def _masked_and_cut(case, keep):
    plan = make_plan(case.traced, keep, {})
    cut = apply_plan(copy.deepcopy(case.model), plan)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in case.model.parameters())
    return _run(masked(case.model, case.traced.structures, keep), case.images), _run(cut, case.images)


def test_masked_is_cut(case):
    keep = drop(case.traced.structures, exact=case.row.exact)
    zeroed, cut = _masked_and_cut(case, keep)
    moved = distance(case.dense, zeroed)
    assert moved > 1e-5
    if case.row.exact:
        assert distance(zeroed, cut) < min(TOLERANCE, moved / 10)
    else:
        assert not any(s.exact for s in case.traced.structures if s.kind not in ('blocks', 'heads'))
        assert distance(zeroed, cut) > moved / 1000


def test_a_removed_block_is_one_that_adds_zero(case):
    blocks = [s.name for s in case.traced.structures if s.kind == 'blocks']
    assert bool(blocks) == (case.row.name not in WITHOUT_BLOCKS)
    if not blocks:
        pytest.skip('no block of this model can be removed')
    keep = {s.name: np.arange(s.units) for s in case.traced.structures}
    keep.update((name, np.arange(0)) for name in blocks[::2])
    zeroed, cut = _masked_and_cut(case, keep)
    moved = distance(case.dense, zeroed)
    assert moved > 1e-5
    assert distance(zeroed, cut) < min(TOLERANCE, moved / 10)


def test_the_input_model_is_untouched(case):
    for what in case.before:
        assert _same(case.before[what], case.after[what]), what
    theirs = {t.data_ptr() for t in (*case.model.parameters(), *case.model.buffers())}
    assert not theirs & {t.data_ptr() for t in (*case.slim.parameters(), *case.slim.buffers())}


def test_rebuilt_is_cut(case):
    rebuilt = timm_epfs.rebuild(timm_epfs.Plan.from_json(case.plan.to_json())).eval()
    cut = case.slim.state_dict()
    assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {n: t.shape for n, t in cut.items()}
    rebuilt.load_state_dict(cut)
    assert torch.equal(_run(rebuilt, case.images), case.output)


def test_the_budget_is_met(case):
    dense, pruned = _macs(case.model, case.example), _macs(case.slim, case.example)
    assert pruned / dense == pytest.approx(0.5, abs=0.01)
    assert case.plan.cost['macs'] == pytest.approx((dense, pruned), rel=0.005)
    params = [sum(p.numel() for p in m.parameters()) for m in (case.model, case.slim)]
    assert case.plan.cost['params'] == pytest.approx(params, rel=1e-9)


def test_it_trains(case):
    """Every parameter that gets a gradient in the dense model gets one in the cut model, auxiliary heads included."""
    trained = []
    for model in (case.model, case.slim):
        model = meta_copy(model).train().requires_grad_(True)
        model.zero_grad()
        outs = tree_leaves(model(torch.cat([case.example] * 2).to('meta')))
        sum(out.sum() for out in outs if isinstance(out, torch.Tensor)).backward()
        trained.append({name for name, p in model.named_parameters() if p.grad is not None})
    dense, slim = trained
    left = {name for name, _ in case.slim.named_parameters()}
    assert slim == dense & left
    assert len(slim) > 0.9 * len(left)


def _skip_torchvision(case):
    if case.row.name.startswith('torchvision/'):
        pytest.skip("torchvision's models have no such methods")


@torch.no_grad()
def test_timm_features_follow(case):
    _skip_torchvision(case)
    image = case.example.to('meta')
    model = case.shapes
    logits = model(image)
    features = model.forward_features(image)
    assert model.forward_head(features).shape == logits.shape
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape[-1 if hidden.ndim < 4 else 1] == model.head_hidden_size
    assert model.num_features in features.shape
    model = copy.deepcopy(model)
    with torch.device('meta'):
        model.reset_classifier(7)
    assert model(image).shape == (1, 7)
    classifier = model.get_classifier()
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier
    assert [p.shape[:2] for p in classifier.parameters() if p.ndim > 1][-1] == (7, model.head_hidden_size)


@torch.no_grad()
def test_timm_feature_extraction_follows(case):
    _skip_torchvision(case)
    image = case.example.to('meta')
    outs = case.shapes.forward_intermediates(image, intermediates_only=True)
    channels = case.shapes.feature_info
    channels = [entry['num_chs'] for entry in getattr(channels, 'info', channels)]
    assert outs and channels
    assert [out.shape[1] for out in outs][-len(channels):] == channels[-len(outs):]
    with torch.device('meta'):
        extractor = timm.create_model('epfs_pruned', plan=case.plan, features_only=True).eval()
    axis = get_channel_dim(getattr(extractor, 'output_fmt', 'NCHW'))
    outs = extractor(image)
    assert [out.shape[axis] for out in outs] == extractor.feature_info.channels()


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'torchvision/googlenet'])
def test_nothing_is_pickled_between_pruning_and_loading(name, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('pickle')

    for function in ('load', 'loads', 'dump', 'dumps', 'Unpickler', 'Pickler'):
        monkeypatch.setattr(pickle, function, refuse)
    for function in ('load', 'save'):
        monkeypatch.setattr(torch, function, refuse)
    row = BY_NAME[name]
    slim = timm_epfs.prune(row.build(), macs=0.5, example_input=torch.empty(1, 3, row.size, row.size)).eval()
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'slim')
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(_run(loaded, row.images()), _run(slim, row.images()))


def test_nothing_is_kept_of_an_earlier_forward():
    """LeViT keeps attention biases, of every head, from one forward in evaluation to the next."""
    row = BY_NAME['levit_128s']
    model = row.build()
    model(row.images())
    slim = timm_epfs.prune(model, macs=0.5, example_input=torch.empty(1, 3, row.size, row.size))
    rebuilt = timm_epfs.rebuild(slim.pruning_plan).eval()
    rebuilt.load_state_dict(slim.state_dict())
    assert torch.equal(_run(slim, row.images()), _run(rebuilt, row.images()))


def test_a_head_that_is_the_only_one_left_doesnt_stand_in_the_way_of_a_second_cut():
    once = timm_epfs.prune('test_vit', macs=0.6, ratios={'*.attn.qkv': 0.5})
    assert {len(c.keep) for c in once.pruning_plan.cuts if c.structure.kind == 'heads'} == {1}
    twice = timm_epfs.prune(once, macs=0.8)
    assert twice.pruning_plan.cost['macs'][1] < once.pruning_plan.cost['macs'][1]
    rebuilt = timm_epfs.rebuild(twice.pruning_plan)
    rebuilt.load_state_dict(twice.state_dict())


def test_heads_can_be_cut_after_blocks_were():
    once = timm_epfs.prune('test_vit', macs=0.85, kinds=['blocks'])
    twice = timm_epfs.prune(once, macs=0.9, kinds=['heads'])
    assert any(len(c.keep) < c.structure.units for c in twice.pruning_plan.cuts if c.structure.kind == 'heads')
