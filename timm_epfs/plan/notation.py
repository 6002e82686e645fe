"""Index arrays as short text: ranges such as ``0-5,8,10-63`` and strided maps such as ``0 + 64u + 3x384 + 64x1``.

Text is read in two steps, because it may come from anyone: parsing gives the number of entries and the largest one
without allocating them, and only then, once the caller has accepted both, ``array()`` does.
"""
import re
from dataclasses import dataclass
from math import prod
from typing import Optional, Tuple

import numpy as np

__all__ = ['Ranges', 'Strided']

# What no text of ranges has: other characters, ten digits, places without a number, runs of three or to zero.
_NO_RANGE = re.compile(r'[^0-9,-]|[0-9]{10}|[,-](?:[,-]|$)|-(?:0|[0-9]+-)')
_STRIDED = re.compile(r'(\d{1,9})(?: \+ (\d{1,9})u)?((?: \+ \d{1,9}x\d{1,9}){0,8})', re.ASCII)


@dataclass(frozen=True, eq=False)
class Ranges:
    """A flat index array as runs of consecutive values, in order.

    Attributes:
        starts: First value of each run, shape (runs,).
        stops: Last value of each run, inclusive, shape (runs,).
    """
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def find(cls, values: np.ndarray) -> 'Ranges':
        """The runs of an index array, shape (n,), n > 0."""
        breaks = np.flatnonzero(np.diff(values) != 1)
        return cls(values[np.r_[0, breaks + 1]], values[np.r_[breaks, len(values) - 1]])

    @classmethod
    def parse(cls, text: str) -> 'Ranges':
        """Read ``'0-5,8'``.

        Raises:
            ValueError: The text is not a list of ranges.
        """
        wrong = _NO_RANGE.search(text)
        if wrong or text[:1] in ',-':
            start = text.rfind(',', 0, wrong.start() + 1) + 1 if wrong else 0
            raise ValueError(f'{text[start:start + 40].partition(",")[0]!r} is no range; write 0-5,8,10-63')
        # The last of a run is read as a negative number, as in '0,-5,8'.
        values = np.fromstring(text.replace('-', ',-'), dtype=np.int64, sep=',')
        first = values >= 0
        starts = values[first]
        stops = starts.copy()
        stops[np.cumsum(first)[~first] - 1] = -values[~first]
        if (stops < starts).any():
            worst = int(np.argmax(stops < starts))
            raise ValueError(f"'{starts[worst]}-{stops[worst]}' runs backwards")
        return cls(starts, stops)

    @property
    def entries(self) -> int:
        """Number of values."""
        return int((self.stops - self.starts + 1).sum())

    @property
    def top(self) -> int:
        """The largest value."""
        return int(self.stops.max())

    @property
    def ascending(self) -> bool:
        """Whether no value comes twice or out of order."""
        return bool((self.starts[1:] > self.stops[:-1]).all())

    def array(self) -> np.ndarray:
        """The values, shape (entries,), int64."""
        lengths = self.stops - self.starts + 1
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)

    def __str__(self) -> str:
        runs = np.stack([self.starts, self.stops], axis=1).tolist()
        return ','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)


@dataclass(frozen=True)
class Strided:
    """An index map with a regular layout: unit ``u`` owns ``offset + u * stride`` plus every sum of inner steps.

    The query, key and value rows of one of six heads of 64 in a fused projection are ``0 + 64u + 3x384 + 64x1``.

    Attributes:
        units: Number of rows.
        offset: Smallest entry of unit 0.
        stride: Distance between units, 0 where there is one unit.
        inner: Pairs (count, step), largest step first.
    """
    units: int
    offset: int = 0
    stride: int = 1
    inner: Tuple[Tuple[int, int], ...] = ()

    @classmethod
    def find(cls, index: np.ndarray) -> Optional['Strided']:
        """The layout of an index map of shape (units, k), or None where it isn't regular."""
        units, offset = len(index), int(index[0, 0])
        stride = int(index[1, 0]) - offset if units > 1 else 0
        inner = _factor(index[0] - offset)
        if inner is None or offset < 0 or (units > 1 and stride <= 0):
            return None
        found = cls(units, offset, stride, inner)
        return found if np.array_equal(found.array(), index) else None

    @classmethod
    def parse(cls, text: str, units: int) -> 'Strided':
        """Read ``'0 + 64u + 3x384 + 64x1'``.

        Raises:
            ValueError: The text is no such layout, or its entries don't ascend.
        """
        match = _STRIDED.fullmatch(text)
        if not match:
            raise ValueError(f'{text[:40]!r} is no index map; write 0 + 64u + 3x384')
        inner = tuple(tuple(map(int, pair.split('x'))) for pair in match[3].split(' + ')[1:])
        span = 0
        for count, step in reversed(inner):
            if count < 2 or step <= span:
                raise ValueError(f'{text[:40]!r} does not ascend')
            span += (count - 1) * step
        stride = int(match[2] or 0)
        if units > 1 and not stride:
            raise ValueError(f'{text[:40]!r} gives {units} units the same entries')
        return cls(units, int(match[1]), stride, inner)

    @property
    def entries(self) -> int:
        """Number of entries of all units."""
        return self.units * prod(count for count, _ in self.inner)

    @property
    def top(self) -> int:
        """The largest entry."""
        return self.offset + (self.units - 1) * self.stride + sum((count - 1) * step for count, step in self.inner)

    def array(self) -> np.ndarray:
        """The map, shape (units, k), int64."""
        index = self.offset + self.stride * np.arange(self.units, dtype=np.int64)[:, None]
        for count, step in self.inner:
            index = (index[:, :, None] + step * np.arange(count, dtype=np.int64)).reshape(self.units, -1)
        return index

    def __str__(self) -> str:
        terms = [str(self.offset)] + [f'{self.stride}u'] * (self.units > 1)
        return ' + '.join(terms + [f'{count}x{step}' for count, step in self.inner])


def _factor(row: np.ndarray) -> Optional[Tuple[Tuple[int, int], ...]]:
    """Write an ascending row that starts at 0 as sums of steps: [0 1 2 8 9 10] is 2x8 + 3x1."""
    if len(row) == 1:
        return ()
    step = int(row[1])
    if step <= 0:
        return None
    uneven = np.flatnonzero(np.diff(row) != step)
    count = int(uneven[0]) + 1 if len(uneven) else len(row)
    if len(row) % count:
        return None
    outer = _factor(row[::count])
    return None if outer is None else outer + ((count, step),)
