"""An untrusted plan: what is meant is applied, everything else is one line, soon and small."""
import copy
import math

import pytest
import torch
from torch import nn
from untrusted import elements, line, nested, seeds, small, soon

from timm_epfs.core import PruningError
from timm_epfs.plan import Plan, limited
from timm_epfs.plan.limits import MAX_CHARACTERS
from timm_epfs.surgery import apply_plan, build_base, rebuild


@pytest.fixture
def plan():
    """A small plan, to spoil."""
    return copy.deepcopy(seeds()[-1])


@pytest.mark.parametrize('base', [
    'epfs_pruned', 'resnet18_epfs55', '../../etc/passwd', 'torchvision/../x', 'hf-hub:a/b', 'local-dir:.', 'a' * 10_000,
    'resnet18\n', '', 'os.system.x', 'resnet١٨', 7, ['resnet18'], 'no_such_model',
])
def test_bases_that_are_none(plan, base):
    plan['base'] = base
    with pytest.raises(PruningError) as error:
        rebuild(Plan.from_dict(plan))
    line(error)


@pytest.mark.parametrize('args, message', [
    ({'num_classes': 10 ** 9}, 'numbers up to'),
    ({'num_classes': -10 ** 9}, 'numbers up to'),
    ({'img_size': 10 ** 6}, 'numbers up to'),
    ({'depth': 10 ** 6}, 'numbers up to'),
    ({'depth_multiplier': 1000.0}, 'numbers up to'),
    ({f'a{i}': 0 for i in range(300)}, 'more than 256 arguments'),
    ({f'{"a" * 60}{i}': 'x' * 60 for i in range(200)}, "can't be built"),
    ({'drop_rate': math.inf}, 'found inf'),
    ({'layers': [1] * 1000}, 'more than 256 values'),
    ({'block_args': nested(1000, lambda value: {'a': value})}, 'nested more than'),
    ({'block_args': {'path': '../x'}}, "found '../x', expected a word"),
    ({'act_layer': 'os.system'}, 'expected a word'),
    ({'a.b': 1}, 'expected the name of an argument'),
    ({'__class__': 1}, 'expected the name of an argument'),
    ({'pretrained_backbone': True}, "'pretrained_backbone', which is not for a plan"),
    ({'device': 'cuda'}, "'device', which is not for a plan"),
    ({'no_such_argument': 1}, "can't be built"),
    ({'num_classes': 'many'}, "can't be built"),
    ({'layers': [10_000] * 4}, 'modules and tensors'),
    ({'channels': [10_000] * 4}, 'elements; no plan needs so large a base'),
])
def test_arguments_of_a_base_that_are_refused_before_it_is_built(args, message):
    plan = {**Plan('test_resnet', {}, ()).to_dict(), 'base_args': args}
    with soon(), small(), pytest.raises(PruningError) as error:
        rebuild(Plan.from_dict(plan))
    assert message in line(error)


def test_a_large_base_may_be_as_large_as_it_is():
    """Arguments are held to what the base is without them, where that is large."""
    args = {'num_classes': 1000, 'img_size': 224, 'drop_rate': 0.1}
    model = build_base('vit_huge_patch14_224', args, 'meta')
    assert elements(model) > 6e8
    with pytest.raises(PruningError, match='elements'):
        build_base('vit_huge_patch14_224', {'depth': 200}, 'meta')


def test_another_thread_is_not_counted():
    import threading
    with limited(10, 10):
        thread = threading.Thread(target=nn.Linear, args=(10, 10))
        thread.start()
        thread.join()
        with pytest.raises(PruningError, match='10 elements'):
            nn.Linear(10, 10)
    nn.Linear(10, 10)


class Inner(nn.Module):
    """What a plan could reach for."""
    classwide = 4

    def __init__(self):
        super().__init__()
        self.width, self.ratio, self.name, self.flag = 4, 0.5, 'x', True
        self.sizes, self.kind, self.function = (4, 2), nn.Linear, torch.relu
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x


@pytest.mark.parametrize('path', [
    'forward', 'training', 'layer.training', '__class__', '__dict__.width', '_version', '_parameters', '_modules.layer',
    'layer._parameters.weight.output_nr', 'layer.weight', 'layer.weight.ndim', 'layer.weight.data', 'layer',
    'kind', 'kind._version', 'kind.__init__', 'function.__globals__', 'forward.__self__.width', 'flag', 'ratio', 'name',
    'sizes', 'sizes.9', 'sizes.-1', 'sizes.x', 'sizes.²', '', '.', 'width.', '.width', 'layer..in_features', '../width',
    'sizes/0', 'dump_patches', 'state_dict', 'width.real', 'width.numerator', 'classwide.real', 'nowhere',
])
def test_attributes_that_no_plan_sets(path):
    model = Inner()
    before = copy.deepcopy(vars(model)), nn.Linear._version
    for value in (0, 1):
        with pytest.raises(PruningError) as error:
            apply_plan(model, Plan(None, {}, (), {path: value}))
        line(error)
    assert str(vars(model)) == str(before[0]) and nn.Linear._version == before[1]


