"""``Repeatable``: an iterable that can be iterated over more than once."""
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

__all__ = ['Repeatable']


@dataclass(frozen=True)
class Repeatable:
    """An iterable that can be iterated over more than once: each time, it calls ``draw`` for new batches."""
    draw: Callable[[], Iterable]

    def __iter__(self) -> Iterator:
        return iter(self.draw())
