"""``nn.MultiheadAttention``: its plain form against torch's own, and heads that are cut."""
import copy
import doctest
import itertools
import warnings

import numpy as np
import pytest
import torch
from helpers import distance, masked, randomise
from torch import nn

import timm_epfs
from timm_epfs.core import PrunedMultiheadAttention, attention, plain_attention
from timm_epfs.plan import make_plan
from timm_epfs.report import count_macs
from timm_epfs.surgery import apply_plan, cut_copy

FEW, MANY = 5, 7  # queries and sources
UPPER = torch.ones(FEW, MANY).triu(1).bool()
MASKS = {
    'none': {},
    'padding': {'key_padding_mask': torch.arange(MANY)[None] >= torch.tensor([[7], [4]])},
    'causal': {'attn_mask': UPPER, 'is_causal': True},
    'both': {'key_padding_mask': torch.rand(2, MANY), 'attn_mask': torch.rand(FEW, MANY)},
    'by head': {'attn_mask': torch.rand(2 * 4, FEW, MANY)},
}
VARIANTS = {
    'plain': {},
    'batch first': {'batch_first': True},
    'other widths': {'kdim': 6, 'vdim': 10, 'batch_first': True},
    'without biases': {'bias': False, 'kdim': 6, 'vdim': 10},
    'more sources': {'add_bias_kv': True, 'add_zero_attn': True},
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('mask', MASKS)
def test_the_plain_form_gives_what_torchs_gives(variant, mask):
    layer = randomise(nn.MultiheadAttention(8, 4, **VARIANTS[variant])).eval()
    batch = torch.randn(2, FEW, 8), torch.randn(2, MANY, layer.kdim), torch.randn(2, MANY, layer.vdim)
    if not layer.batch_first:
        batch = tuple(x.transpose(0, 1) for x in batch)
    for need_weights, average in itertools.product((True, False), (True, False)):
        options = {**MASKS[mask], 'need_weights': need_weights, 'average_attn_weights': average}
        theirs, their_weights = layer(*batch, **options)
        with plain_attention(layer):
            assert type(layer) is PrunedMultiheadAttention
            ours, our_weights = layer(*batch, **options)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_weights, their_weights)
    assert type(layer) is nn.MultiheadAttention


def test_the_plain_form_takes_input_without_a_batch_and_of_one_tensor():
    layer = randomise(nn.MultiheadAttention(8, 4)).eval()
    x = torch.randn(FEW, 8)
    theirs = layer(x, x, x, torch.arange(FEW) > 3)
    with plain_attention(layer):
        torch.testing.assert_close(layer(x, x, x, torch.arange(FEW) > 3), theirs)


class Model(nn.Module):
    """An encoder, and a layer whose queries are parameters and whose attention weights nobody reads."""

    def __init__(self, heads=4, **options):
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, heads, 32, batch_first=True), 2)
        self.queries = nn.Parameter(torch.randn(1, 3, 16))
        self.cross = nn.MultiheadAttention(16, heads, kdim=12, vdim=12, batch_first=True, **options)
        self.head = nn.Linear(16, 5)

    def forward(self, x, padding=None):
        y = self.encoder(self.embed(x), src_key_padding_mask=padding)
        y, _ = self.cross(self.queries + y.mean(1, keepdim=True), x, x, key_padding_mask=padding)
        return self.head(y)


@pytest.fixture(scope='module')
def dense():
    torch.manual_seed(0)
    return randomise(Model()).eval()


@pytest.fixture(scope='module')
def exact(dense):
    """A pruner that leaves the residual stream alone, since a norm is over it."""
    return timm_epfs.Pruner(dense, example_input=torch.zeros(1, 6, 12), exclude=['embed'])


