"""Functions with an ``lru_cache``, without it."""
from functools import _lru_cache_wrapper, update_wrapper
from typing import Any, Callable

import torch
from torch import nn

__all__ = ['is_cached', 'uncached']

_SIZES = (int, float, torch.Tensor, torch.device, torch.dtype, nn.Module)


def is_cached(function: Any) -> bool:
    """Whether a function has an ``lru_cache``."""
    return isinstance(function, _lru_cache_wrapper)


def uncached(cached: Callable) -> Callable:
    """A function with an ``lru_cache``, without it where a call depends on sizes.

    What is found by its name, or without any argument, such as a registry, stays the same object.
    """
    def function(*args, **kwargs):
        return (cached.__wrapped__ if _has_sizes((args, kwargs)) else cached)(*args, **kwargs)

    return update_wrapper(function, cached)


def _has_sizes(value: Any) -> bool:
    if isinstance(value, (tuple, list, set, frozenset, dict)):
        return any(map(_has_sizes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, _SIZES) and not isinstance(value, bool)
