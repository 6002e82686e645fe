"""Copies of a model, without data or with it, and the line of a model's code that runs."""
import os
import sys
import traceback
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Callable, Iterator, Optional, Tuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core import clone_tensor, deep_copy, without_fused_attention
from .hooks import drop_hooks_of, watching_hooks, without_global_hooks

__all__ = ['call_site', 'cpu_copy', 'meta_copy', 'meta_tensor', 'quiet', 'raised_at']


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without allocating its weights. The model isn't touched.

    Hooks that only watch the model's forward stay behind.

    Raises:
        PruningError: The model can't be copied.
    """
    return _copy(model, meta_tensor)


def cpu_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, with its weights. All else is as for ``meta_copy``."""
    return _copy(model, lambda tensor: clone_tensor(tensor.cpu()))


def _copy(model: nn.Module, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    watching = watching_hooks(model)
    copied = deep_copy(model, copy_tensor, share=watching)
    drop_hooks_of(copied, watching)
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
    """Inside the block, a forward runs without gradients, fused attention and the hooks by which somebody watches all
    modules of the process, and the random state stays as it is."""
    with torch.no_grad(), torch.random.fork_rng([]), sdpa_kernel(SDPBackend.MATH), without_fused_attention(), \
            without_global_hooks():
        yield


def call_site() -> Tuple[str, int]:
    """File and line of the model's code that called the operation that is running."""
    frame: Optional[Any] = sys._getframe(2)
    while frame is not None:
        if not _is_plumbing(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return '?', 0


def raised_at(error: BaseException) -> Tuple[str, int]:
    """File and line of the model's code that an error comes from."""
    lines = [(path, line) for path, line, *_ in traceback.extract_tb(error.__traceback__) if not _is_plumbing(path)]
    return lines[-1] if lines else ('?', 0)


@lru_cache(maxsize=None)
def _is_plumbing(path: str) -> bool:
    """Whether a file of code is torch's, this package's or the interpreter's own."""
    return path.startswith('<frozen ') or path not in _MODELS and any(lies_in(path, folder) for folder in _PLUMBING)


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below.

    >>> lies_in('/opt/torch/lib/torch/functional.py', '/opt/torch/lib/torch')
    True
    >>> lies_in('/opt/torch/models/net.py', '/opt/torch/lib/torch')
    False
    """
    return os.path.normcase(path).startswith(os.path.join(os.path.normcase(folder), ''))


_HERE = os.path.dirname(__file__)
_PLUMBING = (os.path.dirname(torch.__file__), _HERE, os.path.join(os.path.dirname(_HERE), 'core'))
_MODELS = (nn.modules.transformer.__file__,)  # torch's own models, of many layers
