"""What is kept of a run: of its plan the units that stay, of weights half of their precision.

A plan lists every tensor that each structure cuts, thousands of lines that follow from the base model alone. They are
traced again when they are needed.
"""
import json
from dataclasses import replace
from functools import lru_cache
from typing import Any, Dict, Mapping

import numpy as np
from torch import Tensor

from timm_epfs.core import PruningError
from timm_epfs.plan import Plan, make_plan
from timm_epfs.plan.notation import Ranges
from timm_epfs.pruner import trace_model
from timm_epfs.surgery import build_base
from timm_epfs.trace import Trace

__all__ = ['halved', 'plan_of', 'plan_record']

_NONE = 'none'  # what a plan's JSON says of a block that goes


def halved(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Weights in half precision, as they are kept in the repository."""
    return {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def plan_record(plan: Plan) -> Dict[str, Any]:
    """A plan as a result stores it, JSON values.

    Returns:
        ``base``, ``base_args``, ``recipe`` and ``cost`` as in the plan's own JSON, and ``keep``: the units that stay
        of each structure that is cut, as ranges (``'0-5,8'``), or ``'none'`` for a block that goes.
    """
    data = plan.to_dict()
    keep = {cut['name']: cut['keep'] for cut in data['cuts'] if cut['keep'] != 'all'}
    return {**{name: data[name] for name in ('base', 'base_args', 'recipe', 'cost')}, 'keep': keep}


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The whole plan of what ``plan_record`` returned. The base is traced on the meta device, once per process.

    Raises:
        PruningError: The base has no structure of a name that the record holds.
    """
    base, base_args = record['base'], record['base_args']
    traced = _trace(base, json.dumps(base_args, sort_keys=True))
    keep = {structure.name: np.arange(structure.units) for structure in traced.structures}
    for name, units in record['keep'].items():
        if name not in keep:
            raise PruningError(
                f'the result cuts {name}, and {base} has no such structure in this version: run the experiment again')
        keep[name] = np.arange(0) if units == _NONE else Ranges.parse(units).array()
    plan = make_plan(traced, keep, record['recipe'], base, base_args)
    # The cost is of the images that were trained on, which may be smaller than the base's own.
    return replace(plan, cost={quantity: tuple(pair) for quantity, pair in record['cost'].items()})


@lru_cache(maxsize=None)
def _trace(base: str, base_args: str) -> Trace:
    return trace_model(build_base(base, json.loads(base_args), 'meta'))
