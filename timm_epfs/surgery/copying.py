"""A cut copy of a model that costs little more memory than what is left of it."""
from typing import Dict, Iterator

import torch
from torch import Tensor, nn

from ..core import clone_tensor, deep_copy
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
        PruningError: The plan is for another model, or the model can't be copied.
    """
    slim = apply_plan(_shallow_copy(model), plan)
    _copy_shared_tensors(slim, model)
    return slim


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of every module, whose parameters and buffers are still the model's."""
    shared = {id(tensor) for tensor in _tensors(model)}
    plan = getattr(model, 'pruning_plan', None)
    return deep_copy(model, lambda tensor: tensor if id(tensor) in shared else clone_tensor(tensor), share=[plan])


def _copy_shared_tensors(slim: nn.Module, model: nn.Module) -> None:
    """Copy the tensors that the cut left as they were. Tied ones stay tied."""
    theirs = {id(tensor) for tensor in _tensors(model)}
    copies: Dict[int, Tensor] = {}
    for module in slim.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in theirs:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = clone_tensor(tensor)
                    tensors[name] = copies[id(tensor)]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
