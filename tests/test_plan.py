"""Plans as data: what is written is what is read, and what can't be meant is refused."""
import copy
import doctest
import json
import tracemalloc

import numpy as np
import pytest
import timm
import torch
from hand_plans import VIT, VIT_ARGS, channels, identity, resnet_plan, vit_plan
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from timm_epfs.core import Member, PruningError, Structure, indices, returned, validation
from timm_epfs.plan import FORMAT, Cut, Plan, json_values, notation
from timm_epfs.plan.notation import Ranges, Strided
from timm_epfs.surgery import apply_plan


@pytest.fixture(scope='module')
def plan():
    with torch.device('meta'):
        return vit_plan(timm.create_model(VIT, **VIT_ARGS))


@st.composite
def regular_maps(draw):
    """Nested loops over (count, step) written out, and the number of units."""
    index, span = np.zeros((1, 1), dtype=np.int64), 0
    for _ in range(draw(st.integers(0, 3))):
        count, step = draw(st.integers(2, 4)), span + draw(st.integers(1, 5))
        index = (step * np.arange(count)[:, None] + index).reshape(1, -1)
        span += (count - 1) * step
    units, stride = draw(st.integers(1, 5)), draw(st.integers(1, 50))
    return draw(st.integers(0, 9)) + stride * np.arange(units)[:, None] + index


@given(regular_maps())
def test_regular_maps_are_found_and_regenerated(index):
    found = Strided.find(index)
    read = Strided.parse(str(found), len(index))
    np.testing.assert_array_equal(read.array(), index)
    assert (read.entries, read.top) == (index.size, index.max())


@given(st.integers(1, 5).flatmap(lambda k: st.lists(
    st.lists(st.integers(0, 40), min_size=k, max_size=k, unique=True).map(sorted), min_size=1, max_size=6,
)))
def test_any_map_survives_json(rows):
    index = np.array(rows, dtype=np.int64)
    structure = Structure('a', 'channels', len(index), (Member('a.weight', 1, 'in', index),))
    read = Plan.from_json(Plan(None, {}, (Cut(structure, np.arange(len(index))),)).to_json())
    np.testing.assert_array_equal(read.cuts[0].structure.members[0].index, index)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_survive_text(values):
    values = np.array(sorted(values))
    read = Ranges.parse(str(Ranges.find(values)))
    np.testing.assert_array_equal(read.array(), values)
    assert (read.entries, read.top, read.ascending) == (len(values), values.max(), True)


def test_the_examples_run():
    assert all(doctest.testmod(module).failed == 0 for module in (indices, json_values, notation, returned, validation))


def test_the_rows_of_a_head_read_as_in_the_docs():
    rows = np.arange(3 * 384).reshape(3, 6, 64).swapaxes(0, 1).reshape(6, -1)
    assert str(Strided.find(rows)) == '0 + 64u + 3x384 + 64x1'
    assert str(Ranges.find(np.array([0, 1, 2, 3, 4, 5, 8, 10, 11]))) == '0-5,8,10-11'


def test_json_is_stable_and_readable(plan):
    text = plan.to_json()
    assert Plan.from_json(text).to_json() == text
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_json() == text
    cut = json.loads(text)['cuts'][0]
    assert cut['keep'] == '0,2'
    assert cut['members'][0] == 'blocks.0.attn.qkv.weight dim 0 out at 0 + 64u + 3x192 + 64x1'
    assert text.endswith('}\n')


def test_json_does_not_depend_on_the_order_of_keys(plan):
    shuffled = Plan(plan.base, dict(reversed(plan.base_args.items())), plan.cuts,
                    dict(reversed(plan.attributes.items())), plan.recipe, plan.cost)
    assert shuffled.to_json() == plan.to_json()


def test_every_field_survives():
    members = (identity('a.weight', 0, 'out', 4),)
    structure = Structure('a', 'groups', 4, members, exact=False, reason='ECA', stream=True)
    whole = Structure('b', 'blocks', 1, (Member('b.weight', 0, 'out', np.arange(6)[None]),))
    plan = Plan(
        base='resnet18',
        base_args={'img_size': (32, 48), 'drop_rate': 0.5},
        cuts=(Cut(structure, np.arange(4)), Cut(whole, np.arange(0))),
        attributes={'a.groups': 2},
        recipe={'seed': np.int64(3), 'note': 'é\n', 'nested': [None, True, {'x': 1e-3}]},
        cost={'macs': (10.0, 2.5)},
    )
    read = Plan.from_json(plan.to_json())
    assert read.base == 'resnet18' and read.base_args == {'img_size': [32, 48], 'drop_rate': 0.5}
    assert read.recipe == {'seed': 3, 'note': 'é\n', 'nested': [None, True, {'x': 1e-3}]}
    assert read.attributes == {'a.groups': 2} and read.cost == {'macs': (10.0, 2.5)}
    first, second = (cut.structure for cut in read.cuts)
    assert (first.name, first.kind, first.exact, first.reason, first.stream) == ('a', 'groups', False, 'ECA', True)
    assert (second.kind, second.exact, second.stream) == ('blocks', True, False)
    assert [len(cut.keep) for cut in read.cuts] == [4, 0]


