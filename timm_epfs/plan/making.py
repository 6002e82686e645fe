"""From a trace and the units that stay to a plan."""
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

import numpy as np
import timm
import torch

from ..version import __version__
from .cuts import Cut
from .pruning_plan import Plan

if TYPE_CHECKING:
    from ..trace import Trace

__all__ = ['make_plan', 'make_recipe']


def make_plan(
        traced: 'Trace',
        keep: Mapping[str, np.ndarray],
        recipe: Dict[str, Any],
        base: Optional[str] = None,
        base_args: Optional[Dict[str, Any]] = None,
) -> Plan:
    """The plan that keeps the given units, with everything that follows from their numbers.

    Args:
        traced: Trace of the dense model.
        keep: Units that stay, by structure name.
        recipe: How they were found.
        base: Name of the dense model.
        base_args: Its keyword arguments.
    """
    left = {s.name: len(keep[s.name]) for s in traced.structures}
    dense = {s.name: s.units for s in traced.structures}
    changed = {path: size(left) for path, size in traced.attributes.items() if size(left) != size(dense)}
    cost = {
        quantity: (traced.cost(quantity, traced.cost.counts(dense)), traced.cost(quantity, traced.cost.counts(left)))
        for quantity in ('macs', 'params')
    }
    cuts = tuple(Cut(s, keep[s.name]) for s in traced.structures)
    return Plan(base, base_args or {}, cuts, changed, recipe, cost)


def make_recipe(**values: Any) -> Dict[str, Any]:
    """How a plan is found, for ``Plan.recipe``: what was given, without what is None or empty, and the versions."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    given = {key: value for key, value in plain.items() if value not in (None, [], {})}
    return {**given, 'timm_epfs': __version__, 'timm': timm.__version__, 'torch': torch.__version__.split('+')[0]}
