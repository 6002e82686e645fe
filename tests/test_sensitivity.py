"""Scores from what layers see, and measured sensitivity: against brute force in numpy, and on networks made for it."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from sklearn.isotonic import IsotonicRegression
from test_compensation import PAIRS
from test_criteria import Attention
from torch import nn

import timm_epfs
from timm_epfs.cli import main
from timm_epfs.core import PruningError
from timm_epfs.importance import Curve, gather_statistics, measure_sensitivity, score
from timm_epfs.importance.curves import _non_decreasing
from timm_epfs.importance.statistics import refitted
from timm_epfs.trace import trace


class TwoLayers(nn.Module):
    """A layer, and one that reads it."""

    def __init__(self, hidden=6, classes=3):
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.second = nn.Linear(hidden, classes)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return TwoLayers().eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(400, 5)


def structures_of(model, example):
    return trace(model, (example,)).structures


def best_error(covariance, weight, stays):
    """Variance of what a layer loses without some features, with the best weights for those that stay."""
    gone = np.setdiff1d(np.arange(len(covariance)), stays)
    left = covariance[np.ix_(stays, stays)]
    schur = covariance[np.ix_(gone, gone)]
    if len(stays):
        across = covariance[np.ix_(stays, gone)]
        schur = schur - across.T @ np.linalg.solve(left, across)
    return np.trace(weight[gone].T @ schur @ weight[gone])


def read_by_second(net, images):
    structure, = structures_of(net, images[:1])
    consumer, = gather_statistics(net, [structure], images).consumers_of(structure)
    return consumer.damped[0].numpy().astype(np.float64), net.second.weight.detach().numpy().T.astype(np.float64)


def test_obs_is_greedy_removal_by_brute_force(net, images):
    covariance, weight = read_by_second(net, images)
    total = best_error(covariance, weight, [])
    stays, expected, spent = list(range(6)), np.empty(6), 0.0
    while stays:
        errors = {unit: best_error(covariance, weight, [u for u in stays if u != unit]) for unit in stays}
        unit = min(errors, key=errors.get)
        expected[unit], spent = (errors[unit] - spent) / total, errors[unit]
        stays.remove(unit)
    order = np.argsort(expected)
    found = score(net, structures_of(net, images[:1]), 'obs', data=images)['first']
    grown = np.maximum.accumulate(expected[order])
    np.testing.assert_allclose(found[order], grown / grown.mean(), rtol=2e-2)


def test_energy_is_the_variance_that_a_unit_adds(net, images):
    covariance, weight = read_by_second(net, images)
    expected = np.diag(covariance) * np.square(weight).sum(1)
    found = score(net, structures_of(net, images[:1]), 'energy', data=images)['first']
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=2e-2)


@pytest.mark.parametrize('make, shape', PAIRS.values(), ids=PAIRS)
def test_units_that_others_can_stand_in_for_go_first(make, shape):
    """Half of the units are combinations of the other half: any half of them costs nothing, in any kind of layer."""
    torch.manual_seed(0)
    dense = make().eval()
    images = torch.randn(96, *shape)
    structures = structures_of(dense, images[:1])
    statistics = gather_statistics(dense, structures, images)
    structure = next(s for s in structures if s.name == 'first')
    scores = score(dense, structures, 'obs', statistics=statistics)
    half = structure.units // 2
    cheap = np.sort(scores['first'])[:half]
    assert cheap.max() < 0.05 * scores['first'].max()
    curve = measure_sensitivity(dense, [structure], scores, statistics).curves['first']
    free = [d for count, d in zip(curve.removed, curve.divergence) if count <= half]
    dear = [d for count, d in zip(curve.removed, curve.divergence) if count > half]
    assert max(free) < 0.5 * min(dear)


def test_refitted_weights_are_those_of_numpy():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6))
    weight = generator.normal(size=(6, 2))
    best, *_ = np.linalg.lstsq(rows[:, :4], rows @ weight, rcond=None)
    found = refitted(torch.tensor(rows.T @ rows)[None], torch.tensor(weight)[None], torch.tensor([4, 5]))
    np.testing.assert_allclose(found[0, :4], best, rtol=1e-8)
    assert not found[0, 4:].any()


def test_heads_are_scored_as_wholes():
    torch.manual_seed(0)
    net = Attention().eval()
    with torch.no_grad():
        net.proj.weight[:, 2:4] = 0  # nothing reads the second head
    images = torch.randn(64, 4, 8)
    heads = next(s for s in structures_of(net, images[:1]) if s.kind == 'heads')
    for criterion in ('obs', 'energy'):
        scores = score(net, [heads], criterion, data=images)[heads.name]
        assert scores.shape == (3,) and scores.argmin() == 1 and scores[1] < 1e-6 < scores[0]


def test_the_marginals_are_those_of_isotonic_regression():
    generator = np.random.default_rng(0)
    values, weights = generator.random(12), generator.random(12) + 0.1
    expected = IsotonicRegression().fit_transform(np.arange(12), values, sample_weight=weights)
    np.testing.assert_allclose(_non_decreasing(values, weights), expected)


def test_marginals_grow_and_add_up_to_what_was_measured():
    curve = Curve(np.arange(40), (4, 10, 16, 22, 28, 34), (0.01, 0.04, 0.1, 0.2, 0.35, 0.6), *[(np.nan,) * 6] * 3)
    marginal = curve.marginal()
    assert marginal.shape == (40,) and (np.diff(marginal) > 0).all()
    for count, divergence in zip(curve.removed, curve.divergence):
        assert marginal[:count].sum() == pytest.approx(divergence, rel=0.35)


def divergence(new, old):
    return float(F.kl_div(F.log_softmax(new, 1), F.log_softmax(old, 1), log_target=True, reduction='batchmean'))


def test_a_block_costs_what_the_cut_model_loses():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32)
    pruner = timm_epfs.Pruner('resnet20_cifar', kinds=['blocks'], only=['layer1.1'], data=images)
    randomise(pruner.model)
    curve = pruner.sensitivity().curves['layer1.1']
    slim = pruner(macs=0.885, criterion='l2', compensate=False).eval()
    measured_on = images[torch.arange(16) % 4 == 3]
    with torch.no_grad():
        expected = divergence(slim(measured_on), pruner.model.eval()(measured_on))
    assert curve.removed == (1,) and curve.divergence[0] == pytest.approx(expected, rel=1e-4)


def test_the_model_is_as_it_was(net, images):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner = timm_epfs.Pruner(net, example_input=images[:1], data=images)
    pruner.sensitivity()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_model_is_as_it_was_after_a_failure(net, images, monkeypatch):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner = timm_epfs.Pruner(net, example_input=images[:1], data=images)
    pruner.scores('obs')
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) > 2:
            raise ValueError('no more')
        return nn.Module.__call__(net, *args)

    monkeypatch.setattr(net, 'forward', lambda x, forward=net.forward: (calls.append(1), forward(x))[1] if len(
        calls) < 2 else fail(x))
    with pytest.raises(PruningError, match='sensitivity can\'t be measured'):
        pruner.sensitivity()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_batch_size_and_repetition_change_nothing():
    torch.manual_seed(0)
    images, labels = torch.randn(48, 3, 32, 32), torch.randint(10, (48,))
    model = randomise(timm_epfs.zoo.create_model('resnet20_cifar')).eval()
    results = []
    for size in (48, 48, 7):
        data = list(zip(images.split(size), labels.split(size)))
        pruner = timm_epfs.Pruner(model, data=data, only=['layer2.1', 'layer3.1.conv1'])
        results.append(pruner.sensitivity())
    first, again, small = results
    assert first.to_dict() == again.to_dict()
    assert first.images == 12 and 0 <= first.top1 <= 100
    for name, curve in first.curves.items():
        assert sorted(curve.order) == list(range(curve.units)) and curve.removed == small.curves[name].removed
        np.testing.assert_allclose(small.curves[name].divergence, curve.divergence, rtol=0.05, atol=1e-5)


def test_without_labels_or_classes_what_is_not_known_is_left_out(net, images):
    unlabelled = timm_epfs.Pruner(net, example_input=images[:1], data=images).sensitivity()
    curve = unlabelled.curves['first']
    assert np.isnan(unlabelled.top1) and np.isnan(curve.top1).all() and np.isfinite(curve.same_class).all()
    assert unlabelled.to_dict()['structures']['first']['top1'] == [None] * len(curve.removed)
    assert 'same' in str(unlabelled) and 'top-1' not in str(unlabelled)

    class Features(TwoLayers):
        def forward(self, x):
            hidden = self.first(x).tanh()
            return {'deep': self.second(hidden), 'pooled': self.second(hidden).mean(1)}

    features = Features().eval()
    curve = timm_epfs.Pruner(features, example_input=images[:1], data=images).sensitivity().curves['first']
    assert np.isnan(curve.same_class).all() and 0 < curve.divergence[0] < curve.divergence[-1] < 4


class Unequal(nn.Module):
    """Two branches of one shape. The output hardly depends on the first."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud = (nn.Conv2d(3, 32, 3, padding=1) for _ in range(2))
        self.from_quiet, self.from_loud = (nn.Conv2d(32, 10, 1) for _ in range(2))
        with torch.no_grad():
            self.from_quiet.weight.mul_(1e-3)
            self.from_loud.weight.mul_(10)

    def forward(self, x):
        return (self.from_quiet(self.quiet(x).relu()) + self.from_loud(self.loud(x).relu())).mean((2, 3))


