"""Copies of a model without data, and the line of a model's code that runs."""
import copy
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ['call_site', 'meta_copy', 'quiet']

_HERE = __file__.rsplit('/', 1)[0]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without allocating its weights. The model isn't touched."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
        for value in vars(module).values():
            for leaf in tree_leaves(value) if isinstance(value, (list, tuple, dict, torch.Tensor)) else ():
                if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = _to_meta(leaf)
    return copy.deepcopy(model, memo)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device='meta', requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, a forward runs without gradients and without the fused path of torch's attention modules."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def call_site() -> Tuple[str, int]:
    """File and line of the model's code that called the operation that is running."""
    frame: Optional[Any] = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if '/torch/' not in path and not path.startswith(_HERE) and '<' not in path:
            return path, frame.f_lineno
        frame = frame.f_back
    return '?', 0
