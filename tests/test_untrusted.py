"""A plan, a config.json or weights from anyone: what is meant loads, everything else is one line, soon and small."""
import copy
import functools
import json
import math
import pickle
import struct
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from timm_epfs import prune
from timm_epfs.errors import PruningError
from timm_epfs.hub import save_pretrained
from timm_epfs.limits import MAX_CHARACTERS, MAX_VALUES, limited
from timm_epfs.plan import Plan
from timm_epfs.registry import epfs_pruned
from timm_epfs.surgery import apply_plan, build_base, rebuild
from timm_epfs.weights import MAX_HEADER, read_weights

SMALL = 'resnet20_cifar'
SECONDS, MEGABYTES = 2.0, 200  # of a processor, which slows down where its neighbour is busy


def line(error):
    """The message of a refusal: one line that a terminal can show."""
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert text.isprintable() and len(text) < 1000, text
    return text


@contextmanager
def small():
    """The block doesn't raise the process's peak memory by more than may be."""
    try:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    except OSError:
        pytest.skip('peak memory is read from /proc, which this system does not have')
    before = _memory('VmRSS')
    yield
    assert _memory('VmHWM') - before < MEGABYTES


def _memory(field):
    status = dict(entry.split(':', 1) for entry in Path('/proc/self/status').read_text().splitlines())
    return int(status[field].split()[0]) / 1024


@functools.cache
def seeds():
    """Plans as JSON values: of channels, of groups and blocks, of heads and streams."""
    models = [
        prune('resnet18', macs=0.5),
        prune('mobilenetv2_035', macs=0.6, kinds=('blocks', 'channels')),
        prune('test_vit', macs=0.6, kinds=('blocks', 'heads', 'channels')),
        prune(SMALL, macs=0.5, kinds=('blocks', 'channels'), num_classes=3),
    ]
    return [model.pruning_plan.to_dict() for model in models]


@pytest.fixture
def plan():
    """A small plan, to spoil."""
    return copy.deepcopy(seeds()[-1])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    model = rebuild(Plan.from_dict(seeds()[-1]))
    return model, save_pretrained(model, tmp_path_factory.mktemp('saved') / 'out')


def elements(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())


def nested(depth, wrap=lambda value: [value]):
    return functools.reduce(lambda value, _: wrap(value), range(depth), 0)


# Plans

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
    with small(), pytest.raises(PruningError) as error:
        started = time.process_time()
        rebuild(Plan.from_dict(plan))
    assert message in line(error) and time.process_time() - started < SECONDS


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
    ([cut('٠')], 'no range'),
    ([cut('0,' * 100_000)], 'no range'),
    ([cut('0', units=2 ** 18 + 1)], 'expected 1 to'),
    ([cut('0')] * 2, 'names are unique'),
    ([cut('0', f'a{i}') for i in range(20_000)], 'more than'),
    ([{**cut('0', f'a{i}'), 'members': ['w dim 0 out'] * 10_000} for i in range(4)], 'index maps are too large'),
    ([{**cut('0', units=2 ** 18), 'members': ['w dim 0 out at 0 + 64u + 64x1']}], 'index maps are too large'),
])
def test_cuts_that_are_refused(plan, cuts, message):
    plan.update(cuts=cuts, attributes={})
    with small(), pytest.raises(PruningError) as error:
        started = time.process_time()
        rebuild(Plan.from_dict(plan))
    assert message in line(error) and time.process_time() - started < SECONDS


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
    with small(), pytest.raises(PruningError) as error:
        started = time.process_time()
        Plan.from_dict(plan)
    assert message in line(error) and time.process_time() - started < SECONDS


