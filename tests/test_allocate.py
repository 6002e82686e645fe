import doctest
import itertools
import re
from math import ceil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import timm_epfs
from timm_epfs.allocate import SCOPES, allocate, allocation, cost_aware_width_weights, path, search
from timm_epfs.core import Budget, CostModel, Member, OutOfReach, PruningError, Size, Structure

repeatable = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def structure(name, units, kind='channels', entries=1, role='out'):
    index = np.arange(units * entries).reshape(units, entries)
    return Structure(name, kind, units, (Member(f'{name}.weight', 0, role, index),))


def keep(*args, floor=0.1, **options):
    """The units that stay, by structure name."""
    return allocate(*args, floor=floor, **options).keep


def conv_chain(widths, areas=None, names=None):
    """3x3 convolutions one after the other from an image, then a classifier; ``areas`` are h·w of the outputs."""
    areas = areas or [1] * len(widths)
    structures = [structure(names[i] if names else f'conv{i}', width) for i, width in enumerate(widths)]
    sizes = [Size(3), *(Size(0, ((s.name, 1),)) for s in structures)]
    terms = [('macs', 9.0 * area, pair) for area, pair in zip(areas, zip(sizes, sizes[1:]))]
    terms += [('params', 9.0, pair) for pair in zip(sizes, sizes[1:])]
    terms += [(quantity, 1.0, (sizes[-1], Size(10))) for quantity in ('macs', 'params')]
    return structures, CostModel([s.name for s in structures], terms)


def independent(*parts):
    """Structures that don't share a layer: (structure, cost of a unit)."""
    terms = [('macs', float(price), (Size(0, ((s.name, 1),)),)) for s, price in parts]
    return [s for s, _ in parts], CostModel([s.name for s, _ in parts], terms)


def random_scores(structures, seed=0):
    rng = np.random.default_rng(seed)
    scores = {s.name: rng.lognormal(0, 0.7, s.units) for s in structures}
    return {name: values / values.mean() for name, values in scores.items()}


def share_left(structures, cost, kept, quantity='macs'):
    dense = cost(quantity, cost.counts({s.name: s.units for s in structures}))
    return cost(quantity, cost.counts({name: len(units) for name, units in kept.items()})) / dense


def counts(kept):
    return {name: len(units) for name, units in kept.items()}


@st.composite
def small_problems(draw):
    # The repair is a local search: of problems as small as these it misses one or two in a thousand, none in this run.
    widths = draw(st.lists(st.sampled_from([8, 12, 16, 20, 24]), min_size=1, max_size=3))
    areas = draw(st.lists(st.sampled_from([1, 4, 16, 64]), min_size=len(widths), max_size=len(widths)))
    return conv_chain(widths, areas)


@repeatable
@given(
    problem=small_problems(),
    scope=st.sampled_from(SCOPES),
    macs=st.floats(0.02, 0.98),
    round_to=st.sampled_from([1, None]),
    seed=st.integers(0, 99),
)
def test_budget_is_met_wherever_an_exhaustive_search_meets_it(problem, scope, macs, round_to, seed):
    structures, cost = problem
    budget = Budget(macs=macs)
    dense = cost('macs', cost.counts({s.name: s.units for s in structures}))
    grid = itertools.product(*(range(ceil(s.units / 10), s.units + 1) for s in structures))
    reachable = np.array([cost('macs', np.array(left)) / dense for left in grid])
    nearest = np.abs(reachable - macs).min()

    if macs < reachable.min():
        with pytest.raises(OutOfReach):
            keep(structures, random_scores(structures, seed), cost, budget, scope=scope, round_to=round_to)
        return
    found = allocate(
        structures, random_scores(structures, seed), cost, budget, scope=scope, round_to=round_to, floor=0.1)
    off = abs(share_left(structures, cost, found.keep) - macs)
    assert off <= 0.01 or nearest > 0.01
    assert bool(found.problem) == (off > 0.01)
    assert found.target == macs and abs(found.achieved - macs) == pytest.approx(off)


