"""``Pruner``: one trace, one set of scores, any number of budgets, and the model as it was."""
import copy
import dataclasses
import inspect
import re
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import distance, flat, randomise
from test_train import DIGITS, few_digits, quick  # noqa: F401, a fixture
from torch import nn

import timm_epfs
from timm_epfs.cli import main
from timm_epfs.core import PruningError
from timm_epfs.importance import criteria
from timm_epfs.latency import device_latency
from timm_epfs.pruner import pruner as pruner_file
from timm_epfs.pruner import scorer


@pytest.fixture
def traces(monkeypatch):
    """Models that were traced, in order."""
    traced, trace_model = [], pruner_file.trace_model

    def noted(model, *args, **kwargs):
        traced.append(model)
        return trace_model(model, *args, **kwargs)

    monkeypatch.setattr(pruner_file, 'trace_model', noted)
    return traced


def kept(plan):
    return {cut.structure.name: cut.keep.tolist() for cut in plan.cuts}


def share(plan, quantity='macs'):
    dense, left = plan.cost[quantity]
    return left / dense


def test_many_budgets_from_one_trace(traces):
    model = randomise(timm.create_model('test_resnet'))
    before = copy.deepcopy(model.state_dict())
    pruner = timm_epfs.Pruner(model)
    half, third, few = pruner(macs=0.5), pruner(macs=0.33, criterion='fpgm'), pruner.plan(params=0.4)
    assert pruner.inspect().to_dict() == timm_epfs.inspect(model, kinds=pruner.kinds).to_dict()
    assert traces == [model, model]  # the pruner's, and that of inspect()
    assert share(half.pruning_plan) == pytest.approx(0.5, abs=0.01)
    assert share(third.pruning_plan) == pytest.approx(0.33, abs=0.01)
    assert share(few, 'params') == pytest.approx(0.4, abs=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for slim in (half, third) for p in slim.parameters())


def test_prune_is_a_pruner_called_once():
    model = timm.create_model('test_resnet')
    options = dict(criterion='l1', scope='local', floor=0.1, ratios={'layer1': 0.25})
    slim = timm_epfs.prune(model, macs=0.5, exclude=['layer4'], **options)
    again = timm_epfs.Pruner(model, exclude=['layer4'])(0.5, **options)
    assert again.pruning_plan.to_json() == slim.pruning_plan.to_json()
    assert again.pruning_plan.to_json() == timm_epfs.Pruner(model, exclude=['layer4']).plan(0.5, **options).to_json()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), slim.state_dict().values()))


def test_scores_are_found_out_once(monkeypatch):
    scored, score = [], criteria.score

    def noted(model, structures, criterion, **options):
        scored.append(criterion)
        return score(model, structures, criterion, **options)

    monkeypatch.setattr(scorer, 'score', noted)
    pruner = timm_epfs.Pruner('test_resnet')
    for macs in (0.4, 0.6, 0.8):
        pruner(macs=macs)
        pruner.plan(macs=macs, criterion='l1', widths='l2')
    assert scored == ['l2', 'l1']


def test_data_is_read_when_a_criterion_needs_it():
    read = []

    class Loader:
        def __iter__(self):
            read.append(1)
            yield torch.randn(2, 3, 160, 160), torch.tensor([1, 2])

    pruner = timm_epfs.Pruner('test_resnet', data=Loader())
    pruner.plan(macs=0.5, criterion='l2')
    assert not read
    assert share(pruner.plan(macs=0.5, criterion='taylor')) == share(pruner.plan(macs=0.5, criterion='taylor'))
    assert len(read) == 1


def test_a_plan_is_what_the_cut_was_made_by_and_stays_as_it_is():
    pruner = timm_epfs.Pruner('test_resnet')
    plan = pruner.plan(macs=0.5)
    text = plan.to_json()
    slim = timm_epfs.rebuild(plan)
    pruner(macs=0.3)
    assert plan.to_json() == text == slim.pruning_plan.to_json()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.base = 'resnet18'


def test_a_pruned_model_is_pruned_on_and_the_plans_compose():
    first = timm_epfs.prune('test_resnet', macs=0.7)
    pruner = timm_epfs.Pruner(first)
    second = pruner(macs=0.7)
    assert share(second.pruning_plan) == pytest.approx(0.49, abs=0.01)
    assert len(second.pruning_plan.recipe['steps']) == 2
    rebuilt = timm_epfs.rebuild(second.pruning_plan)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in second.named_parameters()}


