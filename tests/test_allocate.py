import itertools
import time
import warnings
from math import ceil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import timm_epfs
from timm_epfs.allocate import SCOPES, allocate, budget_from
from timm_epfs.allocate.allocation import Budget
from timm_epfs.core import CostModel, Member, PruningError, Size, Structure

repeatable = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def structure(name, units, kind='channels', entries=1, role='out'):
    index = np.arange(units * entries).reshape(units, entries)
    return Structure(name, kind, units, (Member(f'{name}.weight', 0, role, index),))


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
    budget = budget_from(structures, cost, macs=macs)
    dense = cost('macs', cost.counts({s.name: s.units for s in structures}))
    grid = itertools.product(*(range(ceil(s.units / 10), s.units + 1) for s in structures))
    reachable = np.array([cost('macs', np.array(left)) / dense for left in grid])
    nearest = np.abs(reachable - macs).min()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            kept = allocate(
                structures, random_scores(structures, seed), cost, budget, scope=scope, round_to=round_to)
        except PruningError:
            assert macs < reachable.min()
            return
    off = abs(share_left(structures, cost, kept) - macs)
    assert macs >= reachable.min()
    assert off <= 0.01 or nearest > 0.01
    assert bool(caught) == (off > 0.01)


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
    budget = budget_from(structures, cost, **{quantity: share})
    kept = allocate(structures, scores, cost, budget, scope=scope, floor=floor)
    assert share_left(structures, cost, kept, quantity) == pytest.approx(share, abs=0.01)
    for s in structures:
        units = kept[s.name]
        assert units.dtype == np.int64 and len(units) >= max(1, ceil(floor * s.units))
        ranked = sorted(range(s.units), key=lambda unit: (-scores[s.name][unit], unit))
        assert units.tolist() == sorted(ranked[:len(units)])


@pytest.mark.parametrize('scope', SCOPES)
def test_fine_steps_land_within_a_fifth_of_a_percent(scope):
    structures, cost = conv_chain([64, 64, 128, 128, 256, 256, 512, 512], [64, 64, 16, 16, 4, 4, 1, 1])
    for macs in np.linspace(0.1, 0.95, 18):
        kept = allocate(
            structures, random_scores(structures), cost, budget_from(structures, cost, macs=macs), scope=scope)
        assert share_left(structures, cost, kept) == pytest.approx(macs, abs=0.002)
        assert all(len(kept[s.name]) % 8 == 0 for s in structures)


def test_global_is_one_threshold():
    structures, cost = conv_chain([512] * 6)
    scores = random_scores(structures)
    kept = allocate(structures, scores, cost, budget_from(structures, cost, macs=0.4), round_to=1)
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
        allocate(structures, scores, cost, budget_from(structures, cost, macs=share), scope='local', round_to=1)
        for share in shares
    )
    ratios = [len(small[s.name]) / s.units for s in structures]
    assert max(ratios) - min(ratios) <= 1 / min(widths) + 1e-9
    assert all(set(small[s.name]) <= set(large[s.name]) for s in structures)


def test_equal_scores_are_cut_by_equal_shares_in_every_scope_that_ranks_by_them():
    structures, cost = conv_chain([256, 512, 256, 512])
    # Means of equal numbers are rarely the same to the last bit.
    scores = {s.name: np.full(s.units, 1 + i * 2e-16) for i, s in enumerate(structures)}
    for scope in set(SCOPES) - {'neyman'}:
        kept = allocate(
            structures, scores, cost, budget_from(structures, cost, params=0.5), scope=scope, round_to=1)
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
    budget = budget_from(structures, cost, macs=0.6)
    left = counts(allocate(structures, scores, cost, budget, scope='isomorphic', round_to=1))
    assert left['wide0'] + left['wide1'] == pytest.approx(0.6 * 800, abs=1)
    assert left['slim0'] + left['slim1'] == pytest.approx(0.6 * 400, abs=1)
    assert left['heads'] == pytest.approx(0.6 * 200, abs=1)
    assert left['wide0'] < left['wide1'] - 50 and left['slim0'] < left['slim1']

    # The same scores ranked over all structures spare the heads.
    assert counts(allocate(structures, scores, cost, budget, round_to=1))['heads'] == 200


