"""Copies of a model without data, and the line of a model's code that runs."""
import os
import sys
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core import deep_copy
from .caches import is_cached, uncached
from .hooks import drop_hooks_of, watching_hooks, without_global_hooks

__all__ = ['call_site', 'is_plumbing', 'lies_in', 'meta_copy', 'meta_tensor', 'quiet']


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without allocating its weights. The model isn't touched.

    Hooks that only watch the model's forward stay behind, and so does what functions on modules cache.

    Raises:
        PruningError: The model can't be copied.
    """
    watching = watching_hooks(model)
    copied = deep_copy(model, meta_tensor, share=watching)
    drop_hooks_of(copied, watching)
    for module in copied.modules():
        for name, value in vars(module).items():
            if is_cached(value):
                vars(module)[name] = uncached(value)
    return copied


def meta_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and type on the meta device. What is special about a subclass is left out."""
    with torch._C.DisableTorchFunctionSubclass():
        if is_traceable_wrapper_subclass(tensor):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
        else:
            empty = torch.empty_like(tensor, device='meta', requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block, a forward runs without gradients, without the fused path of torch's attention modules, and
    without the hooks by which somebody watches all modules of the process."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), without_global_hooks():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def call_site() -> Tuple[str, int]:
    """File and line of the model's code that called the operation that is running."""
    frame: Optional[Any] = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not is_plumbing(path):
            return path, frame.f_lineno
        frame = frame.f_back
    return '?', 0


@lru_cache(maxsize=None)
def is_plumbing(path: str) -> bool:
    """Whether a file of code is torch's, this package's or the interpreter's own."""
    return path.startswith('<frozen ') or any(lies_in(path, folder) for folder in _PLUMBING)


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below.

    >>> lies_in('/opt/torch/lib/torch/functional.py', '/opt/torch/lib/torch')
    True
    >>> lies_in('/opt/torch/models/net.py', '/opt/torch/lib/torch')
    False
    """
    return os.path.normcase(path).startswith(os.path.join(os.path.normcase(folder), ''))


_PLUMBING = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
