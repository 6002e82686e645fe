"""An optimizer's state for a dense model, cut to a plan."""
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..core import PruningError
from ..plan import Plan
from .factored_moments import cut_factors
from .tensors import cut_tensor, tensor_misfits, wrong_base

__all__ = ['cut_entry', 'is_optimizer_state', 'slice_optimizer_state']


def is_optimizer_state(state: Mapping[str, Any]) -> bool:
    """Whether this is what an optimizer's ``state_dict()`` returns."""
    return {'state', 'param_groups'} <= set(state)


def slice_optimizer_state(
        state: Mapping[str, Any],
        plan: Plan,
        parameters: Optional[Mapping[str, Tensor]],
) -> Dict[str, Any]:
    """Cut an optimizer's state, as ``slice_checkpoint`` describes it.

    Raises:
        PruningError: The parameters aren't those of the optimizer and the plan, or part of the state can't be cut.
    """
    if parameters is None:
        raise PruningError(
            'slice_checkpoint: an optimizer\'s state doesn\'t say what its tensors belong to; give '
            'parameters=dict(dense.named_parameters()), in the order in which the optimizer has them')
    problems = tensor_misfits(plan, parameters, may_lack=lambda name: True)  # those that are frozen, and buffers
    if problems:
        raise wrong_base(plan, problems, 'give the parameters of the dense model')

    removed, lost = plan.removed(), plan.lost(parameters)
    groups, entries = [], {}
    for group, names in zip(state['param_groups'], _names(state['param_groups'], parameters)):
        left = [(key, name) for key, name in zip(group['params'], names) if name not in lost]
        numbers = range(len(entries), len(entries) + len(left))
        groups.append({**group, 'params': list(numbers)})
        if 'param_names' in group:
            groups[-1]['param_names'] = [name for _, name in left]
        entries.update((number, (*known, group)) for number, known in zip(numbers, left))
    cut = {
        number: cut_entry(state['state'][key], name, parameters[name].shape, group, removed.get(name, {}))
        for number, (key, name, group) in entries.items() if key in state['state']
    }
    return {**state, 'state': cut, 'param_groups': groups}


def _names(groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, Tensor]) -> List[List[str]]:
    """Names of the parameters of each group: those that it has, or all in their order."""
    lengths = [len(group['params']) for group in groups]
    if all('param_names' in group for group in groups):
        names = [name for group in groups for name in group['param_names']]
    else:
        names = list(parameters)
    if len(names) != sum(lengths) or not set(names) <= set(parameters):
        raise PruningError(
            f'slice_checkpoint: the optimizer has {sum(lengths)} parameters, and {len(parameters)} were given that are '
            f'not the same; give those that the optimizer was made with, by name and in its order')
    rest = iter(names)
    return [[next(rest) for _ in range(length)] for length in lengths]


def cut_entry(
        entry: Mapping[str, Any],
        name: str,
        shape: Sequence[int],
        group: Mapping[str, Any],
        removed: Mapping[int, Any],
) -> Dict[str, Any]:
    """What an optimizer keeps of one parameter, cut: whatever has its shape, and Adafactor's factors. Scalars stay.

    Args:
        entry: What the optimizer keeps, by name.
        name: Name of the parameter.
        shape: Its shape before the cut.
        group: Options of its parameter group.
        removed: Entries of the parameter that go, by dim.

    Raises:
        PruningError: Something else is kept.
    """
    with torch.no_grad():
        factors, cut = cut_factors(entry, shape, group, removed)
        for key, value in entry.items():
            sizes = [tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() != 1]
            if key in factors:
                continue
            if sizes and (not isinstance(value, Tensor) or value.shape != shape):
                raise PruningError(
                    f'the optimizer keeps {key!r} of {name} with shape {sizes[0]} where the parameter has '
                    f'{tuple(shape)}, so it can\'t be cut; start with a new optimizer')
            cut[key] = cut_tensor(value, removed) if sizes and removed else value
    return cut