def test_isomorphic_tells_shapes_apart_by_their_members():
    plain = [structure(f'plain{i}', 200) for i in range(2)]
    double = [structure(f'double{i}', 200, entries=2) for i in range(2)]
    structures, cost = independent(*((s, 1) for s in plain + double))
    scores = {s.name: np.full(200, 10.0 if s in double else 1.0) for s in structures}
    kept = allocate(
        structures, scores, cost, budget_from(structures, cost, macs=0.5), scope='isomorphic', round_to=1)
    assert counts(kept) == {s.name: 100 for s in structures}


def test_neyman_keeps_units_by_the_root_of_their_cost_and_by_the_layers_that_they_reach():
    coupled = Structure('coupled', 'channels', 400, tuple(
        Member(f'{name}.weight', dim, role, np.arange(400)[:, None])
        for name, dim, role in (('conv', 0, 'out'), ('norm', 0, 'per'), ('next', 1, 'in'))))
    heads = structure('heads', 100, kind='heads', entries=4)
    plain = (structure('cheap', 400), 1), (structure('dear', 400), 4), (structure('slim', 200), 4)
    structures, cost = independent(*plain, (coupled, 16), (heads, 4))
    budget = budget_from(structures, cost, macs=0.4)
    left = counts(allocate(structures, random_scores(structures), cost, budget, scope='neyman', round_to=1))
    # n ∝ units · layers · √channels / √cost: 400 · 1 / 1, 400 · 1 / 2, 200 · 1 / 2, 400 · 2 / 4, 100 · √4 / 2
    shares = [left[name] / left['cheap'] for name in ('dear', 'slim', 'coupled', 'heads')]
    assert np.allclose(shares, [1/2, 1/4, 1/2, 1/4], atol=0.01)

    scores = random_scores(structures, seed=1)
    kept = allocate(structures, scores, cost, budget, scope='neyman', round_to=1)
    assert counts(kept) == left
    for name, units in kept.items():
        assert scores[name][units].min() >= np.delete(scores[name], units).max(initial=0)


def test_neyman_says_nothing_about_blocks():
    structures, cost = independent((structure('conv', 40), 1), (structure('block', 1, kind='blocks'), 10))
    budget = budget_from(structures, cost, macs=0.5)
    scores = random_scores(structures)
    with pytest.raises(PruningError, match="scope='neyman' says how wide layers are, not which blocks stay"):
        allocate(structures, scores, cost, budget, scope='neyman')
    assert len(allocate(structures, scores, cost, budget, scope='neyman', fixed=['block'])['conv']) == 15


def test_repair_takes_what_loses_the_least_importance():
    # One unit of 'big' is 10 % of the model: its steps end 5 % off the target, and 'low' costs less importance to cut.
    structures, cost = independent(
        (structure('big', 8), 10), (structure('high', 20), 0.5), (structure('low', 20), 0.5))
    scores = {'big': np.full(8, 0.1), 'high': np.full(20, 2.0), 'low': np.full(20, 1.0)}
    kept = allocate(structures, scores, cost, budget_from(structures, cost, macs=0.55), round_to=1)
    assert counts(kept) == {'big': 4, 'high': 20, 'low': 10}


def test_repair_of_many_steps_starts_with_the_least_importance():
    # 20 steps close the gap; a structure goes no further than 16 from its place for it.
    structures, cost = independent(
        (structure('big', 8), 10), (structure('high', 40), 0.25), (structure('low', 40), 0.25))
    scores = {'big': np.full(8, 0.1), 'high': np.linspace(2, 3, 40), 'low': np.linspace(1, 2, 40)}
    kept = allocate(structures, scores, cost, budget_from(structures, cost, macs=0.55), round_to=1)
    assert counts(kept) == {'big': 4, 'high': 36, 'low': 24}


