"""Which integers follow a cut.

A forward reshapes by numbers: ``x.view(b, n, self.num_heads, -1)`` holds a length in an attribute, which must follow
when that dim is cut; ``b, n, c = x.shape; y.view(b, n, c)`` holds two lengths that must stay equal. ``WatchIntegers``
sees what was given to the calls that shape tensors, as Python objects. ``Follower`` compares it with the labels of the
tensors that came out. No table of architectures is needed.
"""
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from .labels import Label, Labels
from .provenance import Length, Tracked

__all__ = ['CREATES', 'Attribute', 'Follower', 'WatchIntegers']

CREATES = frozenset({
    'zeros', 'ones', 'empty', 'full', 'rand', 'randn', 'empty_strided',
    'new_zeros', 'new_ones', 'new_empty', 'new_full', 'new_empty_strided',
})
_SIZED = frozenset({'view', '_unsafe_view', 'expand', 'reshape'}) | CREATES


@dataclass
class Attribute:
    """An integer attribute of a module.

    Attributes:
        path: Its path.
        value: Its value.
        seen: Pairs (label, scale): ``scale`` times the attribute was the length of a dim with this label.
    """
    path: str
    value: int
    seen: List[Tuple[Label, Fraction]] = field(default_factory=list)


class Follower:
    """Matches the integers that shaped a tensor with the labels of its dims.

    Attributes:
        attributes: The attributes that were lengths, by path.
    """

    def __init__(self, labels: Labels):
        self.attributes: Dict[str, Attribute] = {}
        self._labels = labels
        self._lengths: Dict[int, Length] = {}
        self._given: Dict[str, Any] = {}  # integers given to the torch function that is running

    def length(self, n: int, label: Label) -> int:
        """The length ``n`` of a dim as an integer that remembers the dim."""
        if label is None:
            return n
        return Tracked(n, ((self._lengths.setdefault(id(label), Length(label, self._match)), 1),))

    def note(self, path: str, value: int, label: Label) -> None:
        """An attribute is the length of a dim."""
        self._note(path, value, label, Fraction(1))

    @contextmanager
    def given(self, integers: Dict[str, Any]) -> Iterator[None]:
        """Inside the block, a torch function is running.

        Args:
            integers: Its integer arguments by name, as ``_integers`` gives them. Where there are none, those of the
                function that called it hold.
        """
        before = self._given
        self._given = integers or before
        try:
            yield
        finally:
            self._given = before

    @property
    def normalizes(self) -> bool:
        """Whether the torch function that is running is a layer norm or an RMS norm."""
        return 'normalized_shape' in self._given

    def argument(self, name: str, position: int, label: Label) -> None:
        """An integer argument of the function that is running is the length of a dim."""
        given = self._given.get(name, ())
        if position < len(given) and isinstance(given[position], Tracked):
            self._match(given[position], label)

    def shaped(self, name: str, outputs: Sequence[List[Label]], start: Label) -> None:
        """Compare the integers given with what an operation made.

        Args:
            name: Name of the ATen operation.
            outputs: Labels of each of its outputs.
            start: Of a slice, the label of what lies before it.
        """
        sizes = self._given.get('size')
        if sizes and name in _SIZED and len(sizes) == len(outputs[0]):
            for i, label in enumerate(outputs[0]):
                self.argument('size', i, label)
            self._quotients(sizes, outputs[0])
        pieces, dim = self._given.get('split', ((), 0))
        pieces = [pieces] * len(outputs) if isinstance(pieces, int) else pieces
        if pieces and name in ('split_with_sizes', 'split') and len(pieces) == len(outputs):
            for piece, labels in zip(pieces, outputs):
                if isinstance(piece, Tracked):
                    self._match(piece, labels[dim % len(labels)])
        if name == 'slice' and start is not None and not len(start):
            for stop in self._given.get('stop', ()):
                for label in outputs[0]:
                    if isinstance(stop, Tracked) and label is not None and len(label) == int(stop):
                        self._match(stop, label)

    def normalized(self, labels: List[Label]) -> None:
        """A layer norm or an RMS norm, be it one operation or many, gave a tensor with these labels."""
        shape = self._given['normalized_shape']
        for i, label in enumerate(labels[len(labels) - len(shape):] if shape else ()):
            self._labels.mark_inexact(label, 'normalised over the channels')
            self.argument('normalized_shape', i, label)

    def _match(self, given: Tracked, label: Label) -> None:
        if given < 0:  # a length left open, such as GRN's wb_shape of (1, 1, 1, -1)
            return
        if given.path is not None:
            self._note(given.path, int(int(given) / given.scale), label, given.scale)
        elif given.label is not None and label is not None:
            self._labels.tie_counts(given.label, label)

    def _note(self, path: str, value: int, label: Label, scale: Fraction) -> None:
        self.attributes.setdefault(path, Attribute(path, value)).seen.append((label, scale))

    def _quotients(self, sizes: Sequence[Any], labels: List[Label]) -> None:
        """Find ``x.view(b, n, heads, c // heads)``, where ``c`` was read from a dim: that dim must keep as many entries
        as the two new ones together."""
        for j, size in enumerate(sizes):
            if not isinstance(size, Tracked) or size.scale != 1 or len(size.sources) != 2:
                continue
            (whole, up), (by, down) = sorted(size.sources, key=lambda pair: -pair[1])
            if (up, down) != (1, -1) or not isinstance(whole, Length):
                continue
            for i, other in enumerate(sizes):
                if isinstance(other, Tracked) and other.sources == ((by, 1),) and other.scale == 1:
                    self._tie_quotient(whole.label, labels[i], labels[j], int(other))

    def _tie_quotient(self, whole: np.ndarray, heads: Label, inner: Label, n: int) -> None:
        """Keep the length of a dim equal to the product of two others.

        Args:
            whole: Label of the dim.
            heads: Label of the first of the two, of ``n`` entries.
            inner: Label of the second.
            n: Number of heads.
        """
        if heads is not None and inner is not None:
            product = self._labels.merge([heads, inner]).ravel()
        elif inner is not None:
            product = np.resize(inner, len(whole))
        elif heads is not None:
            product = np.repeat(heads, len(whole) // n)
        else:
            self._labels.pin(whole)
            return
        self._labels.tie_counts(whole, product)


class WatchIntegers(TorchFunctionMode):
    """Passes the integers that shape tensors to a follower.

    It works above autograd, where a length that was read from ``x.shape`` or ``self.num_heads`` is still an object.

    Args:
        follower: It gets the integers before a function runs, and the labels of what a norm gives.
        labels_of: Labels of a tensor.
    """

    def __init__(self, follower: Follower, labels_of: Callable[[torch.Tensor], List[Label]]):
        super().__init__()
        self._follower = follower
        self._labels_of = labels_of

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, '__self__', None) is torch.Tensor.shape or (func is torch.Tensor.size and not kwargs):
            return self._shape(*args)
        with self._follower.given(_integers(func, args, kwargs)):
            out = func(*args, **kwargs)
            if self._follower.normalizes:
                self._follower.normalized(self._labels_of(out))
        return out

    def _shape(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        lengths = [self._follower.length(n, label) for n, label in zip(tensor.shape, self._labels_of(tensor))]
        return lengths[dim] if type(dim) is int else torch.Size(lengths)


def _integers(func: Callable, args: Tuple, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The integers that say how a tensor is shaped, by the name of the argument."""
    name = getattr(func, '__name__', '')
    if name in ('view', 'reshape', 'expand'):
        return {'size': _flat(args[1:]) or list(kwargs.get('shape', kwargs.get('size', ())))}
    if name in CREATES:
        return {'size': _flat(args[1:] if name.startswith('new_') else args[:1] if name == 'full' else args)}
    if name in ('split', 'split_with_sizes'):
        sizes = args[1] if len(args) > 1 else kwargs.get('split_size_or_sections', kwargs.get('split_size', ()))
        dim = args[2] if len(args) > 2 else kwargs.get('dim', 0)
        return {'split': (list(sizes) if isinstance(sizes, (tuple, list)) else sizes, dim)}
    if name == '__getitem__':
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return {'stop': [s.stop for s in index if isinstance(s, slice)]}
    if name == 'pad':
        return {'pad': list(args[1] if len(args) > 1 else kwargs.get('pad', ()))}
    if name in ('layer_norm', 'rms_norm'):
        return {'normalized_shape': list(args[1] if len(args) > 1 else kwargs.get('normalized_shape', ()))}
    if name == 'group_norm':
        return {'num_groups': [args[1] if len(args) > 1 else kwargs.get('num_groups')]}
    if name.startswith('conv'):  # the seventh argument of plain and of transposed convolutions
        return {'groups': [args[6] if len(args) > 6 else kwargs.get('groups')]}
    return {}


def _flat(args: Iterable[Any]) -> List[Any]:
    """Sizes given one by one or as one tuple."""
    args = list(args)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0])
    return args