@repeatable
@given(
    widths=st.lists(st.sampled_from([16, 40, 64, 96, 256]), min_size=2, max_size=12),
    scope=st.sampled_from(SCOPES),
    quantity=st.sampled_from(['macs', 'params']),
    share=st.floats(0.1, 0.95),
    floor=st.sampled_from([0.0, 0.1, 0.25]),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 99),
)
def test_highest_scores_stay_above_the_floor(widths, scope, quantity, share, floor, levels, seed):
    structures, cost = conv_chain(widths)
    rng = np.random.default_rng(seed)
    scores = {s.name: rng.integers(0, levels, s.units) / levels for s in structures}
    budget = Budget(**{quantity: share})
    kept = keep(structures, scores, cost, budget, scope=scope, floor=floor)
    assert share_left(structures, cost, kept, quantity) == pytest.approx(share, abs=0.01)
    for s in structures:
        units = kept[s.name]
        assert units.dtype == np.int64 and len(units) >= max(1, ceil(floor * s.units))
        ranked = sorted(range(s.units), key=lambda unit: (-scores[s.name][unit], unit))
        assert units.tolist() == sorted(ranked[:len(units)])


@pytest.mark.parametrize('units, price, macs', [
    (21, 0, 0.3), (43, 0, 0.5), (46, 0, 0.7), (64, 3, 0.3), (64, 3, 0.5), (128, 0, 0.7), (128, 3, 0.5),
])
def test_one_structure_keeps_the_width_that_is_nearest_to_the_budget(units, price, macs):
    """What a layer from and to the same channels costs grows with their square."""
    width = Size(0, (('conv', 1),))
    cost = CostModel(['conv'], [('macs', 1.0, (width, width)), ('macs', float(price * units), (width,))])
    shares = {left: share_left([structure('conv', units)], cost, {'conv': range(left)}) for left in range(1, units + 1)}
    kept = keep([structure('conv', units)], {'conv': np.arange(units)}, cost, Budget(macs=macs))['conv']
    nearest = min(abs(share - macs) for share in shares.values())
    assert abs(shares[len(kept)] - macs) <= max(nearest, search.TOLERANCE)


@pytest.mark.parametrize('scope', SCOPES)
def test_fine_steps_land_within_a_fifth_of_a_percent(scope):
    structures, cost = conv_chain([64, 64, 128, 128, 256, 256, 512, 512], [64, 64, 16, 16, 4, 4, 1, 1])
    for macs in np.linspace(0.1, 0.95, 18):
        kept = keep(
            structures, random_scores(structures), cost, Budget(macs=macs), scope=scope)
        assert share_left(structures, cost, kept) == pytest.approx(macs, abs=0.002)
        assert all(len(kept[s.name]) % 8 == 0 for s in structures)


def test_global_is_one_threshold():
    structures, cost = conv_chain([512] * 6)
    scores = random_scores(structures)
    kept = keep(structures, scores, cost, Budget(macs=0.4), round_to=1)
    left = np.concatenate([scores[name][units] for name, units in kept.items()])
    cut = np.concatenate([np.delete(scores[name], units) for name, units in kept.items()])
    assert left.min() > cut.max()


@repeatable
@given(
    widths=st.lists(st.sampled_from([256, 384, 512]), min_size=4, max_size=6),
    shares=st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2).map(sorted),
)
def test_local_cuts_the_same_share_and_smaller_budgets_keep_a_subset(widths, shares):
    structures, cost = conv_chain(widths)
    scores = random_scores(structures)
    small, large = (
        keep(structures, scores, cost, Budget(macs=share), scope='local', round_to=1)
        for share in shares
    )
    ratios = [len(small[s.name]) / s.units for s in structures]
    assert max(ratios) - min(ratios) <= 1 / min(widths) + 1e-9
    assert all(set(small[s.name]) <= set(large[s.name]) for s in structures)


def test_equal_scores_are_cut_by_equal_shares_in_every_scope_that_ranks_by_them():
    structures, cost = conv_chain([256, 512, 256, 512])
    # Means of equal numbers are rarely the same to the last bit.
    scores = {s.name: np.full(s.units, 1 + i * 2e-16) for i, s in enumerate(structures)}
    for scope in SCOPES:
        kept = keep(
            structures, scores, cost, Budget(params=0.5), scope=scope, round_to=1)
        ratios = [len(kept[s.name]) / s.units for s in structures]
        assert max(ratios) - min(ratios) <= 1 / 256
        assert all(units.tolist() == list(range(len(units))) for units in kept.values())


