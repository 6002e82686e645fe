"""The torch functions that a forward calls: what a latency model has to time.

The recorder sees the operations of the meta device, where fused ones such as attention fall apart. Calls are recorded
one level above, where they are the same on every device.
"""
from dataclasses import dataclass
from typing import Any, Callable, Iterable, List, Tuple

import torch
from torch.overrides import TorchFunctionMode

from ..core import Size

__all__ = ['Call', 'Calls', 'tensors_in']


@dataclass(frozen=True)
class Call:
    """One call that computes something.

    Attributes:
        function: The function.
        sizes: Sizes of the dims of each tensor among its arguments.
        enclosing_blocks: Numbers of units left of the blocks that it is in: it runs where none is zero.
    """
    function: Callable
    sizes: Tuple[Tuple[Size, ...], ...]
    enclosing_blocks: Tuple[Size, ...] = ()


class Calls(TorchFunctionMode):
    """Passes every call inside it that computes something to ``see(function, args, kwargs, out)``. Views don't."""

    def __init__(self, see: Callable[[Callable, Any, Any, Any], None]):
        super().__init__()
        self._see = see

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = tensors_in(out)
        if made:
            with torch._C.DisableTorchFunction():
                if _computes(tensors_in((args, kwargs)), made):
                    self._see(func, args, kwargs, out)
        return out


def tensors_in(tree: Any) -> List[torch.Tensor]:
    """The tensors in the arguments or the results of a call: lists, tuples and dicts only, since pytree is slow."""
    found: List[torch.Tensor] = []
    _collect((tree,), found)
    return found


def _collect(values: Iterable[Any], found: List[torch.Tensor]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def _computes(given: List[torch.Tensor], made: List[torch.Tensor]) -> bool:
    """Whether a call gives more than views of its arguments. An output that is an argument was changed in place."""
    if not given:
        return False
    if any(out is tensor for out in made for tensor in given):
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return any(out.untyped_storage()._cdata not in storages for out in made)
