"""``Search``: finds the numbers of units that meet a budget, on the path of ``step_order`` or a few moves from it."""
from dataclasses import dataclass
from typing import List, Optional, Tuple

import numpy as np

from ..core import Budget, CostModel
from .path import step_order

__all__ = ['Search', 'TOLERANCE']

# Distances from the target, as shares of the dense cost.
TOLERANCE = 0.01    # a smaller gap needs no warning
NEAR = 0.001        # a repair ends at a smaller gap
PROGRESS = 1e-6     # each move must close the gap by this much
# A repair may take structures this many grid steps from the path, as long as the gap is wider than the second number.
REACHES = ((1, NEAR), (4, 2 * NEAR), (16, TOLERANCE), (1 << 30, TOLERANCE))
LONGEST_MOVE = 16   # largest number of grid steps in one move
FIRST_MOVES = 128   # number of first moves that an exchange tries, each of which takes about 0.1 ms


class Search:
    """A search for the counts of all structures that meet a budget.

    The grids of all structures are concatenated in ``choices``. A *place* has one position in ``choices`` for each
    structure, shape (structures,), and ``choices[place]`` are its counts. Costs and gaps are shares of the dense cost.

    For example, ``a`` has four units that cost 1 each, ``b`` has two that cost 3 each, and the budget is 6 of 10. The
    path of ``step_order`` goes through the counts (4, 2), (3, 2), (2, 2), (2, 1) and (1, 1), which cost 10, 9, 8, 5 and
    4. The fourth is nearest to 6, and a repair closes the gap by one more unit of ``a``:

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
        budget: What the cut model may cost.
        grids: Counts that each structure may keep, ascending.
        descending: Scores of each structure's units, descending, shape (units,).

    Attributes:
        target: The budget as a share of the dense cost.
        label: Name of the budget's quantity, for messages.
        choices: All grids, concatenated, shape (choices,).
        first, last: Position in ``choices`` of each structure's smallest and largest count, shape (structures,).
        importance: For each of ``choices``, the sum of the scores of the units that stay, shape (choices,).

    Raises:
        PruningError: The dense model is within the budget already.
    """

    def __init__(self, cost: CostModel, budget: Budget, grids: List[np.ndarray], descending: List[np.ndarray]):
        self.cost, self.budget, self.grids, self.descending = cost, budget, grids, descending
        self.dense = cost(budget.quantity, np.array([len(scores) for scores in descending]))
        self.target, self.label = budget.share(self.dense), budget.label
        self.choices = np.concatenate(grids)
        self.last = np.cumsum([len(grid) for grid in grids]) - 1
        self.first = np.append(0, self.last[:-1] + 1)
        sums = [np.append(0.0, np.cumsum(scores)) for scores in descending]
        self.importance = np.concatenate([total[grid] for total, grid in zip(sums, grids)])

    def price(self, counts: np.ndarray) -> float:
        """Cost at these counts, shape (structures,)."""
        return self.cost(self.budget.quantity, counts) / self.dense

    def slope(self, place: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, at a place, shape (structures,)."""
        return self.cost.gradient(self.budget.quantity, self.choices[place]) / self.dense

    def gap(self, place: np.ndarray) -> float:
        """How far the cost is above the target, negative below it."""
        return self.price(self.choices[place]) - self.target

    def walk(self, sets: np.ndarray) -> np.ndarray:
        """Find the place on the path that is nearest to the target. Each step lowers the cost, so bisection finds it.

        Args:
            sets: Number of the set that each structure is ranked in, from 0, shape (structures,).
        """
        steps = step_order(self.grids, self.descending, sets)

        def after(taken: int) -> np.ndarray:
            """The place after the first steps."""
            return self.last - np.bincount(steps[:taken], minlength=len(self.last))

        above, below = 0, len(steps)  # numbers of steps at which the cost is above the target, and at most the target
        while below - above > 1:
            middle = (above + below) // 2
            if self.gap(after(middle)) > 0:
                above = middle
            else:
                below = middle
        return self._nearest([after(above), after(below)])

    def repair(self, start: np.ndarray) -> np.ndarray:
        """Close the gap by moving a few structures, as little as possible from the given place."""
        best = start
        for reach, enough in REACHES:
            if abs(self.gap(best)) <= enough:
                break
            longest = min(reach, LONGEST_MOVE)
            bounds = _Bounds(
                low=np.maximum(start - reach, self.first), high=np.minimum(start + reach, self.last),
                steps=np.arange(-longest, longest + 1)[:, None])
            best = self._nearest([best, self._close_gap(start, bounds)])
        return best

    def try_coarsest(self, place: np.ndarray, sets: np.ndarray) -> np.ndarray:
        """Try every count of the structure whose steps cost most, each with a walk and a repair of all others.

        A repair can get stuck next to a large step. If all layers share their heads, for example, one count of heads
        costs more than the target and the next one less, and the other structures can make up for only one of them.

        Args:
            place: The best place so far.
            sets: As in ``walk``.
        """
        largest_step = np.array([np.diff(grid).max(initial=0) for grid in self.grids])
        coarsest = int((largest_step * self.slope(place)).argmax())
        places = [place]
        if len(self.grids[coarsest]) <= FIRST_MOVES:
            for count in self.grids[coarsest]:
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
            place: The best place on the present grids.
            finest: The finest grid of each structure, which contains all counts of its present one.

        Returns:
            A search with the finer grids, and the same place in it. None if no finer grid would help.
        """
        gap, counts, slope = self.gap(place), self.choices[place], self.slope(place)
        has_finer = np.array([len(grid) < len(fine) for grid, fine in zip(self.grids, finest)])
        # How much of the gap each structure could close alone, by going to the end of its finest grid.
        ends = np.array([grid[0] if gap > 0 else grid[-1] for grid in finest])
        closes = has_finer * slope * np.abs(counts - ends)
        if not closes.any():  # a finer step may still help together with a step of another structure
            closes = has_finer * slope
        if not closes.any():
            return None

        order = np.argsort(-closes, kind='stable')
        if closes[order[0]] >= abs(gap):  # one structure is enough: that of the cheapest units comes nearest
            order = [np.where(closes >= abs(gap), slope, np.inf).argmin()]
        needed = np.searchsorted(np.cumsum(closes[order]), abs(gap)) + 1
        chosen = {int(i) for i in order[:needed] if closes[i] > 0}
        grids = [finest[i] if i in chosen else grid for i, grid in enumerate(self.grids)]
        search = Search(self.cost, self.budget, grids, self.descending)
        return search, search._place_of(counts)

    def _place_of(self, counts: np.ndarray) -> np.ndarray:
        """The place of these counts."""
        return self.first + [np.searchsorted(grid, count) for grid, count in zip(self.grids, counts)]

    def _nearest(self, places: List[np.ndarray]) -> np.ndarray:
        """The place whose cost is nearest to the target; the first of several such places."""
        return min(places, key=lambda place: abs(self.gap(place)))

    def _close_gap(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Move structures until the cost is near the target, or no move brings it nearer."""
        while abs(self.gap(place)) > NEAR:
            largest_gap = abs(self.gap(place)) - PROGRESS
            next_place = self._move(place, bounds)
            if abs(self.gap(next_place)) > largest_gap:
                next_place = self._exchange(place, bounds)
            if abs(self.gap(next_place)) > largest_gap:
                break
            place = next_place
        return place

    def _move(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Make the move that loses the least importance per cost, among those that don't go beyond the target.

        Returns:
            The place after the move; the same place if there is no such move.
        """
        gap, moves = self.gap(place), self._moves(place, bounds)
        closing = (moves.added * gap < 0) & (np.abs(moves.added) <= abs(gap) + NEAR)
        loss = np.divide(moves.lost, np.abs(moves.added), out=np.full(moves.lost.shape, np.inf), where=closing)
        return moves.make(loss.argmin()) if closing.any() else place

    def _exchange(self, place: np.ndarray, bounds: '_Bounds') -> np.ndarray:
        """Make the one or two moves that come nearest to the target; among those within ``NEAR``, which lose the least.

        Second moves are chosen by what they add to first order. What is found is compared by what it really costs: cost
        is not linear in a width that two dims of a layer have.

        Returns:
            The place after the moves.
        """
        gap, first_moves = self.gap(place), self._moves(place, bounds)
        best_place, best = place, (np.inf, np.inf)  # remaining gap, importance lost
        for first in np.argsort(np.abs(gap + first_moves.added), axis=None, kind='stable')[:FIRST_MOVES]:
            halfway = first_moves.make(first)
            second_moves = self._moves(halfway, bounds)
            gaps = np.maximum(np.abs(self.gap(halfway) + second_moves.added), NEAR)
            second = np.where(gaps == gaps.min(), second_moves.lost, np.inf).argmin()
            for end, lost in ((second_moves.make(second), second_moves.lost.flat[second]), (halfway, 0.0)):
                result = (max(abs(self.gap(end)), NEAR), first_moves.lost.flat[first] + lost)
                if result < best:
                    best_place, best = end, result
        return best_place

    def _moves(self, place: np.ndarray, bounds: '_Bounds') -> '_Moves':
        """All moves of one structure from a place, within the bounds."""
        to = np.clip(place + bounds.steps, bounds.low, bounds.high)
        added = self.slope(place) * (self.choices[to] - self.choices[place])
        return _Moves(place, to, added, self.importance[place] - self.importance[to])


@dataclass(frozen=True)
class _Bounds:
    """How far a repair may move structures.

    Attributes:
        low: Lowest position of each structure, shape (structures,).
        high: Highest position of each structure, shape (structures,).
        steps: Number of positions that each move goes up, negative for down, shape (moves, 1).
    """
    low: np.ndarray
    high: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class _Moves:
    """All moves of one structure from a place.

    Attributes:
        place: The place, shape (structures,).
        to: Position of the structure after each move, shape (moves, structures).
        added: Cost that each move adds, to first order, shape (moves, structures).
        lost: Importance that each move loses, shape (moves, structures).
    """
    place: np.ndarray
    to: np.ndarray
    added: np.ndarray
    lost: np.ndarray

    def make(self, move: int) -> np.ndarray:
        """The place after a move, which is given by its position in the flattened arrays."""
        place, structure = self.place.copy(), move % len(self.place)
        place[structure] = self.to.flat[move]
        return place
