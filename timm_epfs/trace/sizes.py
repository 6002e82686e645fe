"""Lengths of dims, and integers that follow them, as functions of how many units are left."""
from fractions import Fraction
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..core import Size, Structure
from .follow import Attribute
from .labels import Label, Solution

__all__ = ['Sizer', 'attribute_sizes']


class Sizer:
    """Sizes of labels.

    Args:
        solution: The units.
        structures: The structures; those beyond the groups, which are whole blocks, have no entries.
        groups: Units of each structure.
    """

    def __init__(self, solution: Solution, structures: Sequence[Structure], groups: Sequence[np.ndarray]):
        self._names = [s.name for s in structures]
        self._structure = np.full(len(solution.unit), -1, dtype=np.int64)
        for i, units in enumerate(groups):
            self._structure[units] = i
        self._structure = np.where(solution.pinned, -1, self._structure[solution.unit])
        self._units = [len(units) for units in groups]
        self._known: Dict[int, Tuple[np.ndarray, Size]] = {}  # by the id of a label, which is kept so that it lives
        self._constant: Dict[int, Size] = {}

    def __call__(self, n: int, label: Label) -> Size:
        """The size of a dim of dense length ``n``. A dim without a label is never cut."""
        if label is None:
            if n not in self._constant:
                self._constant[n] = Size(n)
            return self._constant[n]
        if id(label) not in self._known:
            owner = self._structure[label]
            which, counts = np.unique(owner[owner >= 0], return_counts=True)
            coefs = tuple((self._names[i], int(c) // self._units[i]) for i, c in zip(which.tolist(), counts))
            self._known[id(label)] = (label, Size(int((owner < 0).sum()), coefs))
        return self._known[id(label)][1]

    def is_cut(self, label: np.ndarray) -> bool:
        """Whether any entry of a label can go."""
        return bool(self(len(label), label).coefs)

    def lengths(self, left: Mapping[str, int]) -> Callable[[int, Label], int]:
        """A function (dense length, label) → length, at the given numbers of units left."""
        known: Dict[int, int] = {}

        def length(n: int, label: Label) -> int:
            if label is None:
                return n
            if id(label) not in known:
                known[id(label)] = self(n, label)(left)
            return known[id(label)]
        return length


def attribute_sizes(
        attributes: Iterable[Attribute],
        sizer: Sizer,
) -> Tuple[Dict[str, Size], List[Tuple[np.ndarray, str]]]:
    """The integer attributes that follow a cut.

    Returns:
        sizes: Their sizes, by path.
        conflicts: Labels that can't be cut, since an attribute would have to have two values or a fraction, and why.
    """
    found, conflicts = {}, []
    for attribute in attributes:
        sizes = {
            Size(attribute.value) if label is None else _divided(sizer(0, label), scale)
            for label, scale in attribute.seen
        }
        if len(sizes) > 1 or None in sizes:
            why = f'{attribute.path} is one number, and what it is the length of would be cut differently'
            conflicts += [(label, why) for label, _ in attribute.seen if label is not None and sizer.is_cut(label)]
        elif (size := sizes.pop()).coefs:
            found[attribute.path] = size
    return found, conflicts


def _divided(size: Size, scale: Fraction) -> Optional[Size]:
    """The size of an attribute of which ``scale`` times has this size; ``None`` if it isn't always an integer.

    >>> _divided(Size(4, (('conv', 2),)), Fraction(1, 2))
    Size(const=8, coefs=(('conv', 4),))
    """
    numbers = [Fraction(n) / scale for n in (size.const, *(coef for _, coef in size.coefs))]
    if any(n.denominator != 1 for n in numbers):
        return None
    return Size(int(numbers[0]), tuple((name, int(n)) for (name, _), n in zip(size.coefs, numbers[1:])))