def test_isomorphic_ranks_within_shapes_and_cuts_shapes_alike():
    structures, cost = independent(
        *((structure(f'wide{i}', 400), 1) for i in range(2)),
        *((structure(f'slim{i}', 200), 1) for i in range(2)),
        (structure('heads', 200, kind='heads'), 1),
    )
    rng = np.random.default_rng(0)
    level = {'wide0': 1.0, 'wide1': 2.0, 'slim0': 10.0, 'slim1': 11.0, 'heads': 100.0}
    scores = {s.name: level[s.name] * rng.uniform(0.5, 1.5, s.units) for s in structures}
    budget = Budget(macs=0.6)
    left = counts(keep(structures, scores, cost, budget, scope='isomorphic', round_to=1))
    assert left['wide0'] + left['wide1'] == pytest.approx(0.6 * 800, abs=1)
    assert left['slim0'] + left['slim1'] == pytest.approx(0.6 * 400, abs=1)
    assert left['heads'] == pytest.approx(0.6 * 200, abs=1)
    assert left['wide0'] < left['wide1'] - 50 and left['slim0'] < left['slim1']

    # The same scores ranked over all structures spare the heads.
    assert counts(keep(structures, scores, cost, budget, round_to=1))['heads'] == 200


def test_isomorphic_tells_shapes_apart_by_their_members():
    plain = [structure(f'plain{i}', 200) for i in range(2)]
    double = [structure(f'double{i}', 200, entries=2) for i in range(2)]
    structures, cost = independent(*((s, 1) for s in plain + double))
    scores = {s.name: np.full(200, 10.0 if s in double else 1.0) for s in structures}
    kept = keep(
        structures, scores, cost, Budget(macs=0.5), scope='isomorphic', round_to=1)
    assert counts(kept) == {s.name: 100 for s in structures}


def test_cost_aware_widths_keep_units_by_the_root_of_their_cost_and_by_the_layers_that_they_reach():
    coupled = Structure('coupled', 'channels', 400, tuple(
        Member(f'{name}.weight', dim, role, np.arange(400)[:, None])
        for name, dim, role in (('conv', 0, 'out'), ('norm', 0, 'per'), ('next', 1, 'in'))))
    heads = structure('heads', 100, kind='heads', entries=4)
    plain = (structure('cheap', 400), 1), (structure('costly', 400), 4), (structure('slim', 200), 4)
    structures, cost = independent(*plain, (coupled, 16), (heads, 4))
    budget = Budget(macs=0.4)
    weights = cost_aware_width_weights(structures, cost, 'macs')
    left = counts(keep(structures, random_scores(structures), cost, budget, width_weights=weights, round_to=1))
    # n ∝ units · layers · √channels / √cost: 400 · 1 / 1, 400 · 1 / 2, 200 · 1 / 2, 400 · 2 / 4, 100 · √4 / 2
    shares = [left[name] / left['cheap'] for name in ('costly', 'slim', 'coupled', 'heads')]
    assert np.allclose(shares, [1/2, 1/4, 1/2, 1/4], atol=0.01)

    scores = random_scores(structures, seed=1)
    kept = keep(structures, scores, cost, budget, width_weights=weights, round_to=1)
    assert counts(kept) == left
    for name, units in kept.items():
        assert scores[name][units].min() >= np.delete(scores[name], units).max(initial=0)


def test_cost_says_nothing_about_blocks():
    structures, cost = independent((structure('conv', 40), 1), (structure('block', 1, kind='blocks'), 10))
    with pytest.raises(PruningError, match="widths='cost' says how wide layers become, not which blocks stay"):
        cost_aware_width_weights(structures, cost, 'macs')
    assert set(cost_aware_width_weights(structures, cost, 'macs', fixed=['block'])) == {'conv'}


