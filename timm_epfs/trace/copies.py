"""Copies of a model, without data or with it, and the line of a model's code that runs."""
import copy
import sys
import traceback
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

__all__ = ['call_site', 'copy_to', 'meta_copy', 'quiet', 'raised_at']

_HERE = __file__.rsplit('/', 1)[0]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without allocating its weights. The model isn't touched."""
    return copy_to(model, 'meta')


def copy_to(model: nn.Module, device: Union[str, torch.device]) -> nn.Module:
    """A copy of a model on a device, which shares no tensor with the model.

    Args:
        model: The model. It isn't touched.
        device: The device. On the meta device, no data is allocated.
    """
    device = torch.device(device)
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _moved(tensor, device)
        for value in vars(module).values():
            for leaf in tree_leaves(value) if isinstance(value, (list, tuple, dict, torch.Tensor)) else ():
                if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = _moved(leaf, device)
    return copy.deepcopy(model, memo)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == 'meta':
        moved = torch.empty_like(tensor, device=device, requires_grad=False)
    else:
        moved = tensor.detach().to(device, copy=True)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, a forward runs without gradients, without fused attention and leaves the random state alone."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def call_site() -> Tuple[str, int]:
    """File and line of the model's code that called the operation that is running."""
    frame: Optional[Any] = sys._getframe(2)
    while frame is not None:
        if _is_models(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return '?', 0


def raised_at(error: BaseException) -> Tuple[str, int]:
    """File and line of the model's code that an error comes from."""
    lines = [(path, line) for path, line, *_ in traceback.extract_tb(error.__traceback__) if _is_models(path)]
    return lines[-1] if lines else ('?', 0)


def _is_models(path: str) -> bool:
    """Whether a file is part of the model's code, not of torch or of this package."""
    return '/torch/' not in path and not path.startswith(_HERE) and '<' not in path
