"""Helpers for index arrays."""
from typing import Sequence

import numpy as np

__all__ = ['complement', 'distinct']


def complement(taken: np.ndarray, length: int) -> np.ndarray:
    """The entries of ``range(length)`` that aren't in ``taken``, ascending, int64.

    >>> complement(np.array([3, 0]), 5)
    array([1, 2, 4])
    """
    free = np.ones(length, dtype=bool)
    free[taken] = False
    return np.flatnonzero(free)


def distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The distinct values of several arrays, ascending. Faster than ``np.unique`` for short arrays.

    >>> distinct([np.array([7, 2]), np.array([2, 5])])
    array([2, 5, 7])
    """
    values = np.sort(np.concatenate(parts))
    if not len(values):
        return values
    is_first = np.concatenate([[True], values[1:] != values[:-1]])
    return values[is_first]