def test_widths_keep_proportions_and_what_has_none_is_ranked():
    structures, cost = independent(*((structure(name, 60), 1) for name in ('narrow', 'wide', 'ranked')))
    scores = random_scores(structures)
    scores['ranked'] = np.r_[np.full(20, 9.0), np.zeros(40)]
    weights = {'narrow': 20.0, 'wide': 40.0}
    kept = keep(structures, scores, cost, Budget(macs=80 / 180), width_weights=weights, round_to=1)
    assert counts(kept) == {'narrow': 20, 'wide': 40, 'ranked': 20} and kept['ranked'].tolist() == list(range(20))


def test_top_is_what_a_full_sort_gives():
    scores = np.random.default_rng(0).integers(0, 5, 12).astype(float)
    best_first = sorted(range(12), key=lambda unit: (-scores[unit], unit))
    for left in range(13):
        assert allocation.top(scores, left).tolist() == sorted(best_first[:left])


def test_repair_takes_what_loses_the_least_importance():
    # One unit of 'big' is 10 % of the model: its steps end 5 % off the target, and 'low' costs less importance to cut.
    structures, cost = independent(
        (structure('big', 8), 10), (structure('high', 20), 0.5), (structure('low', 20), 0.5))
    scores = {'big': np.full(8, 0.1), 'high': np.full(20, 2.0), 'low': np.full(20, 1.0)}
    kept = keep(structures, scores, cost, Budget(macs=0.55), round_to=1)
    assert counts(kept) == {'big': 4, 'high': 20, 'low': 10}


def test_repair_of_many_steps_starts_with_the_least_importance():
    # 20 steps close the gap; a structure goes no further than 16 from its place for it.
    structures, cost = independent(
        (structure('big', 8), 10), (structure('high', 40), 0.25), (structure('low', 40), 0.25))
    scores = {'big': np.full(8, 0.1), 'high': np.linspace(2, 3, 40), 'low': np.linspace(1, 2, 40)}
    kept = keep(structures, scores, cost, Budget(macs=0.55), round_to=1)
    assert counts(kept) == {'big': 4, 'high': 36, 'low': 24}


def test_explicit_rounding_is_kept():
    structures, cost = conv_chain([64, 100, 128, 256, 256], [16, 16, 4, 1, 1])
    for macs in (0.2, 0.5, 0.8):
        kept = keep(
            structures, random_scores(structures), cost, Budget(macs=macs), round_to=16)
        assert all(len(kept[s.name]) % 16 == 0 or len(kept[s.name]) == s.units for s in structures)


def test_rounding_counts_the_entries_of_a_unit_and_leaves_heads_alone():
    index = np.arange(128 * 6).reshape(128, 6)
    mixed = Structure('mixed', 'channels', 128, (
        Member('mixed.weight', 0, 'out', index[:, :4]), Member('after.weight', 1, 'in', index)))
    only_in = structure('only_in', 120, entries=6, role='in')
    structures, cost = independent((mixed, 1), (only_in, 1), (structure('attn', 31, 'heads'), 1))
    seen = {name: set() for name in ('mixed', 'only_in', 'attn')}
    for macs in np.linspace(0.15, 0.9, 40):
        kept = keep(
            structures, random_scores(structures), cost, Budget(macs=macs), round_to=8)
        for name, units in kept.items():
            seen[name].add(len(units))
    assert {left % 2 for left in seen['mixed']} == {0} and {left % 4 for left in seen['mixed']} == {0, 2}
    assert {left * 6 % 8 for left in seen['only_in']} == {0} and {left % 8 for left in seen['only_in']} == {0, 4}
    assert any(left % 8 for left in seen['attn'] - {31})


def test_explicit_rounding_that_cannot_meet_the_budget_warns():
    structures, cost = conv_chain([64, 64])
    budget = Budget(macs=0.4)
    found = allocate(structures, random_scores(structures), cost, budget, round_to=32)
    assert re.match(r'.* leaves \d+\.\d % of the MACs, 40\.0 % were asked for, because .* round_to=32;', found.problem)
    dense = cost('macs', np.array([64, 64]))
    reachable = [cost('macs', np.array(left)) / dense for left in itertools.product((32, 64), repeat=2)]
    achieved = share_left(structures, cost, found.keep)
    assert abs(achieved - 0.4) == pytest.approx(min(abs(share - 0.4) for share in reachable))
    assert f'{100 * achieved:.1f} %' in found.problem


