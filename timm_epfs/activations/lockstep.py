"""Runs the same forward for several batches at once, layer by layer.

Each batch has a thread of its own, and only one of them runs at a time. Where a thread calls ``meet``, it waits until
all have come to the same place. So a layer can be computed from all images before any of them is passed on to the next,
without keeping the activations of more than one layer.
"""
from threading import Semaphore, Thread
from typing import Any, Callable, List, Optional, Sequence

from ..core import PruningError

__all__ = ['Lockstep']


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
        self._place: Any = None
        self._error: Optional[BaseException] = None

    def run(self, tasks: Sequence[Callable[[int], None]]) -> None:
        """Run tasks, each called with its number, until all have returned.

        Raises:
            PruningError: The tasks met at different places.
            Exception: The first one that a task raised.
        """
        self._turns = [Semaphore(0) for _ in tasks]
        threads = [Thread(target=self._run, args=(i, task), daemon=True) for i, task in enumerate(tasks)]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

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
                self._place = place
            elif place != self._place:
                raise PruningError(
                    f'the forward takes another way for other images: {self._place or "its end"} and '
                    f'{place or "its end"} come at the same time; give images that all take the same way')
            if number == len(self._turns) - 1 and place is not None:
                self._at_meeting(place)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        self._turns[(number + 1) % len(self._turns)].release()