def test_a_plan_of_resnet50_is_small():
    with torch.device('meta'):
        plan = resnet_plan(timm.create_model('resnet50'), 'resnet50')
    assert len(plan.cuts) == 32
    assert len(plan.to_json().encode()) < 100_000


def test_removed_entries_are_the_union_over_structures():
    a = Structure('a', 'channels', 3, (Member('w', 0, 'out', np.array([[0, 1], [2, 3], [4, 5]])),))
    b = Structure('b', 'channels', 2, (Member('w', 0, 'out', np.array([[3], [7]])), identity('v', 1, 'in', 2)))
    plan = Plan(None, {}, (Cut(a, np.array([0, 2])), Cut(b, np.array([1]))))
    removed = plan.removed()
    assert {name: list(dims) for name, dims in removed.items()} == {'w': [0], 'v': [1]}
    assert removed['w'][0].tolist() == [2, 3]


def test_compose_keeps_what_both_keep():
    def one(units, keep, **kwargs):
        return Plan('m', {'x': 1}, (Cut(channels('a', 'n', 'b', units), np.array(keep)),), **kwargs)

    first = one(8, [1, 3, 4, 7], attributes={'p': 4, 'q': 1}, recipe={'m': 1}, cost={'macs': (100, 50)})
    later = one(4, [0, 3], attributes={'p': 2}, recipe={'m': 2}, cost={'macs': (50, 20)})
    both = first.compose(later)
    assert both.cuts[0].keep.tolist() == [1, 7]
    assert both.cuts[0].structure.units == 8
    assert both.attributes == {'p': 2, 'q': 1} and both.cost == {'macs': (100, 20)}
    assert both.compose(one(2, [1], recipe={'m': 3})).recipe == {'steps': [{'m': 1}, {'m': 2}, {'m': 3}]}
    with pytest.raises(PruningError, match='a with 8 units, the first leaves 4'):
        first.compose(first)
    with pytest.raises(PruningError, match='the first has no such structure'):
        first.compose(Plan('m', {}, (Cut(channels('z', 'n', 'b', 4), np.arange(3)),)))
    # what the later plan leaves whole needs no counterpart
    untouched = first.compose(Plan('m', {}, (Cut(channels('z', 'n', 'b', 4), np.arange(4)),)))
    assert untouched.cuts[0].keep.tolist() == [1, 3, 4, 7]
    assert first.uncomposable([channels('z', 'n', 'b', 4), channels('a', 'n', 'b', 4)]) == {'z'}


def test_saved_plans_load(plan, tmp_path):
    plan.save(tmp_path / 'plan.json')
    assert Plan.load(tmp_path / 'plan.json').to_json() == plan.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ['plan.json']


def test_a_failed_save_leaves_the_old_file(plan, tmp_path, monkeypatch):
    (tmp_path / 'plan.json').write_text('old')

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('timm_epfs.core.files.os.replace', full)
    with pytest.raises(PruningError, match='No space left'):
        plan.save(tmp_path / 'plan.json')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']
    with pytest.raises(PruningError, match='No such file'):
        Plan.load(tmp_path / 'none.json')


def at(path, value):
    """A change to a plan's dict: set the entry at a path, or delete it where the value is ``del``."""
    def change(data):
        *parents, last = path
        for part in parents:
            data = data[part]
        if value is del_:
            del data[last]
        else:
            data[last] = value
    return change


del_ = object()
CUT = ('cuts', 0)
MEMBER = (*CUT, 'members', 0)
deep = []
for _ in range(50):
    deep = [deep]