def test_attributes_only_get_smaller():
    model = apply_plan(Inner(), Plan(None, {}, (), {'width': 3, 'sizes.1': 1, 'layer.in_features': 2, 'classwide': 3}))
    assert (model.width, model.sizes, model.layer.in_features) == (3, (4, 1), 2)
    assert (model.classwide, Inner.classwide) == (3, 4)
    with pytest.raises(PruningError, match='attribute width is 4 and the plan says 5'):
        apply_plan(Inner(), Plan(None, {}, (), {'width': 5}))


def block(name):
    members = ['fc.bias dim 0 per at 0 + 3x1']
    return {'name': name, 'kind': 'blocks', 'units': 1, 'keep': 'none', 'members': members}


def cut(keep, name='a', member='conv1.weight dim 0 out', units=16, kind='channels'):
    return {'name': name, 'kind': kind, 'units': units, 'keep': keep, 'members': [member]}


@pytest.mark.parametrize('cuts, message', [
    ([cut('none')], 'only a block goes whole'),
    ([block('')], 'only a block goes whole'),
    ([cut('0-7', 'a'), cut('8-15', 'b')], 'nothing would be left of conv1.weight'),
    ([block('layer9')], 'block layer9 is missing'),
    ([cut('0', member='conv1.weight dim 9 out')], 'conv1.weight'),
    ([cut('0', member='bn1.num_batches_tracked dim 0 per')], 'bn1.num_batches_tracked'),
    ([cut('0', member='../weight dim 0 out')], '../weight is missing'),
    ([cut('0', member='\x1b[31m dim 0 out')], 'printable'),
    ([cut('0', member='a\u2028b dim 0 out')], 'printable'),
    ([cut('0', member=f'{"a" * 10_000} dim 0 out')], 'printable'),
    ([cut('0', name='a\nb')], 'printable'),
    ([cut('٠')], 'not a range'),
    ([cut('0,' * 100_000)], 'not a range'),
    ([cut('0', units=2 ** 18 + 1)], 'expected 1 to'),
    ([cut('0')] * 2, 'names are unique'),
    ([cut('0', f'a{i}') for i in range(20_000)], 'more than'),
    ([{**cut('0', f'a{i}'), 'members': ['w dim 0 out'] * 10_000} for i in range(4)], 'index maps are too large'),
    ([{**cut('0', units=2 ** 18), 'members': ['w dim 0 out at 0 + 64u + 64x1']}], 'index maps are too large'),
])
def test_cuts_that_are_refused(plan, cuts, message):
    plan.update(cuts=cuts, attributes={})
    with soon(), small(), pytest.raises(PruningError) as error:
        rebuild(Plan.from_dict(plan))
    assert message in line(error)


def test_a_block_inside_a_block_goes_with_it(plan):
    plan.update(cuts=[block('layer1.0'), block('layer1'), block('layer1.0.conv1')], attributes={})
    model = rebuild(Plan.from_dict(plan))
    assert isinstance(model.layer1, nn.Identity) and not any(n.startswith('layer1') for n in model.state_dict())


@pytest.mark.parametrize('field, value, message', [
    ('cuts', [0] * 10 ** 6, 'more than'),
    ('attributes', {f'a{i}': 0 for i in range(10 ** 6)}, 'more than'),
    ('recipe', {'note': [[]] * 10 ** 6}, 'more than'),
    ('recipe', {'note': 'x' * (MAX_CHARACTERS + 1)}, 'more than'),
    ('recipe', {'a\nb': 0}, 'printable'),
    ('recipe', {'note': math.nan}, 'found nan'),
    ('recipe', nested(100_000, lambda value: {'a': value}), 'nested more than'),
    ('cost', {'macs\x1b[2J': [1, 1]}, 'printable'),
    ('cost', {'macs': [math.inf, 1]}, 'expected [dense, pruned]'),
])
def test_plans_that_are_too_much(plan, field, value, message):
    plan[field] = value
    with soon(), small(), pytest.raises(PruningError) as error:
        Plan.from_dict(plan)
    assert message in line(error)


@pytest.mark.parametrize('text', [
    '[' * 10 ** 6, '[[],' * 10 ** 6, '9' * 10 ** 6, '"\\ud800"', '{"format": 1e999}', '{"format": -Infinity}',
    '[' + '[],' * (MAX_CHARACTERS // 3 - 1) + '0]', '[' + '"a",' * (MAX_CHARACTERS // 4 - 1) + '0]',
    ' ' * 10 ** 8, '\ufeff{}', '\x00',
], ids=range(11))
def test_text_that_is_no_plan_costs_little(text):
    with soon(), small(), pytest.raises(PruningError, match='^plan') as error:
        Plan.from_json(text)
    assert line(error)


def test_ranges_are_read_as_fast_as_they_come(plan):
    """The longest text of ranges that a plan may hold."""
    plan.update(cuts=[cut(','.join(['0'] * (MAX_CHARACTERS // 2 - 1000)))])
    with soon(), small(), pytest.raises(PruningError, match='repeated or unsorted'):
        Plan.from_dict(plan)


def test_a_plan_file_is_not_read_beyond_what_a_plan_may_be():
    with small(), pytest.raises(PruningError, match='^plan'):
        Plan.load('/dev/zero')