def test_what_the_output_hardly_depends_on_goes_first():
    torch.manual_seed(0)
    model, images = Unequal().eval(), torch.randn(32, 3, 8, 8)
    pruner = timm_epfs.Pruner(model, example_input=images[:1], data=images)
    plan = pruner.plan(macs=0.55)
    left = {cut.structure.name: len(cut.keep) for cut in plan.cuts}
    assert left['loud'] == 32 and left['quiet'] < 8
    assert plan.recipe['criterion'] == 'obs' and plan.recipe['widths'] == 'sensitivity'
    blind = {cut.structure.name: len(cut.keep) for cut in pruner.plan(macs=0.55, criterion='uniform').cuts}
    assert blind['loud'] < 24


def test_what_is_given_is_taken_and_the_rest_is_the_best_that_the_data_allows(net, images):
    with_images = timm_epfs.Pruner(net, example_input=images[:1], data=images)
    without = timm_epfs.Pruner(net, example_input=images[:1])

    def recipe(pruner, **options):
        found = pruner.plan(params=0.7, **options).recipe
        return found['criterion'], found.get('widths')

    assert recipe(without) == ('l2', None)
    assert recipe(with_images) == ('obs', 'sensitivity')
    assert recipe(with_images, widths='l1') == ('obs', 'l1')
    assert recipe(with_images, criterion='obs') == ('obs', None)
    assert recipe(with_images, criterion='fpgm', widths='sensitivity') == ('fpgm', 'sensitivity')
    for options in ({'criterion': 'obs'}, {'widths': 'sensitivity'}, {'criterion': 'energy'}):
        with pytest.raises(PruningError, match='needs images, found none; give data=') as error:
            without(params=0.7, **options)
        assert '\n' not in str(error.value)
    with pytest.raises(PruningError, match='needs images, found none'):
        without.sensitivity()


