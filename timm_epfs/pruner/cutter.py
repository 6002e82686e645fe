"""One shot: from the units' scores and a budget to a cut copy of the model, with its plan."""
import warnings
from dataclasses import dataclass
from typing import Any, Collection, Dict, Mapping, Optional, Tuple

import numpy as np
from torch import nn

from ..allocate import allocate
from ..allocate.allocation import Budget
from ..core import OutOfReach
from ..plan import make_plan
from ..surgery import apply_plan, cut_copy
from ..trace import Trace

__all__ = ['Cutter']


@dataclass(frozen=True)
class Cutter:
    """Cuts a model to a budget.

    Attributes:
        model: The dense model.
        in_place: Whether it's the model itself that is cut, and not a copy.
        traced: Its trace.
        scores: Importance of the units that may go, by structure name.
        fixed: Names of the structures that are left alone.
        streams: Whether to cut residual streams that are normalised over their channels. None: only where the budget
            can't be met without, with a warning.
        options: Further arguments of ``allocate``.
        base: Name and keyword arguments of the dense model.
        recipe: How the units that stay are found, for the plan.
    """
    model: nn.Module
    in_place: bool
    traced: Trace
    scores: Mapping[str, np.ndarray]
    fixed: Collection[str]
    streams: Optional[bool]
    options: Mapping[str, Any]
    base: Tuple[Optional[str], Dict[str, Any]]
    recipe: Dict[str, Any]

    def __call__(self, budget: Budget) -> nn.Module:
        """The cut model, with its ``pruning_plan``.

        Raises:
            OutOfReach: The budget is out of reach.
        """
        plan = make_plan(self.traced, self._keep(budget), self.recipe, *self.base)
        slim = apply_plan(self.model, plan) if self.in_place else cut_copy(self.model, plan)
        slim.pruning_plan = plan
        return slim

    def _keep(self, budget: Budget) -> Dict[str, np.ndarray]:
        pool = [s for s in self.traced.structures if s.name not in self.fixed]
        streams = {s.name for s in pool if s.stream}
        if self.streams or not streams:
            return self._allocate(budget, self.fixed)
        if self.streams is not None or len(streams) < len(pool):
            try:
                return self._allocate(budget, {*self.fixed, *streams})
            except OutOfReach:
                if self.streams is not None:
                    raise
        keep = self._allocate(budget, self.fixed)
        warnings.warn(
            'the budget needs residual streams that are normalised over their channels to be cut: masking and cutting '
            'differ there, fine-tune after; streams=False forbids it',
            stacklevel=3,
        )
        return keep

    def _allocate(self, budget: Budget, fixed: Collection[str]) -> Dict[str, np.ndarray]:
        return allocate(self.traced.structures, self.scores, self.traced.cost, budget, fixed=fixed, **self.options)
