"""Which integers follow a cut: attributes that are lengths, and lengths that must stay equal."""
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from .labels import Label, Labels
from .provenance import CREATES, Length, Tracked

__all__ = ['Attribute', 'Follower']

_SIZED = frozenset({'view', '_unsafe_view', 'expand', 'reshape'}) | CREATES


@dataclass
class Attribute:
    """An integer attribute of a module and the labels whose length it was seen to be, each times a scale."""
    path: str
    value: int
    seen: List[Tuple[Label, Fraction]] = field(default_factory=list)


class Follower:
    """Matches the integers that shaped a tensor with the labels of its dims.

    Attributes:
        attributes: What was seen of each integer attribute, by path.
        hints: Integer arguments of the call that is running, by the name of the argument.
    """

    def __init__(self, labels: Labels):
        self.attributes: Dict[str, Attribute] = {}
        self.hints: Dict[str, Any] = {}
        self._labels = labels
        self._lengths: Dict[int, Length] = {}

    def length(self, n: int, label: Label) -> int:
        """``n``, the length of a label, as an integer that remembers it."""
        if label is None:
            return n
        return Tracked(n, ((self._lengths.setdefault(id(label), Length(label)), 1),))

    def argument(self, name: str, position: int, label: Label) -> None:
        """The integer that was passed here is the length of this label."""
        given = self.hints.get(name, ())
        if position < len(given) and isinstance(given[position], Tracked):
            self._see(given[position], label)

    def shaped(self, name: str, outputs: Sequence[List[Label]], start: Label) -> None:
        """An operation whose sizes were given has run.

        Args:
            name: Its name.
            outputs: Labels of its outputs.
            start: What a slice left out before it.
        """
        sizes = self.hints.get('size')
        if sizes and name in _SIZED and len(sizes) == len(outputs[0]):
            for i, label in enumerate(outputs[0]):
                self.argument('size', i, label)
            self._quotients(sizes, outputs[0])
        pieces, dim = self.hints.get('split', ((), 0))
        pieces = [pieces] * len(outputs) if isinstance(pieces, int) else pieces
        if pieces and name in ('split_with_sizes', 'split') and len(pieces) == len(outputs):
            for piece, labels in zip(pieces, outputs):
                if isinstance(piece, Tracked):
                    self._see(piece, labels[dim % len(labels)])
        if name == 'slice' and start is not None and not len(start):
            for stop in self.hints.get('stop', ()):
                for label in outputs[0]:
                    if isinstance(stop, Tracked) and label is not None and len(label) == int(stop):
                        self._see(stop, label)

    def normalized(self, labels: List[Label]) -> None:
        """A layer norm or one of its kin, in one operation or in many, gave a tensor with these labels."""
        shape = self.hints.get('normalized_shape', ())
        for i, label in enumerate(labels[len(labels) - len(shape):] if shape else ()):
            self._labels.mark_inexact(label, 'normalised over the channels')
            self.argument('normalized_shape', i, label)

    def _quotients(self, sizes: Sequence[Any], labels: List[Label]) -> None:
        """``x.view(b, n, heads, c // heads)``: entries of the dim that ``c`` is the length of go as whole heads."""
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
        if heads is not None and inner is not None:
            entries = self._labels.merge([heads, inner]).ravel()
        elif inner is not None:
            entries = np.resize(inner, len(whole))
        elif heads is not None:
            entries = np.repeat(heads, len(whole) // n)
        else:
            self._labels.pin(whole)
            return
        self._labels.tie_counts(whole, entries)

    def _see(self, given: Tracked, label: Label) -> None:
        if given < 0:  # a length left open, such as GRN's wb_shape of (1, 1, 1, -1)
            return
        if given.path is not None:
            attribute = self.attributes.setdefault(given.path, Attribute(given.path, int(int(given) / given.scale)))
            attribute.seen.append((label, given.scale))
        elif given.label is not None and label is not None:
            self._labels.tie_counts(given.label, label)