def test_heads_are_found_and_cut_exactly(dense, exact):
    heads = {s.name: (s.units, s.exact) for s in exact.structures if s.kind == 'heads'}
    assert heads == dict.fromkeys(('encoder.layers.0.self_attn', 'encoder.layers.1.self_attn', 'cross'), (4, True))
    plan = exact.plan(macs=0.5, criterion='random')
    slim = cut_copy(dense, plan)
    zeroed = masked(dense, exact.trace.structures, {cut.structure.name: cut.keep for cut in plan.cuts})
    x, padding = torch.randn(3, 6, 12), torch.arange(6)[None] >= torch.tensor([[6], [4], [2]])
    for training in (False, True):  # in evaluation, and without gradients, torch fuses the dense layers
        for each in (zeroed, slim):
            for module in each.modules():
                module.training = training and not isinstance(module, nn.Dropout)
                module.dropout = 0.0 if isinstance(module, nn.MultiheadAttention) else getattr(module, 'dropout', None)
        with torch.no_grad():
            assert distance(zeroed(x), slim(x)) < 1e-5 < 1e-3 < distance(zeroed(x), dense(x))
            kept = [each.encoder(each.embed(x), src_key_padding_mask=padding)[~padding] for each in (zeroed, slim)]
            assert distance(*kept) < 1e-5


