"""Integers that the users of a model read, not its forward: ``num_features``, ``feature_info``, ``in_features``, ….

They are recognised by what they describe: the width of a module's input or output, or of what ``forward_features``
returns.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..core import named_tensors
from .recorder import Recorder

__all__ = ['watch_interface']

# Surgery sets the widths of these from the shapes of their tensors, where they have any.
_SET_BY_SURGERY = (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.PReLU)
_INPUT = frozenset({'in_features', 'in_chs', 'in_channels', 'num_features', 'in_dim', 'input_size', 'hidden_size'})
_OUTPUT = frozenset({'out_features', 'out_chs', 'out_channels', 'out_dim', 'num_features', 'num_channels'})


class _Ran(NamedTuple):
    """The first tensor that a module took and the first that it gave."""
    source: Optional[torch.Tensor]
    out: Optional[torch.Tensor]


@contextmanager
def watch_interface(model: nn.Module, rec: Recorder, args: Tuple) -> Iterator[None]:
    """Let ``rec.follower`` know the widths that timm's API reports, from the forward that is recorded inside.

    Args:
        model: The recorder's copy. It keeps the hooks: use it for nothing else.
        rec: The recorder.
        args: Positional arguments of the forward.
    """
    ran: Dict[str, _Ran] = {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(
                lambda _, args, out, name=name: ran.__setitem__(name, _Ran(_first(args), _first(out))),
            )
    features: List[Any] = []
    forward_features = getattr(model, 'forward_features', None)
    if forward_features is not None:
        model.forward_features = lambda *args, **kwargs: _kept(features, forward_features(*args, **kwargs))
    yield
    _note_modules(model, rec, ran)
    _note_model(model, rec, ran, _first(features))
    _note_feature_info(model, rec, ran, args)


def _kept(values: List[Any], value: Any) -> Any:
    values.append(value)
    return value


def _first(value: Any) -> Optional[torch.Tensor]:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def _note(rec: Recorder, path: str, value: Any, tensor: Optional[torch.Tensor]) -> None:
    """The attribute is a width of the tensor if a dim that can be cut, the usual ones first, has that length."""
    if type(value) is not int or tensor is None or path in rec.follower.attributes:
        return
    labels = rec.labels_of(tensor)
    for d in (1, tensor.ndim - 1, *range(tensor.ndim)):
        if d < tensor.ndim and tensor.shape[d] == value and labels[d] is not None:
            rec.follower.note(path, value, labels[d])
            return


def _note_modules(model: nn.Module, rec: Recorder, ran: Dict[str, _Ran]) -> None:
    for name, module in model.named_modules():
        if name not in ran or (isinstance(module, _SET_BY_SURGERY) and named_tensors(module)):
            continue
        for key in sorted(vars(module).keys() & (_INPUT | _OUTPUT)):
            if key in _INPUT:
                _note(rec, f'{name}.{key}', getattr(module, key), ran[name].source)
            if key in _OUTPUT:
                _note(rec, f'{name}.{key}', getattr(module, key), ran[name].out)


def _note_model(model: nn.Module, rec: Recorder, ran: Dict[str, _Ran], features: Optional[torch.Tensor]) -> None:
    for key in ('num_features', 'embed_dim'):
        _note(rec, key, vars(model).get(key), features)
    classifier = getattr(model, 'get_classifier', lambda: None)()
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # the other one is for distillation
    name = next((n for n, m in model.named_modules() if m is classifier and n in ran), '')
    pooled = ran[name].source if name else None
    while name := name.rpartition('.')[0]:  # a head's reset() makes a new classifier by a width that the head holds
        head = model.get_submodule(name)
        for key in sorted(vars(head).keys() & (_INPUT | _OUTPUT)):
            _note(rec, f'{name}.{key}', getattr(head, key), pooled)
    _note(rec, 'head_hidden_size', vars(model).get('head_hidden_size'), pooled)
    _note(rec, 'num_features', vars(model).get('num_features'), pooled)


def _note_feature_info(model: nn.Module, rec: Recorder, ran: Dict[str, _Ran], args: Tuple) -> None:
    info = getattr(model, 'feature_info', None)
    entries = {i: entry for i, entry in enumerate(getattr(info, 'info', info) or []) if isinstance(entry, dict)}
    for i, entry in entries.items():
        if entry.get('module') in ran:
            _note(rec, _path(i), entry.get('num_chs'), ran[entry['module']].out)
    if not hasattr(model, 'forward_intermediates') or all(_path(i) in rec.follower.attributes for i in entries):
        return
    try:  # the name of a module doesn't always say which of its outputs is the feature
        outputs = rec.watch(lambda: model.forward_intermediates(*args, intermediates_only=True))
    except Exception:
        return
    for i, output in zip(entries, outputs):
        _note(rec, _path(i), entries[i].get('num_chs'), _first(output))


def _path(entry: int) -> str:
    return f'feature_info.{entry}.num_chs'