@pytest.mark.parametrize('text', [
    '[' * 10 ** 6, '[[],' * 10 ** 6, '9' * 10 ** 6, '"\\ud800"', '{"format": 1e999}', '{"format": -Infinity}',
    '[' + '[],' * (MAX_CHARACTERS // 3 - 1) + '0]', '[' + '"a",' * (MAX_CHARACTERS // 4 - 1) + '0]',
    ' ' * 10 ** 8, '\ufeff{}', '\x00',
], ids=range(11))
def test_text_that_is_no_plan_costs_little(text):
    with small(), pytest.raises(PruningError, match='^plan') as error:
        started = time.process_time()
        Plan.from_json(text)
    assert line(error) and time.process_time() - started < SECONDS


def test_ranges_are_read_as_fast_as_they_come(plan):
    """The longest text of ranges that a plan may hold."""
    plan.update(cuts=[cut(','.join(['0'] * (MAX_CHARACTERS // 2 - 1000)))])
    started = time.process_time()
    with small(), pytest.raises(PruningError, match='repeated or unsorted'):
        Plan.from_dict(plan)
    assert time.process_time() - started < SECONDS


def test_a_plan_file_is_not_read_beyond_what_a_plan_may_be():
    with small(), pytest.raises(PruningError, match='^plan'):
        Plan.load('/dev/zero')


# config.json

def entry(folder, config, **kwargs):
    """What timm.create_model('local-dir:…') calls, with what it read of config.json."""
    cfg, args = config['pretrained_cfg'], config['model_args']
    if isinstance(cfg, dict):
        cfg = {**cfg, 'source': 'local-dir', 'file': str(folder)}
    given = {name: value for name, value in args.items() if value is not None} if isinstance(args, dict) else {}
    return epfs_pruned(pretrained_cfg=cfg, pretrained_model_args=args, **{**given, **kwargs})


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


@pytest.fixture
def hostile(saved, tmp_path):
    """A folder with the weights of a saved model, and a function that gives it a config.json and loads it."""
    (tmp_path / 'model.safetensors').symlink_to(saved[1] / 'model.safetensors')

    def load(change, pretrained=True):
        config = config_of(saved[1])
        change(config)
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained)

    return load


def test_a_config_that_is_meant_loads(saved, hostile):
    model = hostile(lambda config: None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved[0].state_dict().values()))


def in_cfg(**fields):
    return lambda config: config['pretrained_cfg'].update(fields)


def in_args(**fields):
    return lambda config: config['model_args'].update(fields)


@pytest.mark.parametrize('change, message', [
    (in_cfg(url='http://127.0.0.1/x.pth'), "'url' is not for a config to set"),
    (in_cfg(url='file:///etc/passwd'), "'url' is not for a config to set"),
    (in_cfg(hf_hub_id='other/repo'), "'hf_hub_id' is not for a config to set"),
    (in_cfg(hf_hub_filename='../../pytorch_model.bin'), "'hf_hub_filename' is not for a config to set"),
    (in_cfg(custom_load=True), "'custom_load' is not for a config to set"),
    (in_cfg(custom_load='hf'), "'custom_load' is not for a config to set"),
    (in_cfg(state_dict={'conv1.weight': [0]}), "'state_dict' is not for a config to set"),
    (in_cfg(colour=1), "unknown field 'colour'"),
    (lambda config: config.update(num_classes=10 ** 12), 'numbers up to'),
    (lambda config: config.update(num_classes=2.5), 'an integer'),
    (in_cfg(input_size=[3, 10 ** 9, 10 ** 9], fixed_input_size=True), 'numbers up to'),
    (in_cfg(input_size=[3, 10 ** 9]), 'to be three'),
    (in_cfg(label_names=['x'] * (MAX_VALUES + 1)), 'more than'),
    (in_cfg(notes=nested(100)), 'nested more than'),
    (in_args(plan='/etc/passwd'), "'plan' is no plan"),
    (in_args(plan=None), "'plan' is no plan"),
    (lambda config: config['model_args'].pop('plan'), 'needs a plan'),
    (lambda config: config.pop('model_args'), 'needs a plan'),
    (in_args(checkpoint_path='x.pth'), "'checkpoint_path', which is not for"),
    (in_args(device='cuda'), "'device', which is not for"),
    (in_args(num_classes=10 ** 12), 'numbers up to'),
    (in_args(num_classes='../x'), 'expected a word'),
    (in_args(colour=1), 'colour'),
    (in_args(features_only=True, out_indices=[0] * (MAX_VALUES + 1)), 'more than'),
    (in_args(**{'a.b': 1}), 'the name of an argument'),
])
@pytest.mark.parametrize('pretrained', [False, True])
def test_what_a_config_does_not_decide(hostile, change, message, pretrained, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError('a file was opened')

    for name in ('read_weights', 'download_cached_file', 'download_from_hf'):
        monkeypatch.setattr(f'timm_epfs.registry.{name}', opened)
    with small(), pytest.raises(PruningError) as error:
        hostile(change, pretrained)
    assert message in line(error)


@pytest.mark.parametrize('files', [
    ('pytorch_model.bin',), ('model.safetensors',), ('model.safetensors', 'pytorch_model.bin'),
])
def test_no_pickle_is_read_where_weights_are_missing_or_empty(saved, tmp_path, files, monkeypatch):
    """timm takes pytorch_model.bin where it finds no weights, and an empty file is no weights."""
    (tmp_path / 'config.json').write_text((saved[1] / 'config.json').read_text())
    for name in files:
        if name.endswith('.bin'):
            torch.save(saved[0].state_dict(), tmp_path / name)
        else:
            safetensors.torch.save_file({}, tmp_path / name)

    def load(*args, **kwargs):
        raise AssertionError('a pickle was read')

    monkeypatch.setattr(torch, 'load', load)
    monkeypatch.setattr(pickle, 'load', load)
    with pytest.raises(PruningError, match='weights not read from') as error:
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    line(error)


# Weights

EXPECTED = {
    'a.weight': torch.empty(4, 3, device='meta'),
    'a.bias': torch.empty(4, device='meta'),
    'n': torch.empty((), dtype=torch.int64, device='meta'),
}
WEIGHTS = {'a.weight': torch.ones(4, 3), 'a.bias': torch.zeros(4), 'n': torch.tensor(3)}


def written(path, tensors):
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_precision_are_read(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in WEIGHTS.items()}
    read = read_weights(written(tmp_path / 'w.safetensors', tensors), EXPECTED)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)


@pytest.mark.parametrize('change, message', [
    ({'a.weight': None}, 'a.weight is missing'),
    ({'b': torch.zeros(1)}, "'b' is not in the model"),
    ({'b\n' * 9: torch.zeros(1)}, 'is not in the model'),
    ({'a.weight': torch.ones(3, 4)}, 'a.weight has shape (3, 4) where the model has (4, 3)'),
    ({'a.weight': torch.ones(4, 3, 1)}, 'a.weight has shape (4, 3, 1)'),
    ({'a.bias': torch.ones(0)}, 'a.bias has shape (0,)'),
    ({'a.weight': torch.ones(4, 3, dtype=torch.int8)}, 'a.weight is I8 where the model has torch.float32'),
    ({'n': torch.tensor(3.)}, 'n is F32 where the model has torch.int64'),
    ({f'x{i}': torch.zeros(1) for i in range(9)}, 'and 6 more'),
])
def test_weights_of_another_model_are_refused_before_a_tensor_is_read(tmp_path, change, message, monkeypatch):
    tensors = {name: tensor for name, tensor in {**WEIGHTS, **change}.items() if tensor is not None}
    path = written(tmp_path / 'w.safetensors', tensors)
    real = safetensors.safe_open

    class HeaderOnly:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *exc):
            return self.file.__exit__(*exc)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return self.file.get_slice(name)

    monkeypatch.setattr(safetensors, 'safe_open', HeaderOnly)
    with pytest.raises(PruningError) as error:
        read_weights(path, EXPECTED)
    assert message in line(error)


def raw(header, data=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header + data


def tensor(start, end, shape=(1,), dtype='F32'):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [start, end]}


GOOD = raw({'a': tensor(0, 4)}, bytes(4))
BROKEN = {
    'nothing': b'',
    'a few bytes': b'\x10',
    'no header': raw(b'', length=10),
    'header cut': GOOD[:20],
    'data cut': GOOD[:-1],
    'data left over': GOOD + b'x',
    'header of 100 MB claimed': raw(b'{}', length=10 ** 8),
    'header of exabytes claimed': raw(b'{}', length=2 ** 63),
    'header that is no JSON': raw(b'{"a": '),
    'header that is a list': raw([]),
    'header in other words': raw({'a': {'type': 'F32'}}),
    'header nested': raw(b'[' * 10 ** 6),
    'tensors overlap': raw({'a': tensor(0, 4), 'b': tensor(0, 4)}, bytes(4)),
    'tensors overlap in part': raw({'a': tensor(0, 4), 'b': tensor(2, 6)}, bytes(6)),
    'a hole': raw({'a': tensor(0, 4), 'b': tensor(8, 12)}, bytes(12)),
    'offsets beyond the end': raw({'a': tensor(0, 4), 'b': tensor(4, 400, (99,))}, bytes(8)),
    'offsets backwards': raw({'a': tensor(4, 0)}, bytes(4)),
    'offsets below zero': raw({'a': tensor(-4, 0)}, bytes(4)),
    'shape too large for its bytes': raw({'a': tensor(0, 4, (10 ** 9,))}, bytes(4)),
    'shape that overflows': raw({'a': tensor(0, 4, (2 ** 32, 2 ** 32, 2))}, bytes(4)),
    'unknown dtype': raw({'a': tensor(0, 4, dtype='PICKLE')}, bytes(4)),
    'no tensors': raw({}),
    'a pickle': pickle.dumps({'a': [1]}),
    'an old pickle': pickle.dumps({'a': [1]}, protocol=0),
    'a zip': b'PK\x03\x04' + bytes(100),
    'a pointer of Git LFS': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n',
    'a page': b'<!DOCTYPE html><html>not found</html>',
}


@pytest.mark.parametrize('case', BROKEN)
def test_files_that_are_no_weights(case, tmp_path):
    path = tmp_path / 'w.safetensors'
    path.write_bytes(BROKEN[case])
    with small(), pytest.raises(PruningError, match='^weights not read from') as error:
        started = time.process_time()
        read_weights(path)
    assert line(error) and time.process_time() - started < SECONDS


def test_a_file_as_it_should_be_is_read(tmp_path):
    (tmp_path / 'w.safetensors').write_bytes(GOOD)
    assert read_weights(tmp_path / 'w.safetensors')['a'].tolist() == [0.0]


@pytest.mark.parametrize('length', range(128, 1024, 256))
def test_a_header_whose_length_starts_as_a_pickle_does_is_read(length, tmp_path):
    safetensors.torch.save_file({'a': torch.ones(1)}, tmp_path / 'w.safetensors', {'pad': ''})
    padding = length - int.from_bytes((tmp_path / 'w.safetensors').read_bytes()[:8], 'little')
    safetensors.torch.save_file({'a': torch.ones(1)}, tmp_path / 'w.safetensors', {'pad': 'x' * padding})
    assert (tmp_path / 'w.safetensors').read_bytes()[0] == 0x80
    assert read_weights(tmp_path / 'w.safetensors')['a'].tolist() == [1.0]


def test_a_long_header_is_refused_by_its_length(tmp_path):
    entries = {f't{i}': tensor(0, 0, (0,)) for i in range(MAX_HEADER // 50)}
    (tmp_path / 'w.safetensors').write_bytes(raw(entries))
    with small(), pytest.raises(PruningError, match='header is far too long'):
        read_weights(tmp_path / 'w.safetensors')


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / 'none.safetensors'):
        with pytest.raises(PruningError, match='weights not read from') as error:
            read_weights(path)
        line(error)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_any_bytes_are_weights_or_refused(tmp_path_factory, data):
    """Bytes of a good file, changed, cut and repeated."""
    content = bytearray(raw({'a': tensor(0, 4), 'b': tensor(4, 12, (2,))}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content)))
        content[position:position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / 'fuzzed.safetensors'
    path.write_bytes(content)
    try:
        read = read_weights(path, {'a': torch.empty(1), 'b': torch.empty(2)})
    except PruningError as e:
        line(e)
    else:
        assert {name: tuple(tensor.shape) for name, tensor in read.items()} == {'a': (1,), 'b': (2,)}


# Fuzz

NASTY = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2 ** 18, 2 ** 31, 2 ** 63, 10 ** 6, 10 ** 300, -10 ** 18, 0.5, -0.0, 1e308,
    5e-324, math.nan, math.inf, -math.inf, '', ' ', '\n', '\x00', '\x1b[2J', '\ud800', '../../etc/passwd', '/dev/zero',
    'a.b', '__class__', 'forward', 'all', 'none', '0', '0-1', '1-0', '0-999999999', '999999999', 'x' * 100_000,
    '0,' * 50_000, 'conv1.weight dim 0 out', 'conv1.weight dim 1 in rows 0-2', 'conv1.weight dim 0 out at 0 + 1u + 9x1',
    'resnet50', 'vit_base_patch16_224', 'torchvision/resnet18', 'epfs_pruned', SMALL, 'blocks', 'channels', 'heads', [],
    {}, [[]], [None], [0] * 1000, [10 ** 9] * 3, [3, 224, 224], {'': 0}, {'a': {}}, nested(30), nested(200),
    nested(200, lambda value: {'a': value}),
)
NAMES = (
    '', 'plan', 'base', 'units', 'keep', 'shortcut', '__class__', '../x', 'a.b', '\n', 'training', 'conv1.in_channels',
    'num_classes', 'in_chans', 'img_size', 'depth', 'layers', 'checkpoint_path', 'device', 'url', 'file', 'state_dict',
    'custom_load', 'hf_hub_filename', 'input_size', 'fixed_input_size', 'global_pool', 'first_conv', 'classifier',
    'features_only', 'out_indices', 'feature_cls', 'block_args', 'x' * 10_000,
)
CHARACTERS = '019-,. +ux#\n{}[]":\\é'
FUZZ = settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def mutate(draw, data):
    """Change one place of a JSON tree, which a walk from the root finds."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = keys[draw(st.integers(0, len(keys) - 1))]
        if not isinstance(data[key], (dict, list)) or not draw(st.integers(0, 3)):
            break
        data = data[key]
    what = draw(st.sampled_from(('replace', 'replace', 'edit', 'edit', 'move', 'delete', 'add')))
    value = data[key]
    if what == 'delete':
        del data[key]
    elif what == 'add' and isinstance(data, dict):
        data[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif what == 'add':
        data.insert(key, copy.deepcopy(value))
    elif what == 'move':
        other = keys[draw(st.integers(0, len(keys) - 1))]
        data[key], data[other] = data[other], value
    elif what == 'edit' and isinstance(value, str):
        position = draw(st.integers(0, len(value)))
        end = position + draw(st.integers(0, 2))
        data[key] = value[:position] + draw(st.sampled_from(('', *CHARACTERS))) + value[end:]
    elif what == 'edit' and isinstance(value, (int, float)):
        data[key] = draw(st.sampled_from((value + 1, value - 1, -value, 2 * value, value / 2, str(value), [value])))
    else:
        data[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))


def attempt(load):
    """What comes of loading something spoilt: a model, or a refusal in one line."""
    started = time.process_time()
    try:
        return load()
    except PruningError as e:
        line(e)
    finally:
        assert time.process_time() - started < SECONDS


def attempt_plan(read):
    """Whether a plan is read and applied; what it gives is no larger than its base."""
    model = attempt(lambda: rebuild(read(), device='meta'))
    if model is not None:
        plan = model.pruning_plan
        assert elements(model) <= elements(build_base(plan.base, plan.base_args, 'meta'))
    return model is not None


def test_spoilt_plans():
    loaded = Counter()

    @settings(FUZZ, max_examples=1500)
    @given(st.data())
    def spoil(data):
        plan = copy.deepcopy(data.draw(st.sampled_from(seeds())))
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(data.draw, plan)
        loaded[attempt_plan(lambda: Plan.from_dict(plan))] += 1

    seeds()
    with small():
        spoil()
    assert loaded.total() >= 1500 and min(loaded[True], loaded[False]) > 100, loaded


def test_spoilt_text():
    texts = [json.dumps(plan) for plan in seeds()]
    loaded = Counter()

    @settings(FUZZ, max_examples=500)
    @given(st.data())
    def spoil(data):
        text = data.draw(st.sampled_from(texts))
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(text)))
            end = data.draw(st.sampled_from((position, position + 1, position + 50, len(text))))
            text = text[:position] + data.draw(st.sampled_from(('', *CHARACTERS))) + text[end:]
        loaded[attempt_plan(lambda: Plan.from_json(text))] += 1

    with small():
        spoil()
    assert loaded.total() >= 500 and min(loaded[True], loaded[False]) > 20, loaded


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
def test_spoilt_configs(saved):
    folder = saved[1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = Counter()

    @settings(FUZZ, max_examples=500)
    @given(st.data())
    def spoil(data):
        config = {name: value for name, value in config_of(folder).items() if name in ('model_args', 'pretrained_cfg')}
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(data.draw, config[data.draw(st.sampled_from(('model_args', 'pretrained_cfg')))])
        pretrained = data.draw(st.booleans())
        loaded[attempt(lambda: entry(folder, config, pretrained=pretrained)) is not None] += 1

    with small():
        spoil()
    assert loaded.total() >= 500 and min(loaded[True], loaded[False]) > 20, loaded
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('change, message', [
    (in_cfg(url='http://127.0.0.1/x.pth'), "'url' is not for a config to set"),
    (in_cfg(hf_hub_filename='../../pytorch_model.bin'), "'hf_hub_filename' is not for a config to set"),
    (in_cfg(colour=1), 'colour'),
])
def test_a_config_that_names_a_variant_decides_no_more(hostile, change, message):
    def named(config):
        config['architecture'] = 'resnet20_cifar_epfs50'
        config.pop('model_args')
        change(config)

    with pytest.raises(PruningError) as error:
        hostile(named)
    assert message in line(error)
