"""Which units form a structure: those that are cut in the same places."""
from typing import Iterable, List, Sequence

import numpy as np

__all__ = ['group_units']


def group_units(dims: Sequence[np.ndarray], others: Iterable[np.ndarray], size: int) -> List[np.ndarray]:
    """Group units that own the same number of entries in every dim.

    This is partition refinement: all units start in one class, and each dim in turn splits the classes by the number of
    entries that their units own of it. The order of the dims makes no difference to the result.

    Below, four channels are made (first dim), normalised (second) and read (third), where the reader sees the first two
    twice. So 3 and 5 are one structure, 7 and 9 another.

    >>> made, read = np.array([3, 5, 7, 9]), np.array([3, 3, 5, 5, 7, 9])
    >>> group_units([made, made, read], [], 10)
    [array([3, 5]), array([7, 9])]

    Args:
        dims: For each dim of each parameter, the unit of each entry; -1 where it isn't cut.
        others: The same for dims of activations.
        size: Units are numbers below this.

    Returns:
        Units of each group of two or more, in the order in which the parameters' dims have them; the groups likewise.
        Units that no parameter has are left out.
    """
    classes = np.zeros(size, dtype=np.int64)
    count = 1
    place = np.full(size, np.iinfo(np.int64).max)  # where each unit is met first, as all dims are read in a row
    position = 0
    for dim in dims:
        at = np.flatnonzero(dim >= 0)
        np.minimum.at(place, dim[at], position + at)
        position += len(dim)
        count = _refine(classes, count, dim[at])
    for dim in others:
        count = _refine(classes, count, dim[dim >= 0])
    units = np.flatnonzero(place < position)
    return _by_class(units[np.argsort(place[units])], classes)


def _refine(classes: np.ndarray, count: int, owners: np.ndarray) -> int:
    """Split classes, in place, by how often each unit is among ``owners``.

    Args:
        classes: Class of each unit, a number below ``count``.
        count: Numbers of classes that were taken before.
        owners: The unit of each entry of a dim.

    Returns:
        The same, after.
    """
    if not len(owners):
        return count
    units, entries = np.unique(owners, return_counts=True)
    # Units with the same pair (class, entries) stay together, in a new class; all others keep the one that they have.
    pairs = classes[units] * (entries.max() + 1) + entries
    distinct, number = np.unique(pairs, return_inverse=True)
    classes[units] = count + number
    return count + len(distinct)


def _by_class(units: np.ndarray, classes: np.ndarray) -> List[np.ndarray]:
    """Units of each class that has two or more, in their order, by the first of each."""
    order = np.argsort(classes[units], kind='stable')
    starts = np.flatnonzero(np.diff(classes[units][order]))
    groups = [group for group in np.split(order, starts + 1) if len(group) > 1]
    return [units[group] for group in sorted(groups, key=lambda group: group[0])]
