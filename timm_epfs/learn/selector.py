"""``Selector``: chooses the units that stay within a learner's budget, given scores."""
from dataclasses import replace
from typing import Any, Dict, FrozenSet, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import nn

from ..allocate import Allocation
from ..core import Budget, Structure, device_of, from_first
from ..importance import score
from ..plan import make_plan
from ..pruner import Allocator
from ..surgery import cut_copy
from .setup import Setup

__all__ = ['Selector']


class Selector:
    """Chooses the units that stay by their scores, and tells what share of the dense model's cost they have.

    All processes that train together make the same choice: all use the latencies that the first one measures.

    Args:
        setup: The model, the budget, and how units are chosen.
        structures: The structures that are learned.
        fixed: Names of the structures that the pruner would cut and this learner doesn't.

    Attributes:
        allocator: Chooses the units, and prices them in the budget's quantity.
        quantity: ``'macs'``, ``'params'`` or ``'latency'``: the budget's; ``'macs'`` where there is no budget.
        budget: What may be left, as a share of the dense model's cost. None: there is no budget.

    Raises:
        OutOfReach: The budget can't be met, whatever the scores.
    """

    def __init__(self, setup: Setup, structures: Sequence[Structure], fixed: FrozenSet[str]):
        self._pruner, self._asked, self._structures = setup.pruner, setup.budget, structures
        self.quantity = 'macs' if setup.budget is None else setup.budget.quantity
        batch_size = 1 if setup.budget is None else setup.budget.latency_batch_size
        allocator = setup.pruner.allocator(self.quantity, setup.choice, batch_size, fixed, together=True)
        self.allocator: Allocator = replace(allocator, streams=bool(setup.pruner.streams))
        self.budget: Optional[Budget] = None
        if self.quantity == 'latency':
            self._device = setup.pruner.latency(batch_size, together=True)
            share = setup.pruner.share_of_equal_cut(setup.budget, self.allocator, together=True)
            self.budget = setup.budget.at(share)
        elif setup.budget is not None:
            self.budget = setup.budget.at(setup.budget.share(self.allocator.dense(self.quantity)))
            self.allocate({s.name: np.ones(s.units) for s in structures})  # raises where the budget can't be met
        self._width_weights: Dict[str, float] = dict(self.allocator.width_weights or {})
        if self.budget is not None and setup.choice.widths not in (None, 'cost'):
            self._set_width_weights(self._widths_by(setup.choice.widths))

    def _widths_by(self, widths: str) -> Dict[str, float]:
        """Widths by a criterion, or by what the network's output loses, as the first process measures it."""
        if widths != 'sensitivity':
            return self.allocator.width_weights_by(score(self._pruner.model, self._structures, widths), self.budget)
        scores = self._pruner.sensitivity().scores(self.allocator.unit_prices(self.quantity))
        weights = self.allocator.width_weights_by(scores, self.budget)
        shared = from_first(np.array([*weights.values()]), device_of(self._pruner.model))
        return dict(zip(weights, shared.tolist()))

    def _set_width_weights(self, width_weights: Dict[str, float]) -> None:
        self._width_weights = width_weights
        self.allocator = replace(self.allocator, width_weights=width_weights or None)

    def allocate(
            self,
            scores: Mapping[str, np.ndarray],
            share: Optional[float] = None,
            round_to: Optional[int] = None,
    ) -> Allocation:
        """Choose the units that stay.

        Args:
            scores: Scores by structure name, shape (units,), higher = keep.
            share: What may be left, as a share of the dense model's cost. None: the budget.
            round_to: As in ``timm_epfs.prune``. None: the learner's own.

        Raises:
            OutOfReach: Less may be left than any allowed cut leaves.
        """
        budget = self.budget if share is None else self.budget.at(share)
        allocator = self.allocator if round_to is None else replace(self.allocator, round_to=round_to)
        return allocator(scores, budget)

    def match_latency(self, scores: Mapping[str, np.ndarray], dense: nn.Module) -> str:
        """Correct ``budget`` until the cut by these scores is measured to have the latency that the user asked for.

        Args:
            scores: Scores by structure name, shape (units,), higher = keep.
            dense: The dense model with its present weights.

        Returns:
            How the latency is missed and what to do, in a line; empty where it is met.
        """
        def cut(share: float) -> nn.Module:
            return cut_copy(dense, make_plan(self._pruner.trace, self.allocate(scores, share).keep, {}))

        match = self._device.match(self._asked, cut, dense)
        self.budget = self._asked.at(match.share)
        return match.problem

    def share(self, left: Mapping[str, int]) -> float:
        """Share of the dense model's cost that is left.

        Args:
            left: Number of units left by structure name. Structures that aren't named keep all their units.
        """
        units = {s.name: s.units for s in self.allocator.structures}
        return self.allocator.price(self.quantity, {**units, **left}) / self.allocator.dense(self.quantity)

    def unit_costs(self) -> np.ndarray:
        """What one unit of each learned structure costs in the dense model, shape (structures,)."""
        cost = self.allocator.cost
        dense = cost.counts({s.name: s.units for s in self.allocator.structures})
        by_name = dict(zip(cost.names, cost.gradient(self.quantity, dense)))
        return np.array([by_name[s.name] for s in self._structures])

    def recipe(self) -> Dict[str, Any]:
        """The entries of a plan's recipe that concern the budget and, for a latency, where it was measured."""
        recipe = {} if self._asked is None else self._asked.to_dict()
        if self.quantity == 'latency':
            recipe.update(latency_on=self._device.conditions, align=self.allocator.align)
        return recipe

    def state_dict(self) -> Dict[str, Any]:
        """What may come out differently when the learner is made again: widths and measurements."""
        state: Dict[str, Any] = {f'widths.{name}': weight for name, weight in self._width_weights.items()}
        if self.quantity == 'latency':
            state.update({
                'latency.seconds': torch.from_numpy(self.allocator.cost.seconds.copy()),
                'latency.share': self.budget.value, 'latency.align': self.allocator.align,
            })
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state_dict`` was called."""
        if self.quantity == 'latency':
            cost = self.allocator.cost.with_seconds(state['latency.seconds'].numpy().copy())
            self.allocator = replace(self.allocator, cost=cost, align=int(state['latency.align']))
            self.budget = self._asked.at(float(state['latency.share']))
        self._set_width_weights({name: float(state[f'widths.{name}']) for name in self._width_weights})
