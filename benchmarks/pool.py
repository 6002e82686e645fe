"""Worker processes that stay, with a time limit a task: one that hangs or dies is replaced, and the rest go on.

``concurrent.futures`` can't end a task that runs, and gives up the whole pool when one worker dies.
"""
import gc
import multiprocessing
import time
import warnings
from collections import deque
from multiprocessing.connection import wait
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

__all__ = ['run']

START_LIMIT = 120  # seconds for the imports
_CONTEXT = multiprocessing.get_context('spawn')


def run(
        work: Callable[[str], Dict[str, Any]],
        names: Iterable[str],
        jobs: int,
        limit: float,
        memory: Optional[float] = None,
) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Do ``work(name)`` for every name, in no order.

    Args:
        work: A function of a module's top level.
        names: One task each.
        jobs: Number of processes, of one thread each.
        limit: Seconds a task may take.
        memory: GB a process may allocate.

    Yields:
        Pairs (name, result), in which the result is ``{'status': 'timeout'}`` or ``{'status': 'crash'}`` where a worker
        was lost.
    """
    waiting = deque(names)
    workers = [_Worker(work, memory) for _ in range(min(jobs, len(waiting)))]
    try:
        while workers:
            first = min(worker.deadline for worker in workers)
            ready = wait([worker.pipe for worker in workers], timeout=max(first - time.monotonic(), 0))
            for i, worker in enumerate(workers):
                result = worker.result(ready)
                if result is None:
                    continue
                if worker.name is not None:
                    yield worker.name, result
                if not waiting:
                    workers[i].stop()
                elif worker.lost:
                    workers[i] = _Worker(work, memory)
                else:
                    worker.give(waiting.popleft(), limit)
            workers = [worker for worker in workers if not worker.lost]
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    def __init__(self, work: Callable, memory: Optional[float]):
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, work, memory), daemon=True)
        self.process.start()
        theirs.close()
        self.name: Optional[str] = None
        self.deadline = time.monotonic() + START_LIMIT
        self.lost = False

    def give(self, name: str, limit: float) -> None:
        self.name, self.deadline = name, time.monotonic() + limit
        self.pipe.send(name)

    def result(self, ready) -> Optional[Dict[str, Any]]:
        """What the worker has done, None while it is still busy."""
        if self.pipe in ready:
            try:
                return self.pipe.recv()
            except (EOFError, OSError):
                status = 'crash'
        elif time.monotonic() > self.deadline:
            status = 'timeout'
        else:
            return None
        self.stop()
        if self.name is None:
            raise RuntimeError(f'a worker didn\'t start ({status})')
        return {'status': status}

    def stop(self) -> None:
        self.lost = True
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe, work: Callable, memory: Optional[float]) -> None:
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if memory:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 1e9),) * 2)
    pipe.send({})  # ready
    while True:
        pipe.send(work(pipe.recv()))
        gc.collect()
