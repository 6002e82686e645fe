"""Pruned models from nothing but their plan."""
from typing import Optional, Union

import torch
from torch import nn

from ..plan import Plan
from .bases import build_base
from .cutting import apply_plan
from .deferred import DeferredInit

__all__ = ['rebuild']


def rebuild(plan: Plan, device: Optional[Union[str, torch.device]] = None) -> nn.Module:
    """The pruned model of a plan, built from its base, with fresh weights and ``model.pruning_plan`` set.

    Raises:
        PruningError: The base can't be built, or is not the one that the plan was made for.
    """
    with DeferredInit() as deferred:
        model = apply_plan(build_base(plan.base, plan.base_args, device), plan, deferred)
    model.pruning_plan = plan
    return model