class Detector(nn.Module):
    """As DETR's decoder: the first layer's queries, keys and values are parameters, and no image is in them."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 6, 16))
        self.embed = nn.Linear(8, 16)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.decoder(self.queries.expand(len(x), -1, -1), self.embed(x)))


def test_attention_over_learned_queries_is_cut_by_heads_exactly():
    torch.manual_seed(0)
    dense, x = randomise(Detector()).eval(), torch.rand(2, 5, 8)
    pruner = timm_epfs.Pruner(dense, example_input=x, exclude=['embed'])
    kinds = {s.name: (s.kind, s.units, s.exact) for s in pruner.structures}
    assert kinds['decoder.self_attn'] == kinds['decoder.multihead_attn'] == ('heads', 4, True)
    plan = pruner.plan(macs=0.6, criterion='random')
    keep = {cut.structure.name: cut.keep for cut in plan.cuts}
    assert distance(masked(dense, pruner.trace.structures, keep)(x), cut_copy(dense, plan)(x)) < 1e-5


def test_a_cut_layer_knows_its_widths_and_others_stay_torchs_own(dense, exact):
    plan = exact.plan(macs=0.9, criterion='random')
    slim = cut_copy(dense, plan)
    for name, layer in slim.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            kept = next(len(cut.keep) for cut in plan.cuts if cut.structure.name == name)
            assert type(layer) is (nn.MultiheadAttention if kept == 4 else PrunedMultiheadAttention)
            assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (kept, 4, 16)
            assert layer.out_proj.in_features == kept * 4
    assert slim.encoder.use_nested_tensor == (type(slim.encoder.layers[0].self_attn) is nn.MultiheadAttention)


def test_with_its_input_cut_as_its_heads_are_a_layer_is_torchs_own(dense):
    pruner = timm_epfs.Pruner(dense, example_input=torch.zeros(1, 6, 12))
    keep = {s.name: np.arange(s.units // 2 if s.name in ('embed', 'encoder.layers.0.self_attn') else s.units)
            for s in pruner.trace.structures}
    slim = apply_plan(copy.deepcopy(dense), make_plan(pruner.trace, keep, {}))
    assert [type(layer.self_attn) for layer in slim.encoder.layers] == [nn.MultiheadAttention, PrunedMultiheadAttention]
    assert slim.encoder.layers[0].self_attn.embed_dim == 8
    x = torch.randn(2, 6, 12)
    expected = slim(x)
    with plain_attention(slim):
        torch.testing.assert_close(slim(x), expected)


def test_saved_copied_trained_and_cut_again(dense, tmp_path):
    x = torch.randn(2, 6, 12)
    slim = timm_epfs.prune(dense, macs=0.6, example_input=x[:1])
    again = timm_epfs.prune(slim, macs=0.7, example_input=x[:1])
    for model, folder in ((slim, tmp_path / 'once'), (again, tmp_path / 'twice')):
        timm_epfs.save_pretrained(model, folder)
        loaded = timm_epfs.load_pretrained(Model().eval(), folder)
        assert str(loaded) == str(model)
        assert torch.equal(loaded(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    again.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


def test_macs_are_those_of_torchs_counter(dense, exact):
    x = torch.zeros(1, 6, 12)
    cut = exact(macs=0.5)
    assert cut.pruning_plan.cost['macs'] == (count_macs(dense, (x,), {}), count_macs(cut, (x,), {}))


def test_masks_learn_heads(dense):
    torch.manual_seed(0)
    model = copy.deepcopy(dense).train()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'EPFS learns without Center Loss')
        learner = timm_epfs.EPFS(model, macs=0.6, steps=4, example_input=torch.zeros(1, 6, 12), exclude=['embed'])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        (model(torch.randn(4, 6, 12)).square().mean() + learner.penalty(torch.zeros(4))).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
    slim, x = learner.export().eval(), torch.randn(2, 6, 12)
    assert any(isinstance(layer, PrunedMultiheadAttention) for layer in slim.modules())
    with torch.no_grad():
        assert distance(model.eval()(x), slim(x)) < 1e-5


def test_compensation_solves_what_reads_heads(dense, exact):
    images = torch.randn(128, 6, 12)
    slim = exact(macs=0.4, criterion='random')
    plain = copy.deepcopy(slim)
    timm_epfs.compensate(slim, dense, images)
    for name in ('encoder.layers.0.self_attn.out_proj', 'encoder.layers.1.self_attn', 'cross.out_proj'):
        layer, before = slim.get_submodule(name), plain.get_submodule(name)
        weight = 'weight' if name.endswith('out_proj') else 'in_proj_weight'
        assert not torch.equal(getattr(layer, weight), getattr(before, weight))
    fresh = torch.randn(64, 6, 12)
    errors = [(model(fresh) - dense(fresh)).square().mean() for model in (slim, plain)]
    assert errors[0] < errors[1] / 2 and type(dense.cross) is nn.MultiheadAttention


class Masked(nn.Module):
    """Attention with a mask for each head."""

    def __init__(self, is_buffer):
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(12, 8), nn.MultiheadAttention(8, 4), nn.Linear(8, 5)
        mask = torch.rand(4, 6, 6)
        if is_buffer:
            self.register_buffer('mask', mask)
        else:
            self.mask = mask

    def forward(self, x):
        y = self.embed(x)
        return self.head(self.attn(y, y, y, attn_mask=self.mask)[0])


def test_masks_of_heads_are_cut_with_them_or_hold_them():
    x = torch.randn(6, 1, 12)
    held = timm_epfs.inspect(Masked(is_buffer=False), example_input=x)
    assert not any(s.kind == 'heads' for s in held.structures)
    pruner = timm_epfs.Pruner(Masked(is_buffer=True).eval(), example_input=x, only=['attn'])
    plan = pruner.plan(macs=0.8)
    slim = cut_copy(pruner.model, plan)
    zeroed = masked(pruner.model, pruner.structures, {cut.structure.name: cut.keep for cut in plan.cuts})
    assert len(slim.mask) == slim.attn.num_heads < 4 and distance(zeroed(x), slim(x)) < 1e-5


def test_a_mask_for_other_heads_is_refused():
    layer = nn.MultiheadAttention(8, 4)
    x = torch.zeros(6, 1, 8)
    with plain_attention(layer), pytest.raises(ValueError, match='3 masks for 1 inputs and 4 heads'):
        layer(x, x, x, attn_mask=torch.zeros(3, 6, 6))


class Reading(Model):
    """Attention weights, averaged over the heads, are part of what it returns."""

    def forward(self, x):
        y, weights = self.cross(self.queries + self.embed(x).mean(1, keepdim=True), x, x)
        return self.head(y), weights


def test_heads_whose_mean_is_read_are_not_exact():
    found = timm_epfs.inspect(Reading(), example_input=torch.zeros(1, 6, 12))
    row = next(s for s in found.structures if s.kind == 'heads')
    assert not row.exact and row.reason == 'mean over the channels'


def test_the_examples_run():
    assert doctest.testmod(attention).failed == 0
