"""Untrusted weights: where they are, and a safetensors file checked by its header before a tensor of it is read."""
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import safetensors
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, download_cached_file, download_from_hf
from torch import Tensor

from ..core import PruningError, first_few

__all__ = ['find_weights', 'has_weights', 'read_weights', 'shape_misfits']

# The fields of a pretrained_cfg that say where weights are.
_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')
# The names of a model's tensors and their shapes: 100 bytes each, and timm's largest models have 5,000.
MAX_HEADER = 2 ** 23
_MISTAKEN = (
    (b'PK\x03\x04', "a zip file, such as torch.save's"),
    (b'\x80', 'a pickle'),
    (b'version https://git-lfs', 'a pointer of Git LFS'),
)
_FLOATS = frozenset({'F64', 'F32', 'F16', 'BF16'})
_OTHERS = {
    torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8', torch.bool: 'BOOL',
    torch.complex64: 'C64',
}


def has_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether a pretrained_cfg says where weights are."""
    return any(cfg.get(source) for source in _SOURCES)


def find_weights(cfg: Mapping[str, Any], cache_dir: Optional[Union[str, Path]] = None) -> Path:
    """The safetensors file that a pretrained_cfg names, in timm's order of precedence; downloaded where it's remote.

    Raises:
        PruningError: It names a file of another format.
    """
    source, file, repo = cfg.get('source'), cfg.get('file'), cfg.get('hf_hub_id')
    if source == 'local-dir':
        return Path(file) / HF_SAFE_WEIGHTS_NAME
    if file and source != 'hf-hub':
        _check_format(file)
        return Path(file)
    if repo:
        name = cfg.get('hf_hub_filename') or HF_SAFE_WEIGHTS_NAME
        _check_format(name)
        return Path(download_from_hf(repo, name, cache_dir=cache_dir))
    _check_format(cfg['url'])
    return Path(download_cached_file(cfg['url'], cache_dir=cache_dir))


def _check_format(name: Union[str, Path]) -> None:
    if not str(name).endswith('.safetensors'):
        raise PruningError(f'weights in {name} are not safetensors, the only format that is read; convert them')


def read_weights(
        path: Union[str, Path],
        expected: Optional[Mapping[str, Tensor]] = None,
        otherwise: Optional[Callable[[], Mapping[str, Tensor]]] = None,
) -> Dict[str, Tensor]:
    """Read a safetensors file, whole or not at all.

    Args:
        path: The file.
        expected: Tensors that it should hold, by name, on any device, the meta device included. Their shapes are to be
            the same; floating-point numbers may have another precision, and nothing else another type.
        otherwise: Makes what else the file may hold; only called where it doesn't hold what is expected.

    Raises:
        PruningError: It is not a safetensors file, or holds other tensors: the first three names, with their shapes.
    """
    try:
        _check_start(Path(path))
        with safetensors.safe_open(path, framework='pt') as file:
            found = {name: _described(file.get_slice(name)) for name in file.keys()}
            problems = [] if expected is None else _misfits(found, expected)
            if otherwise is not None and problems:
                problems = _misfits(found, otherwise())
            if not found:
                raise PruningError(f'weights not read from {path}: it holds no tensors; give the weights of this model')
            if problems:
                raise PruningError(
                    f'weights in {path} are of another model: {first_few(problems)}; give the weights of this model')
            return {name: file.get_tensor(name) for name in found}
    except (OSError, safetensors.SafetensorError) as e:
        reason = ' '.join(str(getattr(e, 'strerror', None) or e).split())
        raise PruningError(f'weights not read from {path}: {reason[:200]}') from e


def _check_start(path: Path) -> None:
    """The first bytes say how long the header is. A header of this length is parsed, so it is looked at before."""
    with open(path, 'rb') as file:
        start = file.read(32)
    for magic, what in _MISTAKEN:
        if start.startswith(magic) and start[8:9] != b'{':  # a header's length may be any bytes; JSON comes after it
            raise PruningError(f'weights not read from {path}: this is {what}, only safetensors are read; convert it')
    if int.from_bytes(start[:8], 'little') > MAX_HEADER:
        raise PruningError(
            f'weights not read from {path}: this is not a safetensors file, or its header is far too long')


def _described(part: Any) -> Tuple[str, Tuple[int, ...]]:
    return part.get_dtype(), tuple(part.get_shape())


def shape_misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> List[str]:
    """How tensors differ in names and shapes from those that are expected, one line each."""
    return _misfits({name: (None, tuple(tensor.shape)) for name, tensor in found.items()}, expected)


def _misfits(found: Mapping[str, Tuple[Optional[str], Tuple[int, ...]]], expected: Mapping[str, Tensor]) -> List[str]:
    unknown = {name: shape for name, (_, shape) in found.items() if name not in expected}
    problems = [f'{name[:80]!r} {shape} is not in the model' for name, shape in unknown.items()]
    for name, tensor in expected.items():
        own = tuple(tensor.shape)
        if name not in found:
            problems.append(f'{name} {own} is missing')
            continue
        dtype, shape = found[name]
        allowed = _FLOATS if tensor.is_floating_point() else {_OTHERS.get(tensor.dtype)}
        if shape != own:
            problems.append(f'{name} has shape {shape} where the model has {own}')
        elif dtype is not None and dtype not in allowed:
            problems.append(f'{name} is {dtype} where the model has {tensor.dtype}')
    return problems