def test_a_learner_takes_a_pruner_in_place_of_tracing_again(traces):
    model = randomise(timm.create_model('test_resnet', num_classes=5)).train()
    pruner = timm_epfs.Pruner(model, kinds=['filters'], exclude=['layer4'])
    one_shot = pruner.plan(macs=0.6)
    for method in (timm_epfs.EPFS, timm_epfs.SSS, timm_epfs.SFP, timm_epfs.OneShot):
        learner = method(pruner, macs=0.6, steps=3)
        assert {s.name for s in learner.structures} == {s.name for s in pruner.structures}
        assert share(learner.plan()) == pytest.approx(0.6, abs=0.01)
        learner.remove()
    assert traces == [model]
    slim = pruner(macs=0.6)
    learner = timm_epfs.OneShot(pruner, macs=0.6)
    assert kept(learner.plan()) == kept(one_shot)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert distance(flat(slim.eval()(images)), flat(learner.export().eval()(images))) < 1e-5
    with pytest.raises(PruningError, match="has a learner's masks"):
        pruner(macs=0.6)


def test_what_a_pruner_says_is_not_said_again():
    pruner = timm_epfs.Pruner(timm.create_model('test_resnet'))
    with pytest.raises(PruningError, match='kinds= was given with a Pruner'):
        timm_epfs.EPFS(pruner, macs=0.5, steps=5, kinds=['filters'])


@pytest.mark.parametrize('budget', [timm_epfs.Budget(params=0.5), timm_epfs.Budget(macs=50e6)])
def test_a_budget_is_passed_whole(budget):
    model = timm.create_model('test_resnet')
    plan = timm_epfs.Pruner(model).plan(budget)
    dense, left = plan.cost[budget.quantity]
    assert left / dense == pytest.approx(budget.share(dense), abs=0.01)
    assert plan.recipe[budget.quantity] == budget.value
    learner = timm_epfs.OneShot(model, budget, steps=3)
    assert learner.plan().cost == plan.cost and learner.plan().recipe[budget.quantity] == budget.value


