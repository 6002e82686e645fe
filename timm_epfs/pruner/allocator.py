"""``Allocator``: everything that an allocation depends on, except the scores and the budget."""
from dataclasses import dataclass, field, replace
from typing import Dict, FrozenSet, List, Mapping, Optional, Sequence, Union

import numpy as np

from ..allocate import ALIGN, Allocation, allocate
from ..core import Budget, CostModel, OutOfReach, Structure
from ..latency import LatencyModel

__all__ = ['Allocator']


@dataclass(frozen=True)
class Allocator:
    """Chooses the units of one model that stay, for any scores and any budget of one quantity.

    Attributes:
        structures: All structures of the model.
        cost: Prices numbers of units left.
        fixed: Names of the structures that are not cut.
        streams: Whether residual streams that are normalised over their channels may be cut. None: only if the budget
            can't be met otherwise.
        scope: As in ``allocate``.
        width_weights: As in ``allocate``.
        round_to: As in ``allocate``.
        align: As in ``allocate``.
        floor: As in ``allocate``.
        ratios: As in ``allocate``.
    """
    structures: Sequence[Structure]
    cost: Union[CostModel, LatencyModel]
    fixed: FrozenSet[str] = frozenset()
    streams: Optional[bool] = None
    scope: str = 'global'
    width_weights: Optional[Mapping[str, float]] = None
    round_to: Optional[int] = None
    align: int = ALIGN
    floor: float = 0.05
    ratios: Mapping[str, float] = field(default_factory=dict)

    @property
    def free(self) -> List[Structure]:
        """The structures that may be cut."""
        return [s for s in self.structures if s.name not in self.fixed]

    def __call__(self, scores: Mapping[str, np.ndarray], budget: Budget) -> Allocation:
        """Choose the units that stay.

        Args:
            scores: Scores of all structures that aren't fixed, by name, shape (units,), higher = keep.
            budget: What the cut model may cost.

        Raises:
            OutOfReach: The budget is less than any allowed cut leaves.
        """
        streams = {s.name for s in self.free if s.stream}
        if not streams or self.streams:
            return self._allocate(scores, budget, self.fixed)
        if self.streams is not None:
            return self._allocate(scores, budget, self.fixed | streams)
        if len(streams) < len(self.free):
            try:
                return self._allocate(scores, budget, self.fixed | streams)
            except OutOfReach:
                pass
        return self._allocate(scores, budget, self.fixed)

    def cuts_streams(self, allocation: Allocation) -> bool:
        """Whether an allocation cuts any residual stream that is normalised over its channels."""
        return any(s.stream and len(allocation.keep[s.name]) < s.units for s in self.structures)

    def width_weights_by(self, scores: Mapping[str, np.ndarray], budget: Budget) -> Dict[str, float]:
        """How many units each structure keeps when these scores decide: ``width_weights`` for use with other scores.

        Args:
            scores: Scores by structure name, shape (units,), higher = keep.
            budget: What the cut model may cost.

        Returns:
            Number of units left by structure name. Blocks have no width: all of them stay, and none is in the result.

        Raises:
            OutOfReach: The budget is less than any allowed cut leaves.
        """
        above_all = max(float(values.max()) for values in scores.values()) + 1  # so that blocks go last
        blocks = {s.name: np.full(1, above_all) for s in self.free if s.kind == 'blocks'}
        keep = replace(self, width_weights=None)({**scores, **blocks}, budget).keep
        return {s.name: float(len(keep[s.name])) for s in self.free if s.name not in blocks}

    def price(self, quantity: str, left: Mapping[str, int]) -> float:
        """Cost of the cut model, given the number of units left of every structure."""
        return self.cost(quantity, self.cost.counts(left))

    def unit_prices(self, quantity: str) -> Dict[str, float]:
        """What one unit of each structure costs in the dense model, by structure name."""
        dense = self.cost.counts({s.name: s.units for s in self.structures})
        return dict(zip(self.cost.names, self.cost.gradient(quantity, dense).tolist()))

    def dense(self, quantity: str) -> float:
        """Cost of the dense model."""
        return self.price(quantity, {s.name: s.units for s in self.structures})

    def _allocate(self, scores: Mapping[str, np.ndarray], budget: Budget, fixed: FrozenSet[str]) -> Allocation:
        return allocate(
            self.structures, scores, self.cost, budget, fixed=fixed, scope=self.scope, width_weights=self.width_weights,
            round_to=self.round_to, align=self.align, floor=self.floor, ratios=self.ratios,
        )
