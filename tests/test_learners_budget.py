"""How learners keep to a budget: λ, the schedule, the floor, and what each mask weighs."""
import numpy as np
import pytest
import timm
import torch
from loop import build, sgd, train

import timm_epfs
from timm_epfs.learn import METHODS


def test_lambda_is_steered_to_the_budget():
    """Long enough for the controller to get there before the ranking does."""
    model = build('resnet20_cifar', in_chans=3)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=150, example_input=torch.empty(1, 3, 16, 16))
    optimizer = sgd(model, 0.02)
    train(model, learner, optimizer, 149, size=16)
    assert learner.alive == pytest.approx(0.5, abs=0.1)
    train(model, learner, optimizer, 1, first=149, size=16)
    assert learner.plan().cost['macs'][1] / learner.plan().cost['macs'][0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize('method, options', [('epfs', {'l2': None}), ('sss', {'kinds': ('neurons',)})])
def test_what_is_alive_follows_the_schedule(method, options):
    def off(follow_schedule):
        """The most that is alive over or under what is wanted, at any step, in units of the costliest structure."""
        model = build()
        learner = METHODS[method](model, macs=0.4, steps=40, follow_schedule=follow_schedule, **options)
        cost, units = learner.pruner.trace.cost, {s.name: s.units for s in learner.pruner.trace.structures}
        dense = cost('macs', cost.counts(units))
        of_a_unit = dict(zip(cost.names, cost.gradient('macs', cost.counts(units)) / dense))
        found = []
        for step in range(1, 40):
            train(model, learner, sgd(model, 0.001), 1, first=step, size=32)
            left = {**units, **{name: int((masks > 0).sum()) for name, masks in learner.values().items()}}
            found.append(cost('macs', cost.counts(left)) / dense - learner.controller.wanted(step))
        return np.abs(found).max() / max(of_a_unit[s.name] for s in learner.structures)

    assert off(True) < 1 < off(False)  # λ alone is late in one case, and early in the other


def test_a_fixed_lambda_leaves_what_it_leaves():
    model = build()
    learner = timm_epfs.EPFS(model, l1=0.3, lr=1.0, weigh=None, l2='elastic', steps=4)
    train(model, learner, sgd(model), 4)
    assert learner.log()['lambda'] == 0.3
    plan, values = learner.plan(), learner.values()
    for cut in plan.cuts:
        if cut.structure.name in values:
            alive = np.flatnonzero(values[cut.structure.name] > 0)
            assert np.array_equal(cut.keep, alive)
    assert 0 < learner.alive < 1


def test_the_floor_holds_and_says_so():
    model = build()
    learner = timm_epfs.EPFS(model, l1=10.0, lr=1.0, steps=9, floor=0.1, weigh=None)
    with pytest.warns(UserWarning, match=r'ℓ1 would leave fewer than \d+ of \d+ units.* give a smaller l1=') as said:
        train(model, learner, sgd(model), 3)
    assert len([w for w in said if 'floor' in str(w.message)]) == 1
    assert all((values > 0).sum() >= max(1, 0.1 * len(values)) for values in learner.values().values())


def test_units_that_the_loss_feels_less_weigh_more():
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', num_classes=10)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=100, kinds=['filters'])
    at = learner.masks.slices['layer1.0.conv1'].start
    grads = torch.ones(learner.masks.units, dtype=torch.float64)
    grads[at], grads[at + 1] = 0.1, 10.0
    for step in range(1, 4):
        learner._measure(grads * (-1) ** step, step)  # on average there's no gradient at all
    weights = learner.weights[at:at + 3] / learner.weights[at + 2]
    assert weights.tolist() == pytest.approx([10.0, 0.1, 1.0])
    assert learner.weights.mean() == pytest.approx(1.0)
    same = timm_epfs.EPFS(timm.create_model('resnet20_cifar', num_classes=10), macs=0.5, steps=100,
                          kinds=['filters'])
    same.load_state_dict(learner.state_dict())
    assert torch.equal(same.weights, learner.weights)


def test_costly_units_weigh_more():
    model = build('resnet18')
    learner = timm_epfs.EPFS(model, l1=0.1, steps=5)
    weights = learner.masks.split(learner.weights.numpy())
    cost = learner.pruner.trace.cost
    counts = cost.counts({s.name: s.units for s in learner.pruner.trace.structures})
    dense = cost('macs', counts)
    for name in ('layer1.0.conv1', 'layer4.0.conv1'):
        saved, reference = (dense - cost('macs', _fewer(cost, counts, each)) for each in (name, 'conv1'))
        assert weights[name][0] / weights['conv1'][0] == pytest.approx(saved / reference)
    assert learner.weights.mean() == pytest.approx(1.0)


def _fewer(cost, counts, name):
    fewer = counts.copy()
    fewer[cost.names.index(name)] -= 1
    return fewer


@pytest.mark.parametrize('given, asked', [
    (dict(widths='fpgm'), dict(criterion='fpgm')),
    (dict(widths='cost'), dict(widths='cost')),
])
@pytest.mark.parametrize('method', ['epfs', 'sss'])
def test_a_criterion_or_the_scope_may_give_the_widths_and_masks_choose_the_units(method, given, asked):
    def kept(plan):
        return {cut.structure.name: cut.keep for cut in plan.cuts}

    model = build()
    one_shot = kept(timm_epfs.prune(model, macs=0.5, floor=0.05, **asked).pruning_plan)
    learner = METHODS[method](model, macs=0.5, steps=10, kinds=('filters',), **given)
    train(model, learner, sgd(model), 10)
    learned = kept(learner.plan())
    assert {name: len(units) for name, units in learned.items()} == {name: len(u) for name, u in one_shot.items()}
    assert any(not np.array_equal(units, one_shot[name]) for name, units in learned.items())
    assert given.items() <= learner.plan().recipe.items()


def test_given_widths_are_kept_in_a_checkpoint():
    """The weights that they were found by have been trained since."""
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=10, widths='l2')
    train(model, learner, sgd(model), 1)
    state = learner.state_dict()
    learner.remove()
    with torch.no_grad():
        model.conv1[0].weight[:5] = 0
    resumed = timm_epfs.EPFS(model, macs=0.5, steps=10, widths='l2')
    assert _widths(resumed.state_dict()) != _widths(state)
    resumed.load_state_dict(state)
    assert _widths(resumed.state_dict()) == _widths(state)


def _widths(state):
    return {name: value for name, value in state.items() if name.startswith('widths.')}


def test_blocks_are_left_to_their_masks_where_widths_are_given():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=10, kinds=('filters', 'blocks'), widths='l2')
    blocks = {s.name for s in learner.structures if s.kind == 'blocks'}
    names = {name.removeprefix('widths.') for name in _widths(learner.state_dict())}
    assert blocks and names == {s.name for s in learner.structures} - blocks
    train(model, learner, sgd(model), 10)
    macs = learner.plan().cost['macs']
    assert macs[1] / macs[0] == pytest.approx(0.5, abs=0.02)


def test_widths_without_a_budget_are_the_masks_own():
    assert not _widths(timm_epfs.EPFS(build(), l1=0.1, widths='l2').state_dict())


@pytest.mark.parametrize('widths', ['taylor', 'nothing'])
def test_widths_by_what_is_no_criterion_of_weights(widths):
    model = build()
    with pytest.raises(timm_epfs.PruningError, match=f"widths='{widths}' was given; choose 'sensitivity', 'cost'"):
        timm_epfs.EPFS(model, macs=0.5, steps=10, widths=widths)
    timm_epfs.EPFS(model, macs=0.5, steps=10)  # nothing is left on the model
