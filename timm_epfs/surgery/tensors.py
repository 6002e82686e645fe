"""What a plan does to single tensors, and whether they are those that it was made for."""
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..core import PruningError, complement, first_few, named_tensors
from ..plan import Plan

__all__ = ['cut_tensor', 'dense_lengths', 'tensor_misfits', 'unchanged_on_error', 'wrong_base']


def cut_tensor(tensor: Tensor, removed: Mapping[int, np.ndarray]) -> Tensor:
    """A copy without some entries of some dims, in the tensor's own memory format."""
    if tensor.is_meta:
        cut = tensor.new_empty([length - len(removed.get(dim, ())) for dim, length in enumerate(tensor.shape)])
    else:
        cut = tensor.detach()
        for dim, gone in removed.items():
            keep = torch.from_numpy(complement(gone, tensor.shape[dim]))
            cut = cut.index_select(dim, keep.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous() and \
        tensor.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def dense_lengths(plan: Plan) -> Dict[Tuple[str, int], int]:
    """Lengths of the dense model's dims, by tensor and dim. Where a member doesn't say, structures own all of a dim."""
    lengths: Dict[Tuple[str, int], int] = {}
    for member in (member for cut in plan.cuts for member in cut.structure.members):
        key = member.tensor, member.dim
        lengths[key] = max(lengths.get(key, 0), member.length or int(member.index.max()) + 1)
    return lengths


def tensor_misfits(plan: Plan, tensors: Mapping[str, Tensor], may_lack: Callable[[str], bool]) -> List[str]:
    """What stands in the way of cutting these tensors, one line each.

    Args:
        plan: The plan.
        tensors: Dense tensors by name.
        may_lack: Whether a tensor that the plan names may be missing.
    """
    problems = []
    for (name, dim), length in dense_lengths(plan).items():
        tensor = tensors.get(name)
        if tensor is None:
            if not may_lack(name):
                problems.append(f'{name} is missing')
        elif dim >= tensor.ndim or tensor.shape[dim] != length:
            problems.append(f'{name} has shape {tuple(tensor.shape)} where dim {dim} should have {length}')
    return list(dict.fromkeys(problems))


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """On any error inside the block, a model's parameters and buffers get the values that they had before."""
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in named_tensors(model).items():
                tensor.copy_(before[name])
        raise


def wrong_base(plan: Plan, problems: Sequence[str], remedy: str) -> PruningError:
    """The error for tensors or attributes that aren't those of the plan's base."""
    base = f' (base {plan.base})' if plan.base else ''
    return PruningError(f'this is not the plan\'s base{base}: {first_few(problems)}; {remedy}')