def test_learners_keep_to_a_budget_of_parameters():
    model = timm.create_model('test_resnet', num_classes=5).train()
    learner = timm_epfs.EPFS(model, params=0.5, steps=6)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(6):
        images, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        loss = torch.nn.functional.cross_entropy(model(images), target) + learner.penalty(target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
    assert share(learner.export().pruning_plan, 'params') == pytest.approx(0.5, abs=0.01)
    assert learner.alive == pytest.approx(0.5, abs=0.01)


def test_a_miss_is_said_once_where_it_was_asked_for():
    pruner = timm_epfs.Pruner('test_vit', kinds=['heads'])
    with pytest.warns(UserWarning, match='the nearest cut found leaves .* were asked for') as said:
        pruner(macs=0.87)
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize('call, message', [
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, exlude=['x']), 'unknown keyword exlude=; did you mean exclude='),
    (lambda: timm_epfs.prune(timm.create_model('test_resnet'), macs=0.5, exlude=['x']), 'did you mean exclude='),
    (lambda: timm_epfs.Pruner('test_resnet')(macs=0.5, criterium='l1'), 'did you mean criterion='),
    (lambda: timm_epfs.Pruner('test_resnet').plan(macs=0.5, depth=1), 'unknown keyword depth=; known are criterion'),
    (lambda: timm_epfs.Pruner('test_resnet').plan(macs=0.5, data=[]), r'data= belongs to Pruner\(model, data=…\), not'),
    (lambda: timm_epfs.Pruner('test_resnet')(macs=0.5, exclude=['x']), r'exclude= belongs to Pruner\(model, exclude='),
    (lambda: timm_epfs.Pruner('test_resnet', criterion='l1'), r'criterion= belongs to the cut, pruner\(macs=…, crit'),
    (lambda: timm_epfs.Pruner(timm.create_model('test_resnet'), widths='l1'), 'widths= belongs to the cut'),
    (lambda: timm_epfs.inspect('test_resnet', macs=0.5), r'macs= belongs to the cut, pruner\(macs=…\), not to Pruner'),
    (lambda: timm_epfs.Pruner('test_resnet').check(macs=0.5, exlude=['x']), 'exlude=; did you mean exclude='),
    (lambda: timm_epfs.EPFS(timm.create_model('test_resnet'), macs=0.5, exlude=['x']), 'did you mean exclude='),
    (lambda: timm_epfs.SSS(timm.create_model('test_resnet'), macs=0.5, steps=5, gama=1), 'did you mean gamma='),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, depths=[1]), "can't be built with"),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, kinds='heads'), 'give a list'),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, kinds=['filter']), "there is no kind 'filter'"),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, widths='neyman'),
     "widths='neyman' was given; choose 'sensitivity', 'cost'"),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, widths='cost', kinds=['channels', 'blocks']), 'not which blocks'),
    (lambda: timm_epfs.prune('test_resnet', macs=0.5, criterion='magic'), "unknown criterion 'magic'"),
    (lambda: timm_epfs.Pruner(timm.create_model('test_resnet'), device='cpu'), 'goes with a model\'s name'),
    (lambda: timm_epfs.Pruner(3), 'int was given; give a name or an nn.Module'),
])
def test_what_is_wrong_is_said_in_a_line(call, message):
    with pytest.raises(PruningError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def test_synonyms_are_the_same_kinds():
    model = timm.create_model('test_resnet')
    plans = [timm_epfs.Pruner(model, kinds=[kind]).plan(macs=0.5) for kind in ('channels', 'filters', 'neurons')]
    assert kept(plans[0]) == kept(plans[1]) == kept(plans[2])
    assert plans[1].recipe['kinds'] == ['channels']


def test_one_rule_for_patterns():
    """A residual stream is named by any layer that writes to it."""
    pruner = timm_epfs.Pruner('resnet18')
    stream = next(s for s in pruner.structures if s.matches('layer1.1.conv2'))
    assert stream.matches('conv1') and stream.matches('layer1') and stream.matches('*.1.conv2')
    plan = pruner.plan(macs=0.6, ratios={'layer1.1.conv2': 0.5})
    assert len(kept(plan)[stream.name]) == 32
    assert stream.name in timm_epfs.Pruner('resnet18', exclude=['layer1.1.conv2']).fixed
    assert stream.name not in timm_epfs.Pruner('resnet18', only=['layer1.1.conv2']).fixed


@pytest.mark.parametrize('name, wildcard, literals', [
    ('resnet20_cifar', 'layer?.0', ['layer1.0', 'layer2.0', 'layer3.0']),
    ('resnet20_cifar', 'layer*.0', ['layer1.0', 'layer2.0', 'layer3.0']),
    ('test_vit', 'blocks.*.mlp', [f'blocks.{i}.mlp' for i in range(6)]),
    ('test_vit', '*.attn', [f'blocks.{i}.attn' for i in range(6)]),
    ('test_vit', 'blocks.[01]', ['blocks.0', 'blocks.1']),
])
def test_a_wildcard_that_names_modules_is_their_names(name, wildcard, literals):
    model = timm.create_model(name)
    for option in ('exclude', 'only'):
        by_wildcard = timm_epfs.Pruner(model, **{option: [wildcard]})
        by_names = timm_epfs.Pruner(model, **{option: literals})
        assert by_wildcard.fixed == by_names.fixed
        assert 0 < len(by_wildcard.structures) < len(timm_epfs.Pruner(model).structures)


@pytest.mark.parametrize('option', ['exclude', 'only'])
def test_a_pattern_of_other_kinds_protects_nothing_and_is_refused(option):
    """Blocks alone are cut here, so a layer's name does nothing."""
    with pytest.raises(PruningError, match=r"'layer1\.0\.conv1' matches only channels, which .* because of kinds="):
        timm_epfs.Pruner('resnet20_cifar', kinds=['blocks'], **{option: ['layer1.0.conv1']})


def test_a_pruner_reports_what_it_may_cut():
    model = timm.create_model('test_vit')
    for options in ({'exclude': ['blocks.*.mlp']}, {'only': ['*.attn']}, {'kinds': ['blocks']}):
        pruner = timm_epfs.Pruner(model, **options)
        report = pruner.inspect()
        assert [row.name for row in report.structures] == [s.name for s in pruner.structures]
        assert report.left_out == len(pruner.fixed) > 0 and f'{report.left_out} more' in str(report)
        options = {'kinds': pruner.kinds, **options}
        assert timm_epfs.inspect(model, **options).to_dict() == report.to_dict()
    whole = timm_epfs.inspect(model)
    assert whole.left_out == 0 and whole.macs_share > report.macs_share
    assert f'all {whole.left_out + len(whole.structures)} structures are left out' in str(
        timm_epfs.inspect(model, exclude=['*']))
    streams = timm_epfs.Pruner(model, streams=False).inspect()
    assert not any(row.stream for row in streams.structures) and any(row.stream for row in whole.structures)


def test_a_pruner_and_its_plan_are_shown_in_a_line():
    pruner = timm_epfs.Pruner('test_resnet', exclude=['layer4'])
    names = len(pruner.structures), len(pruner.trace.structures)
    assert repr(pruner) == '<Pruner of test_resnet: {} of {} structures may be cut>'.format(*names)
    plan = pruner.plan(macs=0.6)
    cut = sum(len(cut.keep) < cut.structure.units for cut in plan.cuts)
    shares = r'(59|60)\.\d % of the MACs, \d+\.\d % of the parameters left'
    assert re.fullmatch(f'<Plan of test_resnet: {cut} of {names[1]} structures cut, {shares}>', repr(plan))
    assert repr(timm_epfs.Plan(None, {}, ())) == '<Plan of a module: 0 of 0 structures cut>'


def test_none_is_no_pattern_and_no_ratio():
    model = timm.create_model('test_resnet')
    assert timm_epfs.Pruner(model, exclude=None, only=None).fixed == timm_epfs.Pruner(model, exclude=[]).fixed
    with pytest.raises(PruningError, match=r'only=\[\] was given, which leaves nothing to cut'):
        timm_epfs.EPFS(model, macs=0.5, steps=5, only=[])


@pytest.mark.parametrize('method', ['epfs', 'none'])
def test_a_run_traces_once(traces, tmp_path, method):
    phases = ['--epochs', '2', '--dense-epochs', '1'] + ['--sparse-epochs', '1'] * (method != 'none')
    assert main([*DIGITS, '--method', method, *phases, '-o', str(tmp_path / 'run')]) == 0
    assert len(traces) == 1


@pytest.mark.parametrize('method, cuts', [('epfs', 2), ('none', 1)])
def test_a_run_times_its_layers_once_and_searches_no_more_than_it_needs(monkeypatch, tmp_path, method, cuts):
    """A learner searches at the start and when the selection is made, a ranking once."""
    made, matched = [], []

    class Noted(device_latency.DeviceLatency):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)

        def match(self, budget, cut, dense=None):
            matched.append(1)
            cut(0.8)
            return device_latency.Match(share=0.8, target=0.8, dense=1.0, pruned=0.8)

        def alignment(self):
            return 4

    class Table:
        machine = {'device': 'abacus', 'threads': 1}

        def __init__(self, device, together=False):
            pass

        def __call__(self, kernel, left):
            return 1e-9 * sum(np.prod(array.shape(left)) for array in kernel.arrays)

        def learn(self, calls):
            pass

    monkeypatch.setattr(device_latency, 'Table', Table)
    monkeypatch.setattr(pruner_file, 'DeviceLatency', Noted)
    phases = ['--epochs', '2', '--dense-epochs', '1'] + ['--sparse-epochs', '1'] * (method != 'none')
    budget = ['--latency', '0.8']
    options = [*DIGITS[:DIGITS.index('--macs')], *budget, '--method', method, *phases, '-o', str(tmp_path / 'run')]
    assert main(options) == 0
    assert len(made) == 1 and len(matched) == cuts


