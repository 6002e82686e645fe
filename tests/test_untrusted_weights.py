"""Untrusted weights: a file is checked by its header, and whatever isn't the model's is refused in one line."""
import json
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from untrusted import line, small, soon

from timm_epfs.core import PruningError
from timm_epfs.zoo.weights import MAX_HEADER, read_weights

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
    ({'a.weight': None}, 'a.weight (4, 3) is missing'),
    ({'b': torch.zeros(1)}, "'b' (1,) is not in the model"),
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
    with soon(), small(), pytest.raises(PruningError, match='^weights not read from') as error:
        read_weights(path)
    assert line(error)


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
