"""The type of pruned models, for type checkers."""
from torch import nn

from .pruning_plan import Plan

__all__ = ['PrunedModel']


class PrunedModel(nn.Module):
    """A module with the plan that it was cut by.

    No module is of this class. It tells type checkers what ``prune``, ``rebuild`` and ``export`` return: an ordinary
    module of its base's class that has this attribute.
    """
    pruning_plan: Plan
