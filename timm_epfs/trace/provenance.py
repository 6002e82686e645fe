"""Integers that remember where they come from: an attribute of a module, or the length of a dim."""
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Iterator, Optional, Tuple, Union

import numpy as np
from torch import nn

from ..core import changed_settings, settings_of
from .labels import Label

__all__ = ['Length', 'Tracked', 'tagged']


@dataclass(frozen=True, eq=False)
class Length:
    """A dim whose length was read.

    Attributes:
        label: Its label.
        found_equal: Told each integer that a forward compares with the length and finds equal.
    """
    label: np.ndarray
    found_equal: Callable[['Tracked', np.ndarray], None] = lambda other, label: None


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

    def __eq__(self, other):
        if not isinstance(other, Tracked):  # a tensor or an array compares all its entries
            return int(self) == other
        equal = int(self) == int(other)
        if equal:
            for a, b in ((self, other), (other, self)):
                if a.label is not None:
                    a.source.found_equal(b, a.label)
                    break
        return equal

    def __ne__(self, other):
        return not self == other if isinstance(other, Tracked) else int(self) != other

    __hash__ = int.__hash__

    def __reduce__(self):
        return int, (int(self),)


@contextmanager
def tagged(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model's integer attributes remember their paths, also those in tuples, lists and configs.

    Modules that share a config have one of their own inside the block, so that each may get another width.
    """
    before = []
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            if key.startswith('_') or key == 'training':
                continue
            tracked = _tracked(f'{name}.{key}' if name else key, value)
            if tracked is not value:
                before.append((module, key, value))
                vars(module)[key] = tracked
    try:
        yield
    finally:
        for module, key, value in before:
            vars(module)[key] = value


def _tracked(path: str, value: Any, within: Tuple[int, ...] = ()) -> Any:
    """A value whose integers remember their paths; the value itself where it has none.

    Args:
        path: Its path.
        value: The value.
        within: Ids of the configs that it is in, any of which it may hold in turn.
    """
    if type(value) is int:
        return Tracked(value, ((path, 1),))
    if type(value) in (tuple, list):
        if not value or any(type(v) is not int for v in value):
            return value
        return type(value)(_tracked(f'{path}.{i}', v) for i, v in enumerate(value))
    if id(value) in within:
        return value
    found = {key: (v, _tracked(f'{path}.{key}', v, (*within, id(value)))) for key, v in settings_of(value).items()}
    changes = {key: after for key, (v, after) in found.items() if after is not v and '.' not in key}
    return changed_settings(value, changes) if changes else value
