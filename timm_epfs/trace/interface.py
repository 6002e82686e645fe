"""Integers that a user of the model reads, not its forward: ``num_features``, ``feature_info``, ``in_features`` …

They are found by what they describe: the width of a module's input or output, or of what ``forward_features`` returns.
"""
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .follow import Attribute
from .recorder import Recorder

__all__ = ['watch_interface']

# Surgery reads the widths of these off their tensors.
_SAID_BY_SHAPE = (nn.Linear, _ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.PReLU)
_INPUT = frozenset({'in_features', 'in_chs', 'in_channels', 'num_features', 'in_dim', 'input_size', 'hidden_size'})
_OUTPUT = frozenset({'out_features', 'out_chs', 'out_channels', 'out_dim', 'num_features'})


@contextmanager
def watch_interface(model: nn.Module, rec: Recorder, args: Tuple) -> Iterator[None]:
    """While a forward is recorded, note the labels of the widths that timm's API reports.

    Args:
        model: The recorder's copy; it is left with hooks and is to be thrown away.
        rec: Attributes found are added to ``rec.follower.attributes``.
        args: Positional arguments of the forward.
    """
    widths: Dict[str, Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(
                lambda _, args, out, name=name: widths.__setitem__(name, (_first(args), _first(out))),
            )
    features: List[Any] = []
    inner = getattr(model, 'forward_features', None)
    if inner is not None:
        model.forward_features = lambda *args, **kwargs: features.append(inner(*args, **kwargs)) or features[-1]
    yield
    _modules(model, rec, widths)
    _root(model, rec, widths, _first(features))
    _features(model, rec, widths, args)


def _first(value: Any) -> Optional[torch.Tensor]:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


def _note(rec: Recorder, path: str, value: Any, tensor: Optional[torch.Tensor]) -> None:
    """``path`` is the width of ``tensor`` if one of its cuttable dims, the usual ones first, has that length."""
    if type(value) is not int or tensor is None or path in rec.follower.attributes:
        return
    labels = rec.labels_of(tensor)
    for d in (1, tensor.ndim - 1, *range(tensor.ndim)):
        if d < tensor.ndim and tensor.shape[d] == value and labels[d] is not None:
            rec.follower.attributes[path] = Attribute(path, value, [(labels[d], Fraction(1))])
            return


def _modules(model: nn.Module, rec: Recorder, widths: Dict) -> None:
    for name, module in model.named_modules():
        if name not in widths or isinstance(module, _SAID_BY_SHAPE):
            continue
        source, out = widths[name]
        for key in vars(module).keys() & (_INPUT | _OUTPUT):
            if key in _INPUT:
                _note(rec, f'{name}.{key}', getattr(module, key), source)
            if key in _OUTPUT:
                _note(rec, f'{name}.{key}', getattr(module, key), out)


def _root(model: nn.Module, rec: Recorder, widths: Dict, features: Optional[torch.Tensor]) -> None:
    for key in ('num_features', 'embed_dim'):
        _note(rec, key, vars(model).get(key), features)
    classifier = getattr(model, 'get_classifier', lambda: None)()
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier  # and one for distillation
    name = next((n for n, m in model.named_modules() if m is classifier and n in widths), '')
    at_classifier = widths[name][0] if name else None
    while name := name.rpartition('.')[0]:  # a head makes a new last layer by a width that it holds itself
        for key in vars(model.get_submodule(name)).keys() & (_INPUT | _OUTPUT):
            _note(rec, f'{name}.{key}', getattr(model.get_submodule(name), key), at_classifier)
    _note(rec, 'head_hidden_size', vars(model).get('head_hidden_size'), at_classifier)
    _note(rec, 'num_features', vars(model).get('num_features'), at_classifier)


def _features(model: nn.Module, rec: Recorder, widths: Dict, args: Tuple) -> None:
    info = getattr(model, 'feature_info', None)
    entries = {i: entry for i, entry in enumerate(getattr(info, 'info', info) or []) if isinstance(entry, dict)}
    for i, entry in entries.items():
        if entry.get('module') in widths:
            _note(rec, _path(i), entry.get('num_chs'), widths[entry['module']][1])
    if not hasattr(model, 'forward_intermediates') or all(_path(i) in rec.follower.attributes for i in entries):
        return
    try:  # a module's name doesn't always tell which of its outputs is the feature
        outputs = rec.also(lambda: model.forward_intermediates(*args, intermediates_only=True))
    except Exception:
        return
    for i, output in zip(entries, outputs):
        _note(rec, _path(i), entries[i].get('num_chs'), _first(output))


def _path(entry: int) -> str:
    return f'feature_info.{entry}.num_chs'
