"""Progress on stderr, for work that takes longer than two seconds."""
import sys
import threading
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Optional

from tqdm import tqdm

__all__ = ['progress', 'step']

DELAY = 2.0  # seconds


def progress(
        batches: Optional[Iterable],
        what: str,
        total: Optional[int] = None,
        *,
        delay: float = DELAY,
        **options: Any,
) -> tqdm:
    """The batches, with a progress bar.

    Args:
        batches: What is iterated over. None: the caller updates the bar.
        what: What is being done, in front of the bar.
        total: Number of batches. None: their length, where they have one.
        delay: Seconds until the bar shows.
        **options: tqdm's.
    """
    # Where stderr is a log file, every update is a line of its own: one every ten seconds is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(batches, what, total, leave=False, file=sys.stderr, delay=delay, mininterval=interval, **options)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show what is being done inside the block, and for how long it has been running."""
    done = threading.Event()
    thread = threading.Thread(target=_tick, args=(what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tick(what: str, done: threading.Event) -> None:
    if done.wait(DELAY):
        return
    if not sys.stderr.isatty():
        print(f'timm-epfs: {what} …', file=sys.stderr, flush=True)
        return
    with tqdm(desc=f'timm-epfs: {what}', bar_format='{desc} {elapsed}', leave=False, file=sys.stderr) as clock:
        while not done.wait(0.5):
            clock.refresh()