def test_default_rounding_gives_way_in_as_few_structures_as_possible():
    structures, cost = conv_chain([64, 64, 64])
    dense = cost('macs', np.array([64, 64, 64]))
    grid = [cost('macs', np.array(left)) / dense for left in itertools.product(range(8, 65, 8), repeat=3)]
    # In the middle of the widest gap between what multiples of 8 reach.
    grid = np.unique([share for share in grid if share > 0.3])
    widest = np.diff(grid).argmax()
    macs = (grid[widest] + grid[widest + 1]) / 2
    assert np.diff(grid)[widest] > 0.02
    kept = keep(structures, random_scores(structures), cost, Budget(macs=macs))
    assert share_left(structures, cost, kept) == pytest.approx(macs, abs=0.01)
    assert sum(len(units) % 8 > 0 for units in kept.values()) == 1


def test_default_rounding_gives_way_down_to_the_floor():
    structures, cost = conv_chain([64, 64, 64, 64])
    lowest = cost('macs', np.full(4, 2)) / cost('macs', np.full(4, 64))
    kept = keep(
        structures, random_scores(structures), cost, Budget(macs=lowest), floor=1 / 32)
    assert share_left(structures, cost, kept) == pytest.approx(lowest, abs=0.01)


def test_default_rounding_gives_way_where_another_structure_closes_the_gap():
    # Multiples of 2 reach 80 and 85; 82.5 takes back the head and cuts an odd number of channels.
    structures, cost = independent((structure('attn', 3, 'heads'), 20), (structure('conv', 16), 2.5))
    scores = {'attn': np.full(3, 0.1), 'conv': np.ones(16)}
    kept = keep(structures, scores, cost, Budget(macs=0.825))
    assert counts(kept) == {'attn': 3, 'conv': 9}


def test_whole_units_too_coarse_for_the_budget_warn():
    structures, cost = independent((structure('attn', 2, 'heads'), 1))
    found = allocate(structures, random_scores(structures), cost, Budget(macs=0.6))
    assert found.problem == (
        'the nearest cut found leaves 50.0 % of the MACs, 60.0 % were asked for, because only whole units can be cut; '
        'allow more to be cut with kinds=, exclude= or only=')
    assert counts(found.keep) == {'attn': 1} and (found.target, found.achieved) == (0.6, 0.5)


def test_ratios_are_set_first_and_the_rest_meets_the_budget():
    names = ['stem', 'layer1.0.conv1', 'layer1.0.conv1#2', 'layer10.conv1', 'layer2.conv1', 'layer2.conv2', 'head']
    structures, cost = conv_chain([80] * 7, names=names)
    kept = keep(
        structures, random_scores(structures), cost, Budget(macs=0.4),
        ratios={'layer1': 0.6, 'layer1.0.conv1#2': 0.2, '*.conv2': 0}, fixed=['stem'])
    left = counts(kept)
    assert left['layer1.0.conv1'] == 32 and left['layer1.0.conv1#2'] == 64
    assert left['layer2.conv2'] == left['stem'] == 80
    assert left['layer10.conv1'] < 80 and left['layer2.conv1'] < 80 and left['head'] < 80
    assert share_left(structures, cost, kept) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize('pattern, matches', [
    ('a.fc', ['a.fc', 'a.fc#2']),
    ('a', ['a.fc', 'a.fc#2']),
    ('a.fc#2', ['a.fc#2']),
    ('*.fc', ['a.fc', 'a.fc#2', 'ab.fc']),
    ('a*', ['a.fc', 'a.fc#2', 'ab.fc']),
])
def test_ratios_go_by_name_prefix_or_pattern(pattern, matches):
    structures, cost = independent(*((structure(name, 100), 1) for name in ('a.fc', 'a.fc#2', 'ab.fc', 'rest')))
    budget = Budget(macs=0.6)
    kept = keep(structures, random_scores(structures), cost, budget, ratios={pattern: 0.33}, round_to=1)
    assert [name for name, left in counts(kept).items() if left == 67] == matches


