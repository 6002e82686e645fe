"""What a forward takes, measured: time, and memory at its peak."""
import ctypes
import logging
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .calibrate import eval_mode

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement

__all__ = ['in_turns', 'latencies', 'peak_memory']

Forward = Callable[[], object]


def in_turns(forwards: Sequence[Forward], seconds: float, least: int = 1) -> 'List[Measurement]':
    """Time single forwards that take turns, so that what else runs on the machine slows all of them alike.

    ``torch.utils.benchmark`` runs each twice before it looks at the clock: caches are as they are where a model runs
    alone, whoever had the turn before.

    Args:
        forwards: What to run.
        seconds: How long to measure.
        least: So many turns are taken, however long that lasts.
    """
    with _without_cuda_warning():
        from torch.utils.benchmark import Measurement, Timer
    threads = torch.get_num_threads()
    timers = [Timer('forward()', globals={'forward': forward}, num_threads=threads) for forward in forwards]
    turns: List[List[Measurement]] = []
    start = time.perf_counter()
    while len(turns) < least or time.perf_counter() - start < seconds:
        turns.append([timer.timeit(1) for timer in timers])
    return [Measurement.merge(taken)[0] for taken in zip(*turns)]


def latencies(models: Sequence[nn.Module], images: Tensor, seconds: float = 1.5) -> List[float]:
    """Median milliseconds of a forward of each model, in evaluation mode.

    Args:
        models: Models on the device of the images.
        images: A batch.
        seconds: How long to measure.
    """
    def forward(model: nn.Module) -> Forward:
        def run() -> None:
            with eval_mode(model):
                model(images)
        return run

    with torch.inference_mode():
        return [1000 * taken.median for taken in in_turns([forward(model) for model in models], seconds)]


def peak_memory(forward: Forward, device: torch.device) -> Optional[int]:
    """Bytes that a forward needs at its peak, over what is there before it.

    On an accelerator, what torch's allocator gave out. On the CPU, by how much the process grew: its peak resident set,
    which the kernel counts anew on request, and which has what oneDNN and others allocate by themselves. It is within
    some hundred kB of what is needed, and known on Linux alone.

    Args:
        forward: What to run; it has run before, so that nothing is set up in this one.
        device: Where it runs.

    Returns:
        Bytes, or None where they can't be measured.
    """
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        forward()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would be used without the process growing
        Path('/proc/self/clear_refs').write_text('5')
        before = _resident('VmRSS')
        forward()
        return _resident('VmHWM') - before
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf'{field}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


@contextmanager
def _without_cuda_warning() -> Iterator[None]:
    """Importing torch.utils.benchmark looks for a C++ compiler, and warns where CUDA is there without a GPU."""
    logger = logging.getLogger('torch.utils.cpp_extension')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
