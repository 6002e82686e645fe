"""Exchange between processes that train together, with and without ``torch.distributed``."""
from typing import Callable, Tuple

import numpy as np
import torch
import torch.distributed as dist

from .errors import PruningError

__all__ = ['from_first', 'measured_by_first', 'summed', 'world_size']


def world_size() -> int:
    """Number of processes that train together, 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The values that the first process has, in all processes, as float64.

    Args:
        values: An array of any shape, which is the same in all processes.
        device: Device on which the processes exchange tensors.
    """
    if world_size() == 1:
        return np.asarray(values, dtype=np.float64)
    shared = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(device)
    dist.broadcast(shared, 0)
    return shared.cpu().numpy()


def measured_by_first(measure: Callable[[], np.ndarray], shape: Tuple[int, ...], device: torch.device) -> np.ndarray:
    """What the first process measures, in all processes. The others wait for it, as they would slow it down.

    Args:
        measure: Returns numbers of this shape. It is called in the first process alone.
        shape: Their shape.
        device: Device on which the processes exchange tensors.

    Raises:
        PruningError: In all other processes, where the first one could not measure and raised an error of its own.
    """
    is_first = world_size() == 1 or dist.get_rank() == 0
    values = np.full(shape, np.nan)
    try:
        if is_first:
            values = measure()
    finally:
        values = from_first(values, device)
    if np.isnan(values).any():
        raise PruningError('the first process could not measure a latency; its own error says why')
    return values
