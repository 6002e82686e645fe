"""Measures the time and the peak memory of forwards.

Each function is built on the one above it:

- ``timer``: torch's ``Timer`` of one call.
- ``time_call``: seconds of one short call by itself, the least of several repetitions, for a table of latencies.
- ``time_interleaved``: several calls that take turns, so that they can be compared; one ``Measurement`` each.
- ``time_models``: the forwards of several models that take turns.
- ``latencies``: the medians of those in milliseconds, to show to people; ``latency_note`` says how they were measured.

``peak_memory`` stands by itself.
"""
import os
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from threading import RLock
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..core import device_of, eval_mode, unlogged

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement, Timer

__all__ = [
    'Forward', 'latencies', 'latency_note', 'peak_memory', 'time_call', 'time_interleaved', 'time_models', 'timer',
]

_SHORTEST = 0.004   # seconds for which ``time_call`` repeats a call, at least
_REPEATS = 2        # and how often, at least

_STDERR = RLock()

Forward = Callable[[], object]


def timer(call: Forward, device: torch.device) -> 'Timer':
    """torch's timer of a call, on as many threads as torch uses now."""
    _keep_heap()
    with unlogged('torch.utils.cpp_extension'):  # its import warns where CUDA is installed without a GPU
        from torch.utils.benchmark import Timer
    return Timer('call()', timer=partial(_now, device), globals={'call': call}, num_threads=torch.get_num_threads())


def time_call(call: Forward, device: torch.device) -> float:
    """Seconds that a short call takes by itself: the least of several repetitions, since others only lengthen it."""
    clock = timer(call, device)
    once = clock.timeit(1).mean
    return min(clock.blocked_autorange(min_run_time=max(_SHORTEST, _REPEATS * once)).times)


def time_interleaved(
        forwards: Sequence[Forward],
        device: torch.device,
        seconds: float,
        least: int = 1,
) -> 'List[Measurement]':
    """Time single forwards that take turns, so that other programs on the machine slow all of them alike.

    ``torch.utils.benchmark`` runs a forward twice before it starts the clock: the caches are then in the state in which
    the same model would find them alone, whichever forward had the turn before.

    Args:
        forwards: What to run.
        device: Where it runs.
        seconds: How long to measure all of them together.
        least: Smallest number of turns, however long they take.

    Returns:
        A measurement for each forward, with one time in seconds for each turn.
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
    """Time forwards of models in evaluation mode that take turns, without gradients.

    Args:
        models: Models on one device.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        seconds: How long to measure all of them together.
        least: Smallest number of turns, however long they take.

    Returns:
        A measurement for each model, with one time in seconds for each turn.
    """
    with ExitStack() as modes, torch.inference_mode():
        for model in models:
            modes.enter_context(eval_mode(model))
        forwards = [partial(model, *args, **kwargs) for model in models]
        return time_interleaved(forwards, device_of(models[0]), seconds, least)


def latencies(models: Sequence[nn.Module], images: Tensor, seconds: float = 1.5) -> List[float]:
    """Median milliseconds of a forward of each model, by ``time_models``.

    Args:
        models: Models on the device of the images.
        images: A batch.
        seconds: How long to measure all of them together.
    """
    return [1000 * taken.median for taken in time_models(models, (images,), {}, seconds)]


def latency_note(device: str) -> str:
    """A line for readers that says how ``latencies`` of single images were measured."""
    return f'latency: median at batch 1 on {device}, threads: {torch.get_num_threads()}'


def peak_memory(forward: Forward, device: torch.device) -> int:
    """Bytes that torch's allocator holds at the peak of a forward, above what it held before.

    Memory that libraries such as oneDNN allocate themselves is not included. The process's resident set would include
    it, but also the holes that earlier models left in the heap: by that measure the same forward needed up to half as
    much again when other models had run before it.

    Args:
        forward: What to run. It has run before, so that what is set up only once is not counted.
        device: Where it runs.
    """
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        forward()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    with _stderr_aside(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def _now(device: torch.device) -> float:
    """The time in seconds, once this device has finished its work; torch's own timer waits for the current one only."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _keep_heap() -> None:
    """Let glibc keep up to 62 MB that a forward frees for the next one.

    By default glibc may return the top of the heap to the system during every forward, and the next forward then has
    to fault those pages in again. That made some models a third slower, depending on what the process had allocated
    before. Freeing a buffer of up to 32 MB raises the limit to twice the buffer's size (mallopt(3),
    ``M_MMAP_THRESHOLD``), unless the buffer came from the heap: the heap hardly has room for four of them.
    """
    [torch.empty(31 << 20, dtype=torch.uint8) for _ in range(4)]


@contextmanager
def _stderr_aside() -> Iterator[None]:
    """Keep messages of C++ off stderr inside the block: those of torch's profiler, which no log level stops.

    The process has only one stderr. A thread that would put it aside while another one does waits, or what it finds and
    puts back at the end would be the other's substitute.
    """
    with _STDERR:
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(nowhere)