def test_explicit_rounding_is_kept():
    structures, cost = conv_chain([64, 100, 128, 256, 256], [16, 16, 4, 1, 1])
    for macs in (0.2, 0.5, 0.8):
        kept = allocate(
            structures, random_scores(structures), cost, budget_from(structures, cost, macs=macs), round_to=16)
        assert all(len(kept[s.name]) % 16 == 0 or len(kept[s.name]) == s.units for s in structures)


def test_rounding_counts_the_entries_of_a_unit_and_leaves_heads_alone():
    index = np.arange(128 * 6).reshape(128, 6)
    mixed = Structure('mixed', 'channels', 128, (
        Member('mixed.weight', 0, 'out', index[:, :4]), Member('after.weight', 1, 'in', index)))
    only_in = structure('only_in', 120, entries=6, role='in')
    structures, cost = independent((mixed, 1), (only_in, 1), (structure('attn', 31, 'heads'), 1))
    seen = {name: set() for name in ('mixed', 'only_in', 'attn')}
    for macs in np.linspace(0.15, 0.9, 40):
        kept = allocate(
            structures, random_scores(structures), cost, budget_from(structures, cost, macs=macs), round_to=8)
        for name, units in kept.items():
            seen[name].add(len(units))
    assert {left % 2 for left in seen['mixed']} == {0} and {left % 4 for left in seen['mixed']} == {0, 2}
    assert {left * 6 % 8 for left in seen['only_in']} == {0} and {left % 8 for left in seen['only_in']} == {0, 4}
    assert any(left % 8 for left in seen['attn'] - {31})


def test_explicit_rounding_that_cannot_meet_the_budget_warns():
    structures, cost = conv_chain([64, 64])
    budget = budget_from(structures, cost, macs=0.4)
    message = r'^round_to=32 leaves \d+\.\d % of the MACs where 40\.0 % were asked'
    with pytest.warns(UserWarning, match=message) as caught:
        kept = allocate(structures, random_scores(structures), cost, budget, round_to=32)
    dense = cost('macs', np.array([64, 64]))
    reachable = [cost('macs', np.array(left)) / dense for left in itertools.product((32, 64), repeat=2)]
    achieved = share_left(structures, cost, kept)
    assert abs(achieved - 0.4) == pytest.approx(min(abs(share - 0.4) for share in reachable))
    assert f'{100 * achieved:.1f} %' in str(caught[0].message)
    assert caught[0].filename == __file__


def test_default_rounding_gives_way_in_as_few_structures_as_possible():
    structures, cost = conv_chain([64, 64, 64])
    dense = cost('macs', np.array([64, 64, 64]))
    grid = [cost('macs', np.array(left)) / dense for left in itertools.product(range(8, 65, 8), repeat=3)]
    # In the middle of the widest gap between what multiples of 8 reach.
    grid = np.unique([share for share in grid if share > 0.3])
    widest = np.diff(grid).argmax()
    macs = (grid[widest] + grid[widest + 1]) / 2
    assert np.diff(grid)[widest] > 0.02
    kept = allocate(structures, random_scores(structures), cost, budget_from(structures, cost, macs=macs))
    assert share_left(structures, cost, kept) == pytest.approx(macs, abs=0.01)
    assert sum(len(units) % 8 > 0 for units in kept.values()) == 1


def test_default_rounding_gives_way_down_to_the_floor():
    structures, cost = conv_chain([64, 64, 64, 64])
    lowest = cost('macs', np.full(4, 2)) / cost('macs', np.full(4, 64))
    kept = allocate(
        structures, random_scores(structures), cost, budget_from(structures, cost, macs=lowest), floor=1 / 32)
    assert share_left(structures, cost, kept) == pytest.approx(lowest, abs=0.01)


def test_default_rounding_gives_way_where_another_structure_closes_the_gap():
    # Multiples of 2 reach 80 and 85; 82.5 takes back the head and cuts an odd number of channels.
    structures, cost = independent((structure('attn', 3, 'heads'), 20), (structure('conv', 16), 2.5))
    scores = {'attn': np.full(3, 0.1), 'conv': np.ones(16)}
    kept = allocate(structures, scores, cost, budget_from(structures, cost, macs=0.825))
    assert counts(kept) == {'attn': 3, 'conv': 9}


