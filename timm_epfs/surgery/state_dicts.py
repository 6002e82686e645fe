"""Dense checkpoints cut to a plan, and back."""
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor

from ..core import PruningError, complement
from ..plan import Plan, check_plan
from .bases import build_base
from .optimizer_states import is_optimizer_state, slice_optimizer_state
from .tensors import cut_tensor, dense_lengths, tensor_misfits, wrong_base

__all__ = ['inflate_checkpoint', 'slice_checkpoint']


def slice_checkpoint(
        state_dict: Mapping[str, Any],
        plan: Plan,
        parameters: Optional[Mapping[str, Tensor]] = None,
) -> Dict[str, Any]:
    """Cut a dense checkpoint of the plan's base, or the state of an optimizer that trained it.

    Tensors that the plan doesn't cut pass through as they are. Of an optimizer's state, the moments are cut as their
    parameters are, so that training goes on where it was (``cut_optimizer`` does this to an optimizer in use)::

        state = slice_checkpoint(optimizer.state_dict(), slim.pruning_plan, dict(dense.named_parameters()))
        optimizer = torch.optim.AdamW(slim.parameters())
        optimizer.load_state_dict(state)

    Args:
        state_dict: Tensors by name, as in the base's ``state_dict()``; or an optimizer's ``state_dict()``.
        plan: What stays.
        parameters: For an optimizer's state: the dense parameters that the optimizer has, by name. Their order is that
            in which it has them, unless it was made with ``named_parameters()``.

    Raises:
        PruningError: The checkpoint or the parameters are of another base, or part of an optimizer's state is neither
            of its parameter's shape nor one number (as in Kron and LBFGS).
    """
    check_plan(plan)
    if is_optimizer_state(state_dict):
        return slice_optimizer_state(state_dict, plan, parameters)
    named = {member.tensor for cut in plan.cuts for member in cut.structure.members}
    absent = named.difference(state_dict)
    if absent and plan.base is not None:
        # Buffers that are not persistent are in the model and never in a checkpoint.
        absent = absent.intersection(build_base(plan.base, plan.base_args, device='meta').state_dict())
        named = named.intersection(state_dict) | absent
    problems = tensor_misfits(plan, state_dict, may_lack=lambda name: name not in named)
    if problems:
        raise wrong_base(plan, problems, 'give a dense checkpoint of the base, unwrapped')

    removed, lost = plan.removed(), plan.lost(state_dict)
    return {
        name: cut_tensor(tensor, removed[name]) if name in removed else tensor
        for name, tensor in state_dict.items() if name not in lost
    }


def inflate_checkpoint(state_dict: Mapping[str, Tensor], plan: Plan) -> Dict[str, Tensor]:
    """The inverse of ``slice_checkpoint``: a checkpoint of the pruned model with zeros for what the plan removed.

    It fits the dense base, so whatever adapts a dense checkpoint (to other classes, channels or image sizes) adapts it.

    Raises:
        PruningError: The checkpoint is not of this plan's model.
    """
    check_plan(plan)
    dense, lengths = dict(state_dict), dense_lengths(plan)
    for name, dims in plan.removed().items():
        for dim, gone in dims.items() if name in dense else ():
            part, length = dense[name], lengths[name, dim]
            if dim >= part.ndim or part.shape[dim] + len(gone) != length:
                raise PruningError(
                    f'{name} of shape {tuple(state_dict[name].shape)} is not what the plan leaves of {plan.base}; '
                    'give the weights that were saved with the plan'
                )
            keep = torch.from_numpy(complement(gone, length)).to(part.device)
            whole = part.new_zeros((*part.shape[:dim], length, *part.shape[dim + 1:]))
            dense[name] = whole.index_copy(dim, keep, part)
    if plan.removed_blocks():
        base = build_base(plan.base, plan.base_args, device='meta').state_dict()
        dense.update({name: torch.zeros(base[name].shape, dtype=base[name].dtype) for name in plan.lost(base)})
    return dense
