"""The order in which a budget that falls and falls takes the units of all structures."""
from typing import Sequence

import numpy as np

__all__ = ['step_order']


def step_order(grids: Sequence[np.ndarray], descending: Sequence[np.ndarray], sets: np.ndarray) -> np.ndarray:
    """The path from the dense model to the smallest one: which structure takes a step down its grid, step after step.

    A step takes a structure from one count that it may keep to the next lower one.

    - Structures of one set are ranked together: the step whose units have the lowest score comes first. Among equal
      scores it is the step after which its structure has lost the smallest share of its units.
    - Sets aren't compared by scores. They take turns, so that all have lost about the same share of their units.

    Say ``a`` has four units and may keep 1, 2, 3 or 4; ``b`` has two and may keep 1 or 2. In one set, ``a`` (0) loses
    the units of score 1 and 3, ``b`` (1) the one of score 6, and then ``a`` the one of score 7:

    >>> grids = [np.array([1, 2, 3, 4]), np.array([1, 2])]
    >>> descending = [np.array([9., 7., 3., 1.]), np.array([8., 6.])]
    >>> step_order(grids, descending, sets=np.array([0, 0]))
    array([0, 0, 1, 0])

    In a set each, the steps of ``a`` take it past 1/8, 3/8 and 5/8 of its units (their middles), that of ``b`` past
    1/4 of its own:

    >>> step_order(grids, descending, sets=np.array([0, 1]))
    array([0, 1, 0, 0])

    Args:
        grids: Counts that each structure may keep, ascending.
        descending: Scores of each structure's units, descending, shape (units,).
        sets: The set that each structure is in, 0, 1, …, shape (structures,).

    Returns:
        Position of the structure that takes each step, shape (steps,). A structure is there once for every step of its
        grid: the first time it leaves its largest count, the last time it comes to its smallest.
    """
    owner = np.repeat(np.arange(len(grids)), [len(grid) - 1 for grid in grids])
    low = np.concatenate([grid[:-1] for grid in grids])
    high = np.concatenate([grid[1:] for grid in grids])
    units = np.array([len(scores) for scores in descending])

    # A step has the score of its middle unit. A threshold on scores then leaves the count of the grid that is nearest
    # to the number of units above it.
    score = np.concatenate([scores[(grid[:-1] + grid[1:]) // 2] for grid, scores in zip(grids, descending)])
    # Scores that differ by a rounding error alone are equal, so that the shares decide.
    score = (score / (np.abs(score).max(initial=0.0) or 1.0)).astype(np.float32)
    lost = 1 - (low + high) / 2 / units[owner]
    by_rank = np.lexsort((owner, lost, score, sets[owner]))  # set by set, the last key first

    owner, removed = owner[by_rank], (high - low)[by_rank]
    group = sets[owner]
    before = np.cumsum(removed) - removed
    before -= before[np.searchsorted(group, group)]  # units that its set has lost before the step
    lost = (before + removed / 2) / np.bincount(sets, weights=units)[group]
    return owner[np.argsort(lost, kind='stable')]