def test_whole_units_too_coarse_for_the_budget_warn():
    structures, cost = independent((structure('attn', 2, 'heads'), 1))
    with pytest.warns(UserWarning, match='^cutting whole units leaves 50.0 % of the MACs where 60.0 % were asked'):
        kept = allocate(structures, random_scores(structures), cost, budget_from(structures, cost, macs=0.6))
    assert counts(kept) == {'attn': 1}


def test_ratios_are_set_first_and_the_rest_meets_the_budget():
    names = ['stem', 'layer1.0.conv1', 'layer1.0.conv1#2', 'layer10.conv1', 'layer2.conv1', 'layer2.conv2', 'head']
    structures, cost = conv_chain([80] * 7, names=names)
    kept = allocate(
        structures, random_scores(structures), cost, budget_from(structures, cost, macs=0.4),
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
    ('*.fc', ['a.fc', 'ab.fc']),
    ('a*', ['a.fc', 'a.fc#2', 'ab.fc']),
])
def test_ratios_go_by_name_prefix_or_pattern(pattern, matches):
    structures, cost = independent(*((structure(name, 100), 1) for name in ('a.fc', 'a.fc#2', 'ab.fc', 'rest')))
    budget = budget_from(structures, cost, macs=0.6)
    kept = allocate(structures, random_scores(structures), cost, budget, ratios={pattern: 0.33}, round_to=1)
    assert [name for name, left in counts(kept).items() if left == 67] == matches


def test_ratios_that_cut_below_the_budget_warn():
    structures, cost = independent((structure('a', 100), 1), (structure('b', 100), 1))
    with pytest.warns(UserWarning, match='^ratios= leaves 60.0 % of the MACs where 80.0 % were asked'):
        kept = allocate(
            structures, random_scores(structures), cost, budget_from(structures, cost, macs=0.8),
            ratios={'a': 0.8}, round_to=1)
    assert counts(kept) == {'a': 20, 'b': 100}


def test_order_of_structures_and_scores_decides_nothing():
    structures, cost = conv_chain([64, 64, 128, 24, 128])
    scores = {s.name: np.round(values, 1) for s, values in zip(structures, random_scores(structures).values())}
    budget = budget_from(structures, cost, macs=0.37)
    for scope in SCOPES:
        first = allocate(structures, scores, cost, budget, scope=scope)
        again = allocate(structures[::-1], dict(reversed(scores.items())), cost, budget, scope=scope)
        assert list(again) == [s.name for s in structures[::-1]]
        assert all(np.array_equal(first[name], again[name]) for name in first)


def test_inputs_are_left_alone():
    structures, cost = conv_chain([32, 32])
    scores = random_scores(structures)
    before = {name: values.copy() for name, values in scores.items()}
    allocate(structures, scores, cost, budget_from(structures, cost, macs=0.5))
    assert all(np.array_equal(scores[name], before[name]) for name in scores)


@pytest.mark.parametrize('scope', SCOPES)
def test_ten_times_the_structures_take_ten_times_as_long(scope):
    """About 13 ms for 400 of them; steps that go as the square of their number would take 100 times as long."""
    def seconds(repeats):
        structures, cost = conv_chain([128, 32, 64, 256] * repeats)
        scores = random_scores(structures)
        budget = budget_from(structures, cost, macs=0.5)
        taken = []
        for _ in range(3):
            start = time.process_time()
            kept = allocate(structures, scores, cost, budget, scope=scope)
            taken.append(time.process_time() - start)
        assert share_left(structures, cost, kept) == pytest.approx(0.5, abs=0.002)
        return min(taken)

    few = seconds(10)
    assert seconds(100) < 40 * few


def test_budget_is_a_share_or_a_count():
    structures, cost = conv_chain([16, 32])
    dense = cost('params', np.array([16, 32]))
    assert budget_from(structures, cost, params=0.25) == Budget('params', dense / 4)
    assert budget_from(structures, cost, params=1000) == Budget('params', 1000.0)
    assert budget_from(structures, cost, macs=np.float32(0.5)).quantity == 'macs'


