"""A cut copy of a model that costs little more memory than what is left of it."""
import copy
from typing import Dict, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..plan import Plan
from .cutting import apply_plan

__all__ = ['cut_copy']


@torch.inference_mode(False)  # so that the copy can be trained
def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model, cut. It shares no tensor with the model, and what is cut away is never copied.

    Args:
        model: The model that the plan was made for.
        plan: What stays.

    Raises:
        PruningError: The plan is for another model.
    """
    slim = apply_plan(_shallow_copy(model), plan)
    _copy_shared_tensors(slim, model)
    return slim


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of every module, whose tensors are still the model's."""
    memo = {id(tensor): tensor for tensor in _tensors(model)}
    for module in model.modules():  # what a module keeps of a forward may have a history, which can't be copied
        for leaf in tree_leaves(dict(vars(module))):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach()
    plan = getattr(model, 'pruning_plan', None)
    memo[id(plan)] = plan
    return copy.deepcopy(model, memo)


def _copy_shared_tensors(slim: nn.Module, model: nn.Module) -> None:
    """Copy the tensors that the cut left as they were. Tied ones stay tied."""
    theirs = {id(tensor) for tensor in _tensors(model)}
    copies: Dict[int, Tensor] = {}
    for module in slim.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in theirs:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copied(tensor)
                    tensors[name] = copies[id(tensor)]


def _copied(tensor: Tensor) -> Tensor:
    clone = tensor.detach().clone()
    return nn.Parameter(clone, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
