"""What learned scores leave of a model within its budget."""
from dataclasses import replace
from typing import Any, Dict, FrozenSet, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from ..allocate import Allocation
from ..core import Budget, Structure
from ..importance import score
from ..plan import make_plan
from ..pruner import Allocator
from ..surgery import cut_copy
from .processes import from_first
from .setup import Setup

__all__ = ['Selector']


class Selector:
    """Chooses units by scores, and says what share of the dense model they cost.

    All processes that train together choose alike: where time is the budget, the first one's clock counts.

    Args:
        setup: The model and what is asked for.
        structures: The structures that are learned.
        fixed: Names of those that a pruner would cut and this learner doesn't.

    Attributes:
        allocator: What chooses, with the costs that count here.
        quantity: What the budget is of; MACs where there is none.
        budget: What may be left, as a share of the dense model's cost; None: whatever is left.

    Raises:
        OutOfReach: Even a cut of equal shares can't meet the budget.
    """

    def __init__(self, setup: Setup, structures: Sequence[Structure], fixed: FrozenSet[str]):
        self._pruner, self._asked, self._structures = setup.pruner, setup.budget, structures
        self.quantity = 'macs' if setup.budget is None else setup.budget.quantity
        batch_size = 1 if setup.budget is None else setup.budget.latency_batch_size
        self.allocator: Allocator = replace(
            setup.pruner.allocator(self.quantity, setup.choice, batch_size, fixed), streams=bool(setup.pruner.streams))
        self.budget: Optional[Budget] = None
        if self.quantity == 'latency':
            self._device = setup.pruner.latency(batch_size)
            self._take_clock_of_the_first()
            self._set_share(setup.pruner.share_of_equal_cut(setup.budget, self.allocator))
        elif setup.budget is not None:
            self.budget = setup.budget.at(setup.budget.share(self.allocator.dense(self.quantity)))
            self.allocate({s.name: np.ones(s.units) for s in structures})  # within reach?
        self._widths: Dict[str, float] = dict(self.allocator.widths or {})
        if self.budget is not None and setup.choice.widths not in (None, 'cost'):
            scores = score(setup.pruner.model, structures, setup.choice.widths)
            self._set_widths(self.allocator.widths_by(scores, self.budget))

    def _take_clock_of_the_first(self) -> None:
        cost, device = self.allocator.cost, self._device.device
        self.allocator = replace(
            self.allocator, cost=cost.with_seconds(from_first(cost.seconds, device)),
            align=int(from_first(np.array(self.allocator.align), device)))

    def _set_share(self, share: float) -> None:
        self.budget = self._asked.at(float(from_first(np.array(share), self._device.device)))

    def _set_widths(self, widths: Dict[str, float]) -> None:
        self._widths = widths
        self.allocator = replace(self.allocator, widths=widths or None)

    def allocate(
            self,
            scores: Mapping[str, np.ndarray],
            share: Optional[float] = None,
            round_to: Optional[int] = None,
    ) -> Allocation:
        """The units that stay.

        Args:
            scores: By structure name, shape (units,), higher = keep.
            share: Of the dense model's cost. None: the budget's.
            round_to: In place of the learner's own.
        """
        budget = self.budget if share is None else self.budget.at(share)
        allocator = self.allocator if round_to is None else replace(self.allocator, round_to=round_to)
        return allocator(scores, budget)

    def match_latency(self, scores: Mapping[str, np.ndarray], dense: nn.Module) -> str:
        """Correct the budget of a latency until a cut by these scores is measured to have it.

        Args:
            scores: By structure name, shape (units,).
            dense: The model as it is now.

        Returns:
            What is wrong with what was found, in a line; empty where nothing is.
        """
        def cut(share: float) -> nn.Module:
            return cut_copy(dense, make_plan(self._pruner.trace, self.allocate(scores, share).keep, {}))

        match = self._device.match(self._asked, cut, dense)
        self._set_share(match.share)
        return match.problem

    def share(self, left: Mapping[str, int]) -> float:
        """Share of the dense model's cost where so many units are left, by structure name; the others are whole."""
        units = {s.name: s.units for s in self.allocator.structures}
        return self.allocator.price(self.quantity, {**units, **left}) / self.allocator.dense(self.quantity)

    def unit_costs(self) -> np.ndarray:
        """What a unit of each learned structure costs in the dense model, shape (structures,)."""
        cost = self.allocator.cost
        dense = cost.counts({s.name: s.units for s in self.allocator.structures})
        by_name = dict(zip(cost.names, cost.gradient(self.quantity, dense)))
        return np.array([by_name[s.name] for s in self._structures])

    def recipe(self) -> Dict[str, Any]:
        """What a plan's recipe says of the budget, and of the clock where that is the budget."""
        told = {} if self._asked is None else self._asked.to_dict()
        if self.quantity == 'latency':
            told.update(latency_on=self._device.place, align=self.allocator.align)
        return told

    def state_dict(self) -> Dict[str, Any]:
        """What may differ where the learner is made again: widths, and what was measured."""
        state: Dict[str, Any] = {f'widths.{name}': width for name, width in self._widths.items()}
        if self.quantity == 'latency':
            state.update({
                'latency.seconds': torch.from_numpy(self.allocator.cost.seconds.copy()),
                'latency.share': self.budget.value, 'latency.align': self.allocator.align,
            })
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        if self.quantity == 'latency':
            cost = self.allocator.cost.with_seconds(state['latency.seconds'].numpy().copy())
            self.allocator = replace(self.allocator, cost=cost, align=int(state['latency.align']))
            self.budget = self._asked.at(float(state['latency.share']))
        self._set_widths({name: float(state[f'widths.{name}']) for name in self._widths})