@pytest.mark.parametrize('asked, message', [
    ({}, '0 budgets'),
    ({'macs': 0.5, 'params': 0.5}, '2 budgets'),
    *(({'macs': value}, 'macs=') for value in (0, -0.5, float('nan'), float('inf'), True, '0.5')),
    ({'macs': 1.0}, 'the dense model has'),
    ({'params': 1e12}, 'the dense model has'),
])
def test_bad_budgets(asked, message):
    structures, cost = conv_chain([16, 32])
    with pytest.raises(PruningError, match=message):
        budget_from(structures, cost, **asked)


def test_unknown_quantity():
    with pytest.raises(PruningError, match="'activations'.*macs, params"):
        Budget('activations', 10)


@pytest.mark.parametrize('options, message', [
    ({'scope': 'layer'}, "scope='layer'"),
    *(({'round_to': value}, 'round_to=') for value in (0, -8, 8.0, True)),
    *(({'floor': value}, 'floor=') for value in (1, -0.1, float('nan'), None)),
    ({'fixed': ['conv9']}, "fixed= names 'conv9'"),
    ({'ratios': {'conv9*': 0.5}}, "'conv9\\*'"),
    ({'ratios': {'conv1': 0.5}, 'fixed': ['conv1']}, "'conv1'"),
    *(({'ratios': {'conv1': value}}, 'share from 0 to 0.9') for value in (0.95, -0.1, float('nan'), True, 'half')),
])
def test_bad_options(options, message):
    structures, cost = conv_chain([16, 32])
    with pytest.raises(PruningError, match=message):
        allocate(structures, random_scores(structures), cost, budget_from(structures, cost, macs=0.5), **options)


@pytest.mark.parametrize('scores, message', [
    (None, 'conv1 has no scores'),
    (np.ones(31), r'conv1 has scores of shape \(31,\) for 32 units'),
    (np.full(32, np.nan), 'conv1 has scores that are not finite'),
    (np.full(32, np.inf), 'conv1 has scores that are not finite'),
])
def test_bad_scores_name_the_structure(scores, message):
    structures, cost = conv_chain([64, 32])
    given = {'conv0': np.ones(64)} if scores is None else {'conv0': np.ones(64), 'conv1': scores}
    budget = budget_from(structures, cost, macs=0.5)
    with pytest.raises(PruningError, match=message):
        allocate(structures, given, cost, budget)
    # What is not cut needs no scores.
    assert len(allocate(structures, given, cost, budget, fixed=['conv1'])['conv1']) == 32


def test_out_of_reach_says_how_far_it_goes():
    structures, cost = independent((structure('a', 100), 1), (structure('b', 100), 1))
    scores = random_scores(structures)
    message = r'asked for 5\.0 % of the MACs \(10\).*floor of 10\.0 % of the units the model can reach 10\.0 %.*floor='
    with pytest.raises(PruningError, match=message):
        allocate(structures, scores, cost, Budget('macs', 10))
    with pytest.raises(PruningError, match=r'can reach 55\.0 %'):
        allocate(structures, scores, cost, Budget('macs', 100), fixed=['a'])
    with pytest.raises(PruningError, match='asked for 100.0 % of the MACs'):
        allocate(structures, scores, cost, Budget('macs', 200))
    assert counts(allocate(structures, scores, cost, Budget('macs', 20))) == {'a': 10, 'b': 10}


def test_structures_and_cost_model_of_different_models():
    structures, cost = conv_chain([16, 32])
    with pytest.raises(PruningError, match='one trace'):
        allocate(structures[:1], random_scores(structures), cost, Budget('macs', 10))


def test_numpy_numbers_are_numbers():
    plan = timm_epfs.prune('test_resnet', macs=np.float64(0.5)).pruning_plan
    assert plan.recipe['macs'] == 0.5 and timm_epfs.Plan.from_json(plan.to_json()).recipe == plan.recipe
