"""Checkpoints of a run without pickle: tensors in safetensors, everything else in JSON, both with checksums.

The JSON file is written last and holds the checksum of the tensor file. A checkpoint without its JSON file does not
count, so an interrupted write never leaves half a checkpoint.
"""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..core import PruningError, warn, write_whole

__all__ = ['Checkpoints', 'write_tensors']

FORMAT = 1


class Checkpoints:
    """The last few checkpoints of a run, in one folder.

    Args:
        folder: Folder of the checkpoints. The first ``save`` creates it.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self.keep = keep

    def save(self, state: Any, number: int) -> None:
        """Write a checkpoint, then delete all but the last few.

        Args:
            state: Nested dicts, lists and tuples of tensors, arrays and JSON values.
            number: Number of the checkpoint; it must be higher than those of earlier checkpoints.

        Raises:
            PruningError: The checkpoint can't be written.
        """
        tensors: Dict[str, Tensor] = {}
        values = _flatten(state, tensors)
        path = self.folder / f'{number:05d}.json'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = path.with_suffix('.safetensors')
            write_tensors(weights, tensors)
            body = {'format': FORMAT, 'tensors': _digest(weights), 'state': values}
            text = json.dumps({'sha256': _checksum(body), **body})
            write_whole(path, lambda part: part.write_text(text, encoding='utf-8'))
        except OSError as e:
            raise PruningError(f'checkpoint {path} can\'t be written: {e.strerror or e}') from e
        for old in self._paths()[self.keep:]:
            old.unlink(missing_ok=True)
            old.with_suffix('.safetensors').unlink(missing_ok=True)

    def load(self) -> Optional[Any]:
        """The state of the newest checkpoint that is undamaged. None if there are no checkpoints.

        Raises:
            PruningError: All checkpoints are damaged.

        Warns:
            UserWarning: A checkpoint is damaged; an older one is used.
        """
        paths = self._paths()
        for path in paths:
            try:
                return _read(path)
            except _Damaged as e:
                warn(f'checkpoint {path} is refused, {e}; using the one before')
        if paths:
            raise PruningError(
                f'--resume: all {len(paths)} checkpoints in {self.folder} are damaged; start again with --overwrite')
        return None

    def _paths(self) -> List[Path]:
        """The JSON files of all checkpoints, newest first."""
        return sorted(self.folder.glob('[0-9]*.json'), reverse=True)


class _Damaged(Exception):
    """A checkpoint can't be used; the message says why."""


def _read(path: Path) -> Any:
    weights = path.with_suffix('.safetensors')
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
        expected, body = data.pop('sha256'), data
        found = _checksum(body)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        raise _Damaged('it is not the JSON of a checkpoint') from None
    if found != expected:
        raise _Damaged('its checksum is wrong')
    if body['format'] != FORMAT:
        raise _Damaged(f'its format is {body["format"]}, this version of timm_epfs reads {FORMAT}')
    if not weights.is_file() or _digest(weights) != body['tensors']:
        raise _Damaged(f'the checksum of {weights.name} is wrong')
    return _unflatten(body['state'], safetensors.torch.load_file(weights))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all. Tied tensors are written once per name."""
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # Not with safetensors' save_file: only the owner could read its files.
    write_whole(path, lambda part: part.write_bytes(safetensors.torch.save(separate, {'format': 'pt'})))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flatten(value: Any, tensors: Dict[str, Tensor]) -> Any:
    """Turn a value into JSON values. Tensors move to ``tensors``; the JSON refers to them by name.

    >>> tensors = {}
    >>> _flatten([1, (2.5,), torch.zeros(3)], tensors)
    [1, {'$': 'tuple', 'items': [2.5]}, {'$': 'tensor', 'name': 't0'}]
    >>> list(tensors)
    ['t0']
    """
    if isinstance(value, (Tensor, np.ndarray)):
        kind = 'tensor' if isinstance(value, Tensor) else 'array'
        name = f't{len(tensors)}'
        tensors[name] = torch.as_tensor(value)
        return {'$': kind, 'name': name}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):  # as pairs: JSON would turn the keys of an optimizer's state, numbers, into text
        return {'$': 'dict', 'items': [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, tensors) for item in value]
        return items if isinstance(value, list) else {'$': 'tuple', 'items': items}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise PruningError(f'checkpoint: a {type(value).__name__} can\'t be saved; give tensors and JSON values only')


def _unflatten(value: Any, tensors: Dict[str, Tensor]) -> Any:
    """The inverse of ``_flatten``."""
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value['$']
    if kind in ('tensor', 'array'):
        return tensors[value['name']] if kind == 'tensor' else tensors[value['name']].numpy()
    if kind == 'tuple':
        return tuple(_unflatten(value['items'], tensors))
    return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in value['items']}
