"""Which torch functions a forward runs, as they are called: what there is to time.

The recorder sees operations of the meta device, where fused ones (attention, say) fall apart. A call is written down
one level above, where every device gets the same.
"""
from dataclasses import dataclass
from typing import Any, Callable, List, Tuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..core import Size

__all__ = ['Call', 'Calls', 'tensors_in']


@dataclass(frozen=True)
class Call:
    """One call that computes something.

    Attributes:
        function: What was called.
        sizes: Sizes of the dims of each tensor that it was given.
        gates: Numbers of units left of the blocks around it: it runs where none is zero.
    """
    function: Callable
    sizes: Tuple[Tuple[Size, ...], ...]
    gates: Tuple[Size, ...] = ()


class Calls(TorchFunctionMode):
    """Tells ``see(function, args, kwargs, out)`` of every call inside it that gives new numbers: views don't."""

    def __init__(self, see: Callable[[Callable, Any, Any, Any], None]):
        super().__init__()
        self._see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if _computes(tensors_in((args, kwargs)), tensors_in(out)):
                self._see(func, args, kwargs, out)
        return out


def tensors_in(tree: Any) -> List[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _computes(given: List[torch.Tensor], made: List[torch.Tensor]) -> bool:
    """Whether there is more to it than views: an output that was an input was changed in place."""
    if not given or not made:
        return False
    if any(out is tensor for out in made for tensor in given):
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return any(out.untyped_storage()._cdata not in storages for out in made)
