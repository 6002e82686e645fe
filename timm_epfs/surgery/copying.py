"""A cut copy of a model, without copying what is cut away."""
import copy
from typing import Dict

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..plan import Plan
from .cutting import apply_plan

__all__ = ['cut_copy']


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model, cut, that shares no tensor with it.

    Args:
        model: The plan's base, or the pruned model that the plan was made on; it stays as it is.
        plan: What stays.

    Raises:
        PruningError: The model is not the one that the plan was made for.
    """
    slim = apply_plan(_shallow_copy(model), plan)
    _unshare(slim, model)
    return slim


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
