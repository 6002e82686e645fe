"""``step_order``: the order in which the units of all structures are cut as the budget gets smaller."""
from typing import Sequence

import numpy as np

__all__ = ['step_order']


def step_order(grids: Sequence[np.ndarray], descending: Sequence[np.ndarray], sets: np.ndarray) -> np.ndarray:
    """The path from the dense model to the smallest one: which structure is cut next, step by step.

    A step takes a structure from one count of its grid to the next lower one.

    - Structures of one set are ranked together: the step whose units have the lowest score comes first. Among equal
      scores, it is the step that leaves its structure with the largest share of its units.
    - Scores of different sets aren't compared. The sets take turns, so that all have lost about the same share of their
      units.

    For example, ``a`` has four units and may keep 1, 2, 3 or 4; ``b`` has two and may keep 1 or 2. In one set, ``a``
    (0) loses the units of score 1 and 3, then ``b`` (1) loses its unit of score 6, and then ``a`` its unit of score 7:

    >>> grids = [np.array([1, 2, 3, 4]), np.array([1, 2])]
    >>> descending = [np.array([9., 7., 3., 1.]), np.array([8., 6.])]
    >>> step_order(grids, descending, sets=np.array([0, 0]))
    array([0, 0, 1, 0])

    If each has a set of its own, steps are ordered by the share of units that is lost half-way through them. These are
    1/8, 3/8 and 5/8 for ``a``, and 1/4 for ``b``:

    >>> step_order(grids, descending, sets=np.array([0, 1]))
    array([0, 1, 0, 0])

    Args:
        grids: Counts that each structure may keep, ascending.
        descending: Scores of each structure's units, descending, shape (units,).
        sets: Number of the set that each structure is in, from 0, shape (structures,).

    Returns:
        Position of the structure that is cut in each step, shape (steps,). Each structure occurs once for every step of
        its grid, from its largest count to its smallest.
    """
    owner = np.repeat(np.arange(len(grids)), [len(grid) - 1 for grid in grids])
    low = np.concatenate([grid[:-1] for grid in grids])
    high = np.concatenate([grid[1:] for grid in grids])
    units = np.array([len(scores) for scores in descending])

    # A step has the score of its middle unit. If steps are then taken up to some score, each structure keeps the count
    # of its grid that is nearest to its number of units above that score.
    score = np.concatenate([scores[(grid[:-1] + grid[1:]) // 2] for grid, scores in zip(grids, descending)])
    # In float32, scores that differ only by a rounding error are equal, so that the shares decide.
    score = (score / (np.abs(score).max(initial=0.0) or 1.0)).astype(np.float32)
    lost = 1 - (low + high) / 2 / units[owner]
    by_rank = np.lexsort((owner, lost, score, sets[owner]))  # set by set; the last key counts first

    # Merge the orders of the sets, by the share of its units that the set has lost half-way through the step.
    owner, removed = owner[by_rank], (high - low)[by_rank]
    set_of_step = sets[owner]
    lost_before = np.cumsum(removed) - removed
    lost_before -= lost_before[np.searchsorted(set_of_step, set_of_step)]  # count from the first step of the set
    units_of_set = np.bincount(sets, weights=units)
    lost = (lost_before + removed / 2) / units_of_set[set_of_step]
    return owner[np.argsort(lost, kind='stable')]
