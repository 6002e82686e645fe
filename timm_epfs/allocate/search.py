"""Where a budget is met: a walk down the grids of all structures, and repairs where their steps are too coarse."""
from typing import List, Optional, Tuple

import numpy as np

from ..core import Budget, CostModel

__all__ = ['Search', 'TOLERANCE']

# Shares of the dense cost: how far from the target needs no warning, and what a repair aims at and must gain a move.
TOLERANCE, NEAR, PROGRESS = 0.01, 0.001, 1e-6
# How many steps from the path a repair may take a structure, where the gap is still wider than this.
REACHES = ((1, NEAR), (4, 2 * NEAR), (16, TOLERANCE), (1 << 30, TOLERANCE))
FIRST_MOVES = 128  # an exchange is tried from so many first moves, for about 0.1 ms each


class Search:
    """The grids of all structures, laid end to end. A place ``at`` is one position for each structure.

    Costs and gaps are shares of the dense cost.
    """

    def __init__(self, cost: CostModel, budget: Budget, grids: List[np.ndarray], descending: List[np.ndarray]):
        self.cost, self.budget, self.grids, self.descending = cost, budget, grids, descending
        self.units = np.array([len(scores) for scores in descending])
        self.dense = cost(budget.quantity, self.units)
        self.asked, self.label = budget.share(self.dense), budget.label
        self.choices = np.concatenate(grids)
        self.last = np.cumsum([len(grid) for grid in grids]) - 1
        self.first = np.append(0, self.last[:-1] + 1)
        self.worth = np.concatenate([np.append(0.0, np.cumsum(d))[grid] for d, grid in zip(descending, grids)])

    def price(self, counts: np.ndarray) -> float:
        """Cost at these counts."""
        return self.cost(self.budget.quantity, counts) / self.dense

    def slope(self, at: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, shape (structures,)."""
        return self.cost.gradient(self.budget.quantity, self.choices[at]) / self.dense

    def gap(self, at: np.ndarray) -> float:
        """How far the cost is above the target."""
        return self.price(self.choices[at]) - self.asked

    def walk(self, sets: np.ndarray) -> np.ndarray:
        """The place nearest to the target on the path on which every set loses the same share of its units.

        Args:
            sets: The set that each structure is ranked in, 0, 1, …, shape (structures,).
        """
        steps = self._path(sets)

        def place(taken: int) -> np.ndarray:
            return self.last - np.bincount(steps[:taken], minlength=len(self.last))

        above, below = 0, len(steps)
        while below - above > 1:
            middle = (above + below) // 2
            above, below = (middle, below) if self.gap(place(middle)) > 0 else (above, middle)
        return min(place(above), place(below), key=lambda at: abs(self.gap(at)))

    def _path(self, sets: np.ndarray) -> np.ndarray:
        """The structure that each step down a grid belongs to, in the order in which steps are taken."""
        owner = np.repeat(np.arange(len(self.grids)), self.last - self.first + 1)
        lower = np.delete(np.arange(len(owner)), self.last)
        owner, low, high = owner[lower], self.choices[lower], self.choices[lower + 1]
        # A step stands at its middle unit, which rounds the count to the nearest of the grid.
        score = np.concatenate([d[(g[:-1] + g[1:]) // 2] for d, g in zip(self.descending, self.grids)])
        # Scores that differ by a rounding error alone are equal, so that the shares decide.
        score = (score / (np.abs(score).max(initial=0.0) or 1.0)).astype(np.float32)
        share = 1 - (low + high) / 2 / self.units[owner]
        order = np.lexsort((owner, share, score, sets[owner]))

        owner, removed = owner[order], (high - low)[order]
        group = sets[owner]
        before = np.cumsum(removed) - removed
        before -= before[np.searchsorted(group, group)]
        share = (before + removed / 2) / np.bincount(sets, weights=self.units)[group]
        return owner[np.argsort(share, kind='stable')]

    def repair(self, start: np.ndarray) -> np.ndarray:
        """Close the gap by moves of few structures, as near to the given place as will do."""
        best = start
        for reach, enough in REACHES:
            if abs(self.gap(best)) <= enough:
                break
            low, high = np.maximum(start - reach, self.first), np.minimum(start + reach, self.last)
            moves = np.arange(-min(reach, 16), min(reach, 16) + 1)[:, None]
            best = min(best, self._settle(start, moves, low, high), key=lambda at: abs(self.gap(at)))
        return best

    def _settle(self, at: np.ndarray, moves: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Move until near, or until no move brings the cost nearer. Moves are in grid steps, shape (moves, 1)."""
        while abs(self.gap(at)) > NEAR:
            to = self._move(at, moves, low, high)
            if abs(self.gap(to)) > abs(self.gap(at)) - PROGRESS:
                to = self._exchange(at, moves, low, high)
            if abs(self.gap(to)) > abs(self.gap(at)) - PROGRESS:
                break
            at = to
        return at

    def settle_coarsest(self, at: np.ndarray, sets: np.ndarray) -> np.ndarray:
        """Try every count of the structure whose steps cost most: heads that the whole model shares leave a gap on
        both sides, which the others close from one of them."""
        width = np.array([np.diff(grid).max(initial=0) for grid in self.grids])
        coarsest = int((width * self.slope(at)).argmax())
        places = [at]
        for count in self.grids[coarsest] if len(self.grids[coarsest]) <= FIRST_MOVES else ():
            grids = [np.array([count]) if i == coarsest else grid for i, grid in enumerate(self.grids)]
            pinned = Search(self.cost, self.budget, grids, self.descending)
            counts = pinned.choices[pinned.repair(pinned.walk(sets))]
            places.append(self.first + [np.searchsorted(grid, left) for grid, left in zip(self.grids, counts)])
        near = [place for place in places if abs(self.gap(place)) <= TOLERANCE]
        if near:
            return max(near, key=lambda place: self.worth[place].sum())
        return min(places, key=lambda place: abs(self.gap(place)))

    def _options(
            self,
            at: np.ndarray,
            moves: np.ndarray,
            low: np.ndarray,
            high: np.ndarray,
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves of one structure each: where to, cost added (first order), importance lost, (moves, structures)."""
        to = np.clip(at + moves, low, high)
        return to, self.slope(at) * (self.choices[to] - self.choices[at]), self.worth[at] - self.worth[to]

    def _move(self, at: np.ndarray, moves: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The move with the least loss for its cost, of those that go no further than the target."""
        gap = self.gap(at)
        to, change, lost = self._options(at, moves, low, high)
        closing = (change * gap < 0) & (np.abs(change) <= abs(gap) + NEAR)
        loss = np.divide(lost, np.abs(change), out=np.full(lost.shape, np.inf), where=closing)
        return _moved(at, to, loss.argmin()) if closing.any() else at

    def _exchange(self, at: np.ndarray, moves: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The two moves that land nearest, or near at the least loss."""
        gap = self.gap(at)
        to, change, lost = self._options(at, moves, low, high)
        found, best = at, (np.inf, np.inf)
        for first in np.argsort(np.abs(gap + change), axis=None, kind='stable')[:FIRST_MOVES]:
            halfway = _moved(at, to, first)
            second_to, change, second_lost = self._options(halfway, moves, low, high)
            off = np.maximum(np.abs(self.gap(halfway) + change), NEAR)
            second = np.where(off == off.min(), second_lost, np.inf).argmin()
            result = (off.min(), lost.flat[first] + second_lost.flat[second])
            if result < best:
                found, best = _moved(halfway, second_to, second), result
        return found

    def refine(self, at: np.ndarray, finest: List[np.ndarray]) -> Optional[Tuple['Search', np.ndarray]]:
        """The same place with steps of one unit where that closes the gap, in as few structures as possible."""
        gap, counts = self.gap(at), self.choices[at]
        ends = np.array([grid[0] if gap > 0 else grid[-1] for grid in finest])
        coarse = np.array([len(grid) < len(fine) for grid, fine in zip(self.grids, finest)])
        slope = self.slope(at)
        closes = coarse * slope * np.abs(counts - ends)
        if not closes.any():  # finer steps may still help against those of another structure
            closes = coarse * slope
        if not closes.any():
            return None
        order = np.argsort(-closes, kind='stable')
        if closes[order[0]] >= abs(gap):
            order = [np.where(closes >= abs(gap), slope, np.inf).argmin()]
        needed = np.searchsorted(np.cumsum(closes[order]), abs(gap)) + 1
        chosen = {int(i) for i in order[:needed] if closes[i] > 0}
        grids = [finest[i] if i in chosen else grid for i, grid in enumerate(self.grids)]
        search = Search(self.cost, self.budget, grids, self.descending)
        return search, search.first + [np.searchsorted(grid, count) for grid, count in zip(grids, counts)]


def _moved(at: np.ndarray, to: np.ndarray, option: int) -> np.ndarray:
    structure = option % len(at)
    moved = at.copy()
    moved[structure] = to.flat[option]
    return moved
