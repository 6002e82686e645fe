"""One shot: from the units' scores and a budget to a cut copy of the model, with its plan."""
import copy
import warnings
from dataclasses import dataclass
from typing import Any, Collection, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..allocate import allocate
from ..allocate.allocation import Budget
from ..core import OutOfReach
from ..plan import make_plan
from ..surgery import apply_plan
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
        slim = apply_plan(self.model if self.in_place else _shallow_copy(self.model), plan)
        if not self.in_place:
            _unshare(slim, self.model)
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


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors are still the original's: what is cut gets new ones, the rest is unshared after."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # what a module keeps of a forward may have a history, which can't be copied
        for leaf in tree_leaves(dict(vars(module))):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach()
    plan = getattr(model, 'pruning_plan', None)
    memo[id(plan)] = plan
    return copy.deepcopy(model, memo)


def _unshare(slim: nn.Module, model: nn.Module) -> None:
    theirs = {id(t) for t in (*model.parameters(), *model.buffers())}
    memo: Dict[int, torch.Tensor] = {}
    for module in slim.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in theirs:
                    if id(tensor) not in memo:
                        clone = tensor.detach().clone()
                        if isinstance(tensor, nn.Parameter):
                            clone = nn.Parameter(clone, requires_grad=tensor.requires_grad)
                        memo[id(tensor)] = clone
                    tensors[name] = memo[id(tensor)]