def test_signatures_say_the_same():
    """What prune() takes is what a Pruner and its call take, with the same defaults."""
    parameters = inspect.signature(timm_epfs.prune).parameters
    functions = timm_epfs.Pruner, timm_epfs.Pruner.__call__, pruner_file.make_request
    parts = {name: p for function in functions for name, p in inspect.signature(function).parameters.items()}
    other = 'model', 'model_args', 'self', 'options'
    own = {name: p.default for name, p in parameters.items() if name not in other}
    assert own == {name: p.default for name, p in parts.items() if name not in other}


def test_data_compensates_each_cut():
    images = [torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    model = timm.create_model('resnet20_cifar').eval()
    pruner = timm_epfs.Pruner(model, data=iter(images))  # kept, for each of the cuts
    plain = pruner(macs=0.7, criterion='l2', compensate=False)
    first, second = (pruner(macs=macs, criterion='l2') for macs in (0.7, 0.6))
    assert 'compensated' not in plain.pruning_plan.recipe
    assert first.pruning_plan.recipe['compensated'] == second.pruning_plan.recipe['compensated'] == {'images': 64}
    loss = [F.mse_loss(slim.eval()(images[0]), model(images[0])).item() for slim in (plain, first)]
    assert loss[1] < loss[0]
    again = timm_epfs.compensate(plain, model, images)
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), first.state_dict().values()))


def test_a_model_that_was_pruned_before_is_compensated_for_the_last_cut():
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = timm_epfs.prune('resnet20_cifar', macs=0.8).eval()
    second = timm_epfs.prune(first, macs=0.8, criterion='l2', data=images)
    steps = second.pruning_plan.recipe['steps']
    assert [step.get('compensated') for step in steps] == [None, {'images': 24}]


def test_nothing_is_warned_of_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm_epfs.prune('test_resnet', macs=0.5)


def test_a_model_that_is_cut_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        slim = timm_epfs.prune('resnet20_cifar', macs=0.5)
    slim(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


@pytest.mark.parametrize('norm, width', [
    (nn.InstanceNorm2d(32), 'num_features'),
    (nn.InstanceNorm2d(32, affine=True), 'num_features'),
    (nn.BatchNorm2d(32, affine=False, track_running_stats=False), 'num_features'),
    (nn.GroupNorm(8, 32, affine=False), 'num_channels'),
], ids=str)
def test_a_norm_says_its_width_with_and_without_tensors(norm, width):
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), norm, nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 1))
    slim = timm_epfs.prune(model, macs=0.5, example_input=x[:1])
    assert getattr(slim[1], width) == slim[0].out_channels < 32
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch warns where an InstanceNorm says another width than it gets
        slim(x)
