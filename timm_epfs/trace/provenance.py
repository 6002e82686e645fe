"""Integers that know where they come from.

Above autograd, where Python's integers are still objects, ``Provenance`` sees what the calls that shape tensors were
given. ``x.view(b, n, self.num_heads, -1)`` tells that ``num_heads`` is the length of a dim, so that it follows when the
dim is cut; ``c`` of ``b, n, c = x.shape`` tells that two lengths must stay equal. No table of architectures is needed.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .labels import Label

__all__ = ['CREATES', 'Length', 'Provenance', 'Tracked', 'tagged']

CREATES = frozenset({
    'zeros', 'ones', 'empty', 'full', 'rand', 'randn', 'empty_strided',
    'new_zeros', 'new_ones', 'new_empty', 'new_full', 'new_empty_strided',
})


class Tracked(int):
    """An integer that knows what it was computed from: ``scale · Π source``, inverted sources included.

    Attributes:
        scale: Rational factor.
        sources: Pairs (source, power): a source is an attribute's path, or the label of a dim whose length was read.
    """

    def __new__(cls, value: int, sources: Tuple[Tuple[Union[str, 'Length'], int], ...], scale: Fraction = Fraction(1)):
        self = super().__new__(cls, value)
        self.sources = sources
        self.scale = scale
        return self

    @property
    def path(self) -> Optional[str]:
        """The attribute's path, if it is one attribute times a scale."""
        (source, power), = self.sources if len(self.sources) == 1 else ((None, 0),)
        return source if power == 1 and isinstance(source, str) else None

    @property
    def label(self) -> Label:
        """The label, if it is the length of one dim."""
        (source, power), = self.sources if len(self.sources) == 1 else ((None, 0),)
        return source.label if power == 1 and isinstance(source, Length) and self.scale == 1 else None

    def __mul__(self, other):
        return self._combined(int(self) * other, other, 1) if isinstance(other, int) and other else int(self) * other

    __rmul__ = __mul__

    def __floordiv__(self, other):
        exact = isinstance(other, int) and other and int(self) % other == 0
        return self._combined(int(self) // other, other, -1) if exact else int(self) // other

    def _combined(self, value: int, other: int, power: int) -> 'Tracked':
        if not isinstance(other, Tracked):
            return Tracked(value, self.sources, self.scale * Fraction(int(other)) ** power)
        powers = dict(self.sources)
        for source, p in other.sources:
            powers[source] = powers.get(source, 0) + power * p
        sources = tuple((source, p) for source, p in powers.items() if p)
        return Tracked(value, sources, self.scale * other.scale ** power)

    def __reduce__(self):
        return int, (int(self),)


@dataclass(frozen=True, eq=False)
class Length:
    """A dim whose length was read."""
    label: np.ndarray


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Integer attributes, and those inside tuples and lists, know their paths for the time being."""
    before = []
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        for key, value in list(vars(module).items()):
            if key.startswith('_') or key == 'training':
                continue
            if type(value) is int:
                tagged: Any = Tracked(value, ((prefix + key, 1),))
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                tagged = type(value)(Tracked(v, ((f'{prefix}{key}.{i}', 1),)) for i, v in enumerate(value))
            else:
                continue
            before.append((module, key, value))
            vars(module)[key] = tagged
    try:
        yield
    finally:
        for module, key, value in before:
            vars(module)[key] = value


def _flat_ints(args: Iterable[Any]) -> List[Any]:
    args = list(args)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0])
    return args


class Provenance(TorchFunctionMode):
    """Keeps the integer arguments of the calls that shape tensors, as objects, for the rules below."""

    def __init__(self, follower: Any, labels_of: Callable[[torch.Tensor], List[Label]]):
        super().__init__()
        self._follower = follower
        self._labels_of = labels_of

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, '__self__', None) is torch.Tensor.shape or (func is torch.Tensor.size and not kwargs):
            return self._shape(*args)
        before = self._follower.hints
        self._follower.hints = self._hints(func, args, kwargs) or before
        try:
            out = func(*args, **kwargs)
            if 'normalized_shape' in self._follower.hints:
                self._follower.normalized(self._labels_of(out))
            return out
        finally:
            self._follower.hints = before

    def _shape(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        lengths = [self._follower.length(n, label) for n, label in zip(tensor.shape, self._labels_of(tensor))]
        return lengths[dim] if type(dim) is int else torch.Size(lengths)

    def _hints(self, func, args, kwargs) -> Dict[str, Any]:
        name = getattr(func, '__name__', '')
        if name in ('view', 'reshape', 'expand'):
            return {'size': _flat_ints(args[1:]) or list(kwargs.get('shape', kwargs.get('size', ())))}
        if name in CREATES:
            return {'size': _flat_ints(args[1:] if name.startswith('new_') else args[:1] if name == 'full' else args)}
        if name in ('split', 'split_with_sizes'):
            sizes = args[1] if len(args) > 1 else kwargs.get('split_size_or_sections', kwargs.get('split_size', ()))
            dim = args[2] if len(args) > 2 else kwargs.get('dim', 0)
            return {'split': (list(sizes) if isinstance(sizes, (tuple, list)) else sizes, dim)}
        if name == '__getitem__':
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return {'stop': [s.stop for s in index if isinstance(s, slice)]}
        if name == 'pad':
            return {'pad': list(args[1] if len(args) > 1 else kwargs.get('pad', ()))}
        if name == 'layer_norm' or name == 'rms_norm':
            return {'normalized_shape': list(args[1] if len(args) > 1 else kwargs.get('normalized_shape', ()))}
        if name == 'group_norm':
            return {'num_groups': [args[1] if len(args) > 1 else kwargs.get('num_groups')]}
        if name.startswith('conv'):  # the seventh argument of the plain and of the transposed ones
            return {'groups': [args[6] if len(args) > 6 else kwargs.get('groups')]}
        return {}
