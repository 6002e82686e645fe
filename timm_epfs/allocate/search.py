"""Where a budget is met: on the path of ``path.step_order``, or a few moves away from it."""
from dataclasses import dataclass
from typing import List, Optional, Tuple

import numpy as np

from ..core import Budget, CostModel
from .path import step_order

__all__ = ['Search', 'TOLERANCE']

# Distances from the target, as shares of the dense cost.
TOLERANCE = 0.01    # within which no warning is needed
NEAR = 0.001        # within which a repair ends
PROGRESS = 1e-6     # by which a move must come nearer
# A repair may take a structure so many grid steps from the path, while the gap is wider than this.
REACHES = ((1, NEAR), (4, 2 * NEAR), (16, TOLERANCE), (1 << 30, TOLERANCE))
LONGEST_MOVE = 16   # grid steps that one move of a repair goes
FIRST_MOVES = 128   # first moves from which an exchange is tried, for about 0.1 ms each


class Search:
    """The counts that structures may keep, what they cost, and the search for those that meet a budget.

    The grids of all structures are laid end to end in ``choices``. A *place* is one position in it for each structure,
    shape (structures,); ``choices[place]`` are the counts there. Costs and gaps are shares of the dense cost.

    Say ``a`` has four units that cost 1 each, ``b`` two that cost 3 each, and 6 of 10 may be left. The path of
    ``step_order`` leads over the counts (4, 2), (3, 2), (2, 2), (2, 1) and (1, 1), which cost 10, 9, 8, 5 and 4. The
    fourth is nearest to 6, and a repair closes the gap that it leaves by a unit of ``a``:

    >>> from timm_epfs.core import Size
    >>> terms = [('macs', price, (Size(0, ((name, 1),)),)) for name, price in (('a', 1), ('b', 3))]
    >>> grids = [np.array([1, 2, 3, 4]), np.array([1, 2])]
    >>> descending = [np.array([9., 7., 3., 1.]), np.array([8., 6.])]
    >>> search = Search(CostModel('ab', terms), Budget(macs=6), grids, descending)
    >>> place = search.walk(sets=np.array([0, 0]))
    >>> search.choices[place], round(search.gap(place), 3)
    (array([2, 1]), -0.1)
    >>> search.choices[search.repair(place)]
    array([3, 1])

    Args:
        cost: Prices a vector of counts.
        budget: What may be left.
        grids: Counts that each structure may keep, ascending.
        descending: Scores of each structure's units, descending, shape (units,).

    Attributes:
        asked: The target.
        label: What is counted, in words.
        choices: All grids, end to end.
        first, last: Positions of each structure's smallest and largest count, shape (structures,).
        importance: Sum of the scores of the units that stay, for each of ``choices``.
    """

    def __init__(self, cost: CostModel, budget: Budget, grids: List[np.ndarray], descending: List[np.ndarray]):
        self.cost, self.budget, self.grids, self.descending = cost, budget, grids, descending
        self.dense = cost(budget.quantity, np.array([len(scores) for scores in descending]))
        self.asked, self.label = budget.share(self.dense), budget.label
        self.choices = np.concatenate(grids)
        self.last = np.cumsum([len(grid) for grid in grids]) - 1
        self.first = np.append(0, self.last[:-1] + 1)
        sums = [np.append(0.0, np.cumsum(scores)) for scores in descending]
        self.importance = np.concatenate([total[grid] for total, grid in zip(sums, grids)])

    def price(self, counts: np.ndarray) -> float:
        """Cost at these counts."""
        return self.cost(self.budget.quantity, counts) / self.dense

    def slope(self, place: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, shape (structures,)."""
        return self.cost.gradient(self.budget.quantity, self.choices[place]) / self.dense

    def gap(self, place: np.ndarray) -> float:
        """How far the cost is above the target, negative below it."""
        return self.price(self.choices[place]) - self.asked

    def walk(self, sets: np.ndarray) -> np.ndarray:
        """The place on the path that is nearest to the target, found by bisection, since each step lowers the cost.

        Args:
            sets: The set that each structure is ranked in, 0, 1, …, shape (structures,).
        """
        steps = step_order(self.grids, self.descending, sets)

        def after(taken: int) -> np.ndarray:
            return self.last - np.bincount(steps[:taken], minlength=len(self.last))

        above, below = 0, len(steps)
        while below - above > 1:
            middle = (above + below) // 2
            above, below = (middle, below) if self.gap(after(middle)) > 0 else (above, middle)
        return self._nearest([after(above), after(below)])

    def repair(self, start: np.ndarray) -> np.ndarray:
        """Close the gap by moves of few structures, as near to the given place as possible."""
        best = start
        for reach, enough in REACHES:
            if abs(self.gap(best)) <= enough:
                break
            longest = min(reach, LONGEST_MOVE)
            bounds = _Bounds(
                low=np.maximum(start - reach, self.first), high=np.minimum(start + reach, self.last),
                steps=np.arange(-longest, longest + 1)[:, None])
            best = self._nearest([best, self._settle(start, bounds)])
        return best

    def settle_coarsest(self, place: np.ndarray, sets: np.ndarray) -> np.ndarray:
        """Try every count of the structure whose steps cost most, each with a walk and a repair of all others.

        Heads that the whole model shares, say, leave a gap on both sides of the target, which the other structures
        can close from only one of them.
        """
        widest = np.array([np.diff(grid).max(initial=0) for grid in self.grids])
        coarsest = int((widest * self.slope(place)).argmax())
        places = [place]
        for count in self.grids[coarsest] if len(self.grids[coarsest]) <= FIRST_MOVES else ():
            grids = [np.array([count]) if i == coarsest else grid for i, grid in enumerate(self.grids)]
            pinned = Search(self.cost, self.budget, grids, self.descending)
            places.append(self._place_of(pinned.choices[pinned.repair(pinned.walk(sets))]))
        near = [place for place in places if abs(self.gap(place)) <= TOLERANCE]
        if near:
            return max(near, key=lambda place: self.importance[place].sum())
        return self._nearest(places)

    def refine(self, place: np.ndarray, finest: List[np.ndarray]) -> Optional[Tuple['Search', np.ndarray]]:
        """Give as few structures as possible a finer grid, so that they can close the gap.

        Args:
            place: Where the gap is.
            finest: The finest grid of each structure, which holds all counts of its present one.

        Returns:
            A search with these grids, and the same place in it. None where no finer grid would help.
        """
        gap, counts, slope = self.gap(place), self.choices[place], self.slope(place)
        ends = np.array([grid[0] if gap > 0 else grid[-1] for grid in finest])
        coarse = np.array([len(grid) < len(fine) for grid, fine in zip(self.grids, finest)])
        closes = coarse * slope * np.abs(counts - ends)  # so much of the gap, by each structure alone
        if not closes.any():  # finer steps may still help against those of another structure
            closes = coarse * slope
        if not closes.any():
            return None
        order = np.argsort(-closes, kind='stable')
        if closes[order[0]] >= abs(gap):  # one is enough: the one with the cheapest units lands nearest
            order = [np.where(closes >= abs(gap), slope, np.inf).argmin()]
        needed = np.searchsorted(np.cumsum(closes[order]), abs(gap)) + 1
        chosen = {int(i) for i in order[:needed] if closes[i] > 0}
        grids = [finest[i] if i in chosen else grid for i, grid in enumerate(self.grids)]
        search = Search(self.cost, self.budget, grids, self.descending)
        return search, search._place_of(counts)

    def _place_of(self, counts: np.ndarray) -> np.ndarray:
        return self.first + [np.searchsorted(grid, count) for grid, count in zip(self.grids, counts)]

    def _nearest(self, places: List[np.ndarray]) -> np.ndarray:
        """The place whose cost is nearest to the target, among equal ones the first."""
        return min(places, key=lambda place: abs(self.gap(place)))

    def _settle(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Move structures until the cost is near the target, or no move brings it nearer."""
        while abs(self.gap(place)) > NEAR:
            least = abs(self.gap(place)) - PROGRESS
            to = self._move(place, bounds)
            if abs(self.gap(to)) > least:
                to = self._exchange(place, bounds)
            if abs(self.gap(to)) > least:
                break
            place = to
        return place

    def _move(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Make the move that loses least importance for its cost, of those that don't go beyond the target."""
        gap, moves = self.gap(place), self._moves(place, bounds)
        closing = (moves.added * gap < 0) & (np.abs(moves.added) <= abs(gap) + NEAR)
        loss = np.divide(moves.lost, np.abs(moves.added), out=np.full(moves.lost.shape, np.inf), where=closing)
        return moves.make(loss.argmin()) if closing.any() else place

    def _exchange(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Make the two moves that land nearest to the target; of those that land near, the two that lose least."""
        gap, moves = self.gap(place), self._moves(place, bounds)
        found, best = place, (np.inf, np.inf)
        for first in np.argsort(np.abs(gap + moves.added), axis=None, kind='stable')[:FIRST_MOVES]:
            halfway = moves.make(first)
            then = self._moves(halfway, bounds)
            off = np.maximum(np.abs(self.gap(halfway) + then.added), NEAR)
            second = np.where(off == off.min(), then.lost, np.inf).argmin()
            result = (off.min(), moves.lost.flat[first] + then.lost.flat[second])
            if result < best:
                found, best = then.make(second), result
        return found

    def _moves(self, place: np.ndarray, bounds: '_Bounds') -> '_Moves':
        to = np.clip(place + bounds.steps, bounds.low, bounds.high)
        added = self.slope(place) * (self.choices[to] - self.choices[place])
        return _Moves(place, to, added, self.importance[place] - self.importance[to])


@dataclass(frozen=True)
class _Bounds:
    """How far a repair may go.

    Attributes:
        low: The lowest position of each structure, shape (structures,).
        high: The highest one.
        steps: How many positions a move goes up, shape (moves, 1).
    """
    low: np.ndarray
    high: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class _Moves:
    """All moves of one structure from a place, each quantity as a table of shape (moves, structures).

    Attributes:
        place: Where they start, shape (structures,).
        to: The structure's position after the move.
        added: Cost that it adds, to first order.
        lost: Importance that it loses.
    """
    place: np.ndarray
    to: np.ndarray
    added: np.ndarray
    lost: np.ndarray

    def make(self, move: int) -> np.ndarray:
        """The place after a move, which is given by its position in the flattened tables."""
        place, structure = self.place.copy(), move % len(self.place)
        place[structure] = self.to.flat[move]
        return place