@pytest.mark.parametrize('change, message', [
    (at(['format'], FORMAT + 1), f'format {FORMAT + 1}, this timm_epfs reads up to {FORMAT}: upgrade'),
    (at(['format'], 0), 'format: found 0'),
    (at(['format'], True), 'format: found True, expected an integer'),
    (at(['format'], del_), 'not a timm_epfs plan'),
    (at(['cuts'], del_), "no field 'cuts'"),
    (at(['pickle'], 'x'), "unknown field 'pickle'"),
    (at(['base'], 3), 'base: found 3'),
    (at(['base_args'], []), 'base_args: found [], expected a dict'),
    (at(['base_args'], {'x': float('nan')}), 'base_args.x: found nan'),
    (at(['recipe'], {'x': deep}), 'nested more than'),
    (at(['base'], deep), 'nested more than'),
    (at(['cuts'], {}), 'cuts: found {}, expected a list'),
    (at(['cuts', 1, 'name'], 'blocks.0.attn.qkv'), "2 structures are named 'blocks.0.attn.qkv'"),
    (at([*CUT], None), 'cuts[0]: found None, expected a dict'),
    (at([*CUT, 'mode'], 1), "cuts[0]: unknown field 'mode'"),
    (at([*CUT, 'units'], del_), "cuts[0]: no field 'units'"),
    (at([*CUT, 'units'], 0), 'cuts[0].units: found 0'),
    (at([*CUT, 'units'], 10 ** 9), 'cuts[0].units: found 1000000000'),
    (at([*CUT, 'units'], 3.0), 'cuts[0].units: found 3.0, expected an integer'),
    (at([*CUT, 'kind'], 'rows'), "cuts[0].kind: found 'rows'"),
    (at([*CUT, 'exact'], 1), 'cuts[0].exact: found 1, expected true or false'),
    (at([*CUT, 'keep'], [0]), 'cuts[0].keep: found [0], expected text'),
    (at([*CUT, 'keep'], ''), "cuts[0].keep: '' is not a range"),
    (at([*CUT, 'keep'], '0-3'), 'cuts[0].keep: unit 3 is out of range, there are 3'),
    (at([*CUT, 'keep'], '1,1'), 'repeated or unsorted'),
    (at([*CUT, 'keep'], '2,0'), 'repeated or unsorted'),
    (at([*CUT, 'keep'], '2-1'), "'2-1' runs backwards"),
    (at([*CUT, 'keep'], '-1'), "'-1' is not a range"),
    (at([*CUT, 'keep'], '0,' + '9' * 40), 'is not a range'),
    (at([*CUT, 'members'], []), 'cuts[0].members: found []'),
    (at(MEMBER, 7), 'cuts[0].members[0]: found 7, expected text'),
    (at(MEMBER, 'w dim x out'), "cuts[0].members[0]: found 'w dim x out'"),
    (at(MEMBER, 'w dim 0 out at 0'), 'gives 3 units the same entries'),
    (at(MEMBER, 'w dim 0 out at 0 + 9u + 3x1 + 4x2'), 'does not ascend; list steps from large to small'),
    (at(MEMBER, 'w dim 0 out at 0 + 1u + 1x5'), 'does not ascend; list steps from large to small'),
    (at(MEMBER, 'w dim 0 out at u'), 'is not an index map'),
    (at(MEMBER, 'w dim 0 out at 0 + 1u' + ' + 2x1' * 9), 'is not an index map'),
    (at(MEMBER, 'w dim 0 out at 0 + 999999999u + 999999999x9'), 'below 2^31'),
    (at(MEMBER, 'w dim 0 out rows 0-3'), 'the same number of entries for each of 3 units'),
    (at(['attributes', 'a.b'], '3'), "attributes['a.b']: found '3', expected an integer"),
    (at(['attributes', 'a.b'], -1), "attributes['a.b']: found -1"),
    (at(['attributes', 'a.b'], True), "attributes['a.b']: found True"),
    (at(['cost'], {'macs': [1]}), "cost['macs']: found [1], expected [dense, pruned]"),
    (at(['cost'], {'macs': [1, float('nan')]}), "cost['macs']: found [1, nan]"),
    (at(['cost'], {'macs': [1, 10 ** 400]}), "cost['macs']: found"),
])
def test_bad_plans_are_refused_in_one_line(plan, change, message):
    data = copy.deepcopy(plan.to_dict())
    change(data)
    with pytest.raises(PruningError) as error:
        Plan.from_dict(data)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '"plan"', '[' * 100_000, '{"format": NaN}', '1' * 5000])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(PruningError, match='^plan'):
        Plan.from_json(text)


def test_a_plan_that_asks_for_gigabytes_is_refused_before_they_are_allocated(plan):
    data = plan.to_dict()
    members = [f'w{i} dim 0 out at 0 + 64u + 64x1' for i in range(6)]
    data['cuts'] = [{'name': 'a', 'kind': 'channels', 'units': 2 ** 18, 'keep': 'all', 'members': members}]
    tracemalloc.start()
    with pytest.raises(PruningError, match='entries'):
        Plan.from_dict(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_dim_that_is_owned_in_part_says_how_long_it_is():
    member = Member('conv.weight', 0, 'out', np.arange(4)[:, None], length=6)
    plan = Plan(None, {}, (Cut(Structure('conv', 'channels', 4, (member,)), np.arange(2)),))
    assert plan.to_dict()['cuts'][0]['members'] == ['conv.weight dim 0 of 6 out']
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and again.cuts[0].structure.members[0].length == 6

    layer = nn.ModuleDict({'conv': nn.Conv2d(1, 6, 1, bias=False)})
    assert apply_plan(layer, again).conv.weight.shape[0] == 4
    with pytest.raises(PruningError, match='conv.weight has shape .7, 1, 1, 1. where dim 0 should have 6'):
        apply_plan(nn.ModuleDict({'conv': nn.Conv2d(1, 7, 1, bias=False)}), again)
    with pytest.raises(PruningError, match='expected a dim longer than 3'):
        Plan.from_json(plan.to_json().replace('of 6', 'of 3'))