def test_learners_take_measured_widths(net, images):
    pruner = timm_epfs.Pruner(net, example_input=images[:1], data=images)
    learner = timm_epfs.OneShot(pruner, params=0.7, steps=1, widths='sensitivity')
    assert learner.plan().recipe['widths'] == 'sensitivity'


class Computed(TwoLayers):
    """Its second layer has no bias, one that the forward computes (as BEiT does), or one that the third has, too."""

    def __init__(self, bias):
        super().__init__(hidden=16, classes=8)
        self.kind = bias
        self.third = nn.Linear(8, 3)
        self.halves = nn.ParameterList([torch.randn(4), torch.randn(4)])
        if bias == 'tied':
            self.third = nn.Linear(8, 8)
            self.third.bias = self.second.bias
        elif bias == 'none':
            self.second.bias = None

    def forward(self, x):
        bias = torch.cat([*self.halves]) if self.kind == 'computed' else self.second.bias
        return self.third(F.linear(self.first(x).relu() + 0.5, self.second.weight, bias).relu())


@pytest.mark.parametrize('bias', ['none', 'computed', 'tied'])
def test_a_layer_without_a_bias_of_its_own_makes_up_for_what_went_without_one(bias, images):
    torch.manual_seed(0)
    net = Computed(bias).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruner = timm_epfs.Pruner(net, example_input=images[:1], data=images, only=['first'])
    consumer, = gather_statistics(net, pruner.structures, images).consumers_of(pruner.structures[0])
    rows = (net.first(images).relu() + 0.5).detach().numpy().astype(np.float64)
    kept = np.arange(400) % 4 != 3
    np.testing.assert_allclose(consumer.covariance[0], rows[kept].T @ rows[kept] / kept.sum(), rtol=1e-4)
    curve = pruner.sensitivity().curves['first']
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    slim = pruner(params=0.9)
    zeroed = pruner(params=0.9, compensate=False)
    with torch.no_grad():
        assert divergence(slim(images), net(images)) < divergence(zeroed(images), net(images))
    assert np.isfinite(curve.divergence).all()