def test_ratios_that_cut_below_the_budget_warn():
    structures, cost = independent((structure('a', 100), 1), (structure('b', 100), 1))
    found = allocate(
        structures, random_scores(structures), cost, Budget(macs=0.8), ratios={'a': 0.8}, round_to=1)
    assert found.problem.startswith(
        'the nearest cut found leaves 60.0 % of the MACs, 80.0 % were asked for, because ratios= alone removes')
    assert counts(found.keep) == {'a': 20, 'b': 100}


def test_order_of_structures_and_scores_decides_nothing():
    structures, cost = conv_chain([64, 64, 128, 24, 128])
    scores = {s.name: np.round(values, 1) for s, values in zip(structures, random_scores(structures).values())}
    budget = Budget(macs=0.37)
    for scope in SCOPES:
        first = keep(structures, scores, cost, budget, scope=scope)
        again = keep(structures[::-1], dict(reversed(scores.items())), cost, budget, scope=scope)
        assert list(again) == [s.name for s in structures[::-1]]
        assert all(np.array_equal(first[name], again[name]) for name in first)


def test_inputs_are_left_alone():
    structures, cost = conv_chain([32, 32])
    scores = random_scores(structures)
    before = {name: values.copy() for name, values in scores.items()}
    keep(structures, scores, cost, Budget(macs=0.5))
    assert all(np.array_equal(scores[name], before[name]) for name in scores)


