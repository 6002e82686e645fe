"""What a forward takes, measured: time, and memory at its peak."""
import os
import time
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..core import device_of, eval_mode

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement, Timer

__all__ = ['in_turns', 'latencies', 'latency_note', 'peak_memory', 'time_models', 'timer']

Forward = Callable[[], object]


def timer(call: Forward, device: torch.device) -> 'Timer':
    """torch's timer of a call, on as many threads as torch uses now."""
    _keep_heap()
    with _silent():  # its import warns where CUDA is there without a GPU
        from torch.utils.benchmark import Timer
    return Timer('call()', timer=partial(_now, device), globals={'call': call}, num_threads=torch.get_num_threads())


def _keep_heap() -> None:
    """Have glibc keep what a forward frees, up to 62 MB, for the next one.

    By default it may hand the top of the heap back to the system within every forward, whose pages are then missed in
    the next: a third more time for some models, by what the process happened to allocate before. Freeing a buffer of up
    to 32 MB raises that limit to twice its size (mallopt(3), ``M_MMAP_THRESHOLD``), unless it came from the heap: hence
    four of them, for which the heap has hardly room.
    """
    [torch.empty(31 << 20, dtype=torch.uint8) for _ in range(4)]


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked for: torch's own timer waits for the current one only."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def in_turns(
        forwards: Sequence[Forward],
        device: torch.device,
        seconds: float,
        least: int = 1,
) -> 'List[Measurement]':
    """Time single forwards that take turns, so that what else runs on the machine slows all of them alike.

    ``torch.utils.benchmark`` runs each twice before it looks at the clock: caches are as they are where a model runs
    alone, whoever had the turn before.

    Args:
        forwards: What to run.
        device: Where it runs.
        seconds: How long to measure.
        least: So many turns are taken, however long that lasts.
    """
    timers = [timer(forward, device) for forward in forwards]
    turns: 'List[List[Measurement]]' = []
    start = time.perf_counter()
    while len(turns) < least or time.perf_counter() - start < seconds:
        turns.append([timer.timeit(1) for timer in timers])
    return [taken[0].merge(taken)[0] for taken in zip(*turns)]


def time_models(
        models: Sequence[nn.Module],
        args: Tuple,
        kwargs: Mapping[str, Any],
        seconds: float,
        least: int = 1,
) -> 'List[Measurement]':
    """Time forwards of models in evaluation mode, in turns.

    Args:
        models: Models on one device.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of it.
        seconds: How long to measure.
        least: As in ``in_turns``.
    """
    with ExitStack() as modes, torch.inference_mode():
        for model in models:
            modes.enter_context(eval_mode(model))
        return in_turns([partial(model, *args, **kwargs) for model in models], device_of(models[0]), seconds, least)


def latencies(models: Sequence[nn.Module], images: Tensor, seconds: float = 1.5) -> List[float]:
    """Median milliseconds of a forward of each model, in evaluation mode.

    Args:
        models: Models on the device of the images.
        images: A batch.
        seconds: How long to measure.
    """
    return [1000 * taken.median for taken in time_models(models, (images,), {}, seconds)]


def latency_note(device: str) -> str:
    """What ``latencies`` of single images are, in a line for whoever reads them."""
    return f'latency: median at batch 1 on {device}, threads: {torch.get_num_threads()}'


def peak_memory(forward: Forward, device: torch.device) -> int:
    """Bytes that torch's allocator holds at the peak of a forward, over what it held before.

    What a library such as oneDNN allocates by itself isn't seen. A process's resident set has it, and the holes that
    earlier models left in the heap as well: measured by it, the same forward took half as much again after others.

    Args:
        forward: What to run; it has run before, so that nothing is set up in this one.
        device: Where it runs.
    """
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        forward()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr from inside the block, from C++ neither, where no log level keeps torch quiet."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, 'w') as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