def test_of_a_single_image_what_reads_a_single_row_has_no_say():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    image = torch.randn(1, 3, 8, 8)
    scores = score(model.eval(), structures_of(model, image), 'obs', data=image)
    assert np.isfinite(scores['0']).all() and (scores['0'] < 1e6).all()


def test_labels_that_say_unknown_are_none(net, images):
    unknown = [(images, -torch.ones(400, dtype=torch.long))]
    assert np.isnan(timm_epfs.Pruner(net, example_input=images[:1], data=unknown).sensitivity().top1)


def test_outputs_that_are_not_finite_are_refused(images):
    class Masked(TwoLayers):
        def forward(self, x):
            return super().forward(x) / 0

    pruner = timm_epfs.Pruner(Masked().eval(), example_input=images[:1], data=images)
    with pytest.raises(PruningError, match='output isn\'t finite on these images; give criterion='):
        pruner(params=0.7)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from PIL import Image
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for name in ('a', 'b'):
        (root / 'train' / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / 'train' / name / f'{i}.png')
    return root


def test_the_command_prints_a_table_and_writes_json_and_a_picture(folder, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    files = ['--json', str(tmp_path / 'found.json'), '--plot', str(tmp_path / 'found.png')]
    arguments = ['--data-dir', str(folder), '-j', '0', '--only', 'layer3', '-b', '8']
    assert main(['sensitivity', 'resnet20_cifar', *arguments, *files]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found['model'] == 'resnet20_cifar' and found['images'] == 4
    assert all(name in printed for name in found['structures']) and len(found['structures']) > 4
    assert (tmp_path / 'found.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('arguments, message', [
    (['--json', 'nowhere/found.json'], 'there is no folder nowhere'),
    (['--plot', 'found.jpg'], 'only .png is drawn'),
    (['--criterion', 'obd'], "unknown criterion 'obd'"),
    (['--exclude', '*'], 'nothing is left to measure'),
])
def test_the_command_refuses_what_would_fail_later(folder, arguments, message, capsys):
    data = ['--data-dir', str(folder), '-j', '0', '--only', 'layer3']
    assert main(['sensitivity', 'resnet20_cifar', *data, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('timm-epfs: error: ') and message in error
