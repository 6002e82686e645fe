"""Integers that remember where they come from: an attribute of a module, or the length of a dim."""
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Iterator, Optional, Tuple, Union

import numpy as np
from torch import nn

from .labels import Label

__all__ = ['Length', 'Tracked', 'tagged']


@dataclass(frozen=True, eq=False)
class Length:
    """A dim whose length was read."""
    label: np.ndarray


Source = Union[str, Length]  # the path of an attribute, or a length


class Tracked(int):
    """An integer and what it was computed from: scale · Π source ** power.

    >>> dim, num_heads = Tracked(192, (('attn.dim', 1),)), Tracked(3, (('attn.num_heads', 1),))
    >>> (dim // 2).sources, (dim // 2).scale
    ((('attn.dim', 1),), Fraction(1, 2))
    >>> (dim // num_heads).sources
    (('attn.dim', 1), ('attn.num_heads', -1))
    >>> type(dim + 1)                              # neither a multiple nor a quotient: a plain number
    <class 'int'>

    Attributes:
        sources: Pairs (source, power).
        scale: The rational factor.
    """

    def __new__(cls, value: int, sources: Tuple[Tuple[Source, int], ...], scale: Fraction = Fraction(1)):
        self = super().__new__(cls, value)
        self.sources = sources
        self.scale = scale
        return self

    @property
    def source(self) -> Optional[Source]:
        """Its source, where it is a multiple of a single one."""
        return self.sources[0][0] if len(self.sources) == 1 and self.sources[0][1] == 1 else None

    @property
    def path(self) -> Optional[str]:
        """The path of the attribute that it is a multiple of, if any."""
        return self.source if isinstance(self.source, str) else None

    @property
    def label(self) -> Label:
        """The label of the dim whose length it is, if any."""
        return self.source.label if isinstance(self.source, Length) and self.scale == 1 else None

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


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model's integer attributes, also those in tuples and lists, remember their paths."""
    before = []
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        for key, value in list(vars(module).items()):
            if key.startswith('_') or key == 'training':
                continue
            if type(value) is int:
                tracked: Any = Tracked(value, ((prefix + key, 1),))
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                tracked = type(value)(Tracked(v, ((f'{prefix}{key}.{i}', 1),)) for i, v in enumerate(value))
            else:
                continue
            before.append((module, key, value))
            vars(module)[key] = tracked
    try:
        yield
    finally:
        for module, key, value in before:
            vars(module)[key] = value
