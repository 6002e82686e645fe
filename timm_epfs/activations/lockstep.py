"""Runs the same forward for several batches at once, layer by layer.

Each batch has a thread of its own, and only one of them runs at a time. Where a thread calls ``meet``, it waits until
all have come to the same place. So a layer can be computed from all images before any of them is passed on to the next,
without keeping the activations of more than one layer. Some batches may join later, where a layer keeps less.
"""
from threading import Semaphore, Thread
from typing import Any, Callable, List, Optional, Sequence

import numpy as np

from ..core import PruningError

__all__ = ['Lockstep', 'places_to_join']

HELD, FEWEST = 2 ** 30, 64  # bytes that are held of all images together; so many images are held in any case


def places_to_join(held: Sequence[float], batches: Sequence[int]) -> List[int]:
    """The place at which each batch can join, so that no more than ``HELD`` bytes are held.

    >>> places_to_join([2 ** 23, 2 ** 22, 2 ** 21], [100, 100, 100, 500])
    [0, 1, 2]

    Args:
        held: Bytes that are held of one image, by place.
        batches: Number of images, by batch.

    Returns:
        Indices of the places, by batch, ascending. Batches that never fit are left out.
    """
    largest_to_come = np.maximum.accumulate(np.array(held[::-1]))[::-1]
    room = HELD // np.maximum(largest_to_come, 1)
    places: List[int] = []
    for images, total in zip(batches, np.cumsum(batches)):
        place = 0 if total - images < FEWEST else int(np.searchsorted(room, total))
        if place == len(room):
            break
        places.append(place)
    return places


class _Stopped(BaseException):
    """Another thread failed."""


class Lockstep:
    """Threads that run one at a time, in turns.

    Args:
        at_meeting: ``at_meeting(place)``, called when all threads have come to a place.
    """

    def __init__(self, at_meeting: Callable[[Any], None]):
        self._at_meeting = at_meeting
        self._turns: List[Semaphore] = []
        self._joined = self._in_round = 0
        self._place: Any = None
        self._error: Optional[BaseException] = None

    def run(self, tasks: Sequence[Callable[[int], None]], joined: Optional[int] = None) -> None:
        """Run tasks, each called with its number, until all have returned.

        Args:
            tasks: The tasks.
            joined: How many of them run from the start. None: all. The others wait for ``join``.

        Raises:
            PruningError: The tasks met at different places, or some of them weren't let join.
            Exception: The first one that a task raised.
        """
        self._turns = [Semaphore(0) for _ in tasks]
        self._joined = self._in_round = len(tasks) if joined is None else joined
        threads = [Thread(target=self._run, args=(i, task), daemon=True) for i, task in enumerate(tasks)]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self, count: int) -> None:
        """Let the first so many tasks run, the new ones from their start to the next place. Called at a meeting."""
        self._joined = count

    def meet(self, number: int, place: Any) -> None:
        """Wait until all tasks have come to the same place.

        Args:
            number: The task's number.
            place: Name of the place.
        """
        self._arrive(number, place)
        self._turns[number].acquire()
        if self._error is not None:
            raise _Stopped

    def _run(self, number: int, task: Callable[[int], None]) -> None:
        self._turns[number].acquire()
        try:
            if self._error is None:
                task(number)
            self._arrive(number, None)
        except _Stopped:
            self._pass_on(number)
        except BaseException as error:
            self._error = self._error or error
            self._pass_on(number)

    def _arrive(self, number: int, place: Any) -> None:
        if self._error is None:
            if number == 0:
                self._place, self._in_round = place, self._joined
            elif place != self._place:
                raise PruningError(_another_way(self._place, place))
            if number == self._in_round - 1:
                if place is not None:
                    self._at_meeting(place)
                elif self._in_round < len(self._turns):
                    raise PruningError(_another_way(None, 'another layer'))
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        count = self._in_round if self._error is None else len(self._turns)
        self._turns[(number + 1) % count].release()


def _another_way(first: Any, second: Any) -> str:
    return (
        f'the forward takes another way for other images: {first or "its end"} and {second or "its end"} come at the '
        f'same time; give images that all take the same way')