@pytest.mark.parametrize('scope', SCOPES)
def test_four_hundred_structures_take_a_moment(scope):
    class Counted:
        """Prices as the cost model does, and counts how often it is asked."""

        def __init__(self, cost):
            self.names, self.counts, self.gradient = cost.names, cost.counts, cost.gradient
            self.cost, self.asked = cost, 0

        def __call__(self, quantity, counts):
            self.asked += 1
            return self.cost(quantity, counts)

    structures, cost = conv_chain([128, 32, 64, 256] * 100)
    counted = Counted(cost)
    kept = keep(structures, random_scores(structures), counted, Budget(macs=0.5), scope=scope)
    # Bisection over the 3,100 steps down all grids asks 12 times, repairs some more times.
    assert counted.asked < 50
    assert share_left(structures, cost, kept) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize('module', [allocation, path, search], ids=lambda module: module.__name__.rpartition('.')[2])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_every_structure_goes_down_its_grid_from_the_top_in_the_order_of_its_scores():
    rng = np.random.default_rng(0)
    units = [64, 5, 1, 300]
    grids = [np.append(np.arange(2, n, max(1, n // 9)), n) for n in units]
    descending = [np.sort(rng.random(n))[::-1] for n in units]

    order = path.step_order(grids, descending, np.zeros(4, dtype=int))
    assert np.bincount(order, minlength=4).tolist() == [len(grid) - 1 for grid in grids]
    # One threshold on all scores: every step is taken once its middle unit is the worst that is left.
    at, worst = [len(grid) - 1 for grid in grids], []
    for i in order:
        at[i] -= 1
        worst.append(descending[i][(grids[i][at[i]] + grids[i][at[i] + 1]) // 2])
    assert worst == sorted(worst) and at == [0] * 4

    order = path.step_order(grids, descending, np.arange(4))
    at = [len(grid) - 1 for grid in grids]
    shares = []
    for i in order:
        at[i] -= 1
        shares.append(1 - (grids[i][at[i]] + grids[i][at[i] + 1]) / 2 / units[i])
    assert shares == sorted(shares)


def test_budget_is_a_share_or_a_count():
    structures, cost = conv_chain([16, 32])
    dense = cost('params', np.array([16, 32]))
    assert Budget(params=0.25).share(dense) == 0.25 and Budget(params=dense / 4).share(dense) == 0.25
    assert Budget(macs=np.float32(0.5)).quantity == 'macs' and Budget(macs=np.float32(0.5)).share(10) == 0.5
    assert Budget(latency='3 ms').at(0.4) == Budget(latency=0.4) and Budget(params=7).to_dict() == {'params': 7}
    assert Budget.given() is None and Budget.given(Budget(macs=0.5)) == Budget.given(0.5) == Budget(macs=0.5)


@pytest.mark.parametrize('asked, message', [
    ({}, 'no budget was given'),
    ({'macs': 0.5, 'params': 0.5}, 'macs= and params= were given'),
    *(({'macs': value}, 'macs=') for value in (0, -0.5, float('nan'), float('inf'), True, '0.5')),
    ({'macs': 1.0}, 'the dense model has'),
    ({'params': 1e12}, 'the dense model has'),
])
def test_bad_budgets(asked, message):
    with pytest.raises(PruningError, match=message):
        Budget(**asked).share(dense=1e9)


def test_a_whole_budget_beside_another():
    with pytest.raises(PruningError, match='a Budget was given with params= or latency='):
        Budget.given(Budget(macs=0.5), params=0.5)


@pytest.mark.parametrize('options, message', [
    ({'scope': 'layer'}, "scope='layer' was given; choose one of global"),
    ({'scope': 'globl'}, "scope='globl' was given, nearest is 'global'; choose one of"),
    *(({'round_to': value}, 'round_to=') for value in (0, -8, 8.0, True)),
    *(({'floor': value}, 'floor=') for value in (1, -0.1, float('nan'), None)),
    ({'fixed': ['conv9']}, "fixed= names 'conv9'"),
    ({'ratios': {'conv9*': 0.5}}, "ratios: nothing that can be cut is named 'conv9\\*'; .* such as conv0"),
    ({'ratios': {'nowhere': 0.5}}, "'nowhere'; timm_epfs.inspect lists the names, such as conv0, conv1"),
    ({'ratios': {'conv1': 0.5}, 'fixed': ['conv1']}, "'conv1' matches only channels, which stay uncut because of excl"),
    *(({'ratios': {'conv1': value}}, 'share from 0 to 0.9') for value in (0.95, -0.1, float('nan'), True, 'half')),
])
def test_bad_options(options, message):
    structures, cost = conv_chain([16, 32])
    with pytest.raises(PruningError, match=message):
        keep(structures, random_scores(structures), cost, Budget(macs=0.5), **options)


@pytest.mark.parametrize('scores, message', [
    (None, 'conv1 has no scores'),
    (np.ones(31), r'conv1 has scores of shape \(31,\) for 32 units'),
    (np.full(32, np.nan), 'conv1 has scores that are not finite'),
    (np.full(32, np.inf), 'conv1 has scores that are not finite'),
])
def test_bad_scores_name_the_structure(scores, message):
    structures, cost = conv_chain([64, 32])
    given = {'conv0': np.ones(64)} if scores is None else {'conv0': np.ones(64), 'conv1': scores}
    budget = Budget(macs=0.5)
    with pytest.raises(PruningError, match=message):
        keep(structures, given, cost, budget)
    # What is not cut needs no scores.
    assert len(keep(structures, given, cost, budget, fixed=['conv1'])['conv1']) == 32


def test_out_of_reach_says_how_far_it_goes():
    structures, cost = independent((structure('a', 100), 1), (structure('b', 100), 1))
    scores = random_scores(structures)
    message = r'asked for 5\.0 % of the MACs, the largest possible cut leaves 10\.0 % \(floor=10\.0 % of the units\)'
    with pytest.raises(PruningError, match=message):
        keep(structures, scores, cost, Budget(macs=10))
    with pytest.raises(PruningError, match=r'cut leaves 55\.0 %'):
        keep(structures, scores, cost, Budget(macs=100), fixed=['a'])
    with pytest.raises(PruningError, match='the dense model has 200'):
        keep(structures, scores, cost, Budget(macs=200))
    assert counts(keep(structures, scores, cost, Budget(macs=20))) == {'a': 10, 'b': 10}


def test_structures_and_cost_model_of_different_models():
    structures, cost = conv_chain([16, 32])
    with pytest.raises(PruningError, match='one trace'):
        keep(structures[:1], random_scores(structures), cost, Budget(macs=10))


def test_numpy_numbers_are_numbers():
    plan = timm_epfs.prune('test_resnet', macs=np.float64(0.5)).pruning_plan
    assert plan.recipe['macs'] == 0.5 and timm_epfs.Plan.from_json(plan.to_json()).recipe == plan.recipe
