"""Index arrays as short text: ranges such as ``0-5,8,10-63`` and strided maps such as ``0 + 64u + 3x384 + 64x1``.

Text is read in two steps, because it is untrusted: parsing gives the number of entries and the largest one
without allocating them, and only then, once the caller has accepted both, ``array()`` does.
"""
import re
from dataclasses import dataclass
from math import prod
from typing import Optional, Tuple

import numpy as np

__all__ = ['Ranges', 'Strided']

# What a list of ranges can't contain. Searching for it takes less memory than matching millions of ranges.
_NO_RANGE = r"""
    ^$ | [^0-9,-]                    # nothing, or another character
    | [0-9]{10}                      # a number too large
    | ^[,-] | [,-][,-] | [,-]$       # a separator without numbers on both sides
    | -[0-9]+-                       # three numbers in a run
"""
_STRIDED = r'(\d{1,9})(?: \+ (\d{1,9})u)?((?: \+ \d{1,9}x\d{1,9}){0,8})'


@dataclass(frozen=True, eq=False)
class Ranges:
    """A flat index array as runs of consecutive values, in order.

    >>> runs = Ranges.find(np.array([0, 1, 2, 3, 8, 10, 11]))
    >>> str(runs)
    '0-3,8,10-11'
    >>> runs.starts, runs.stops
    (array([ 0,  8, 10]), array([ 3,  8, 11]))

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
        wrong = re.search(_NO_RANGE, text, re.VERBOSE)
        if wrong:
            start = text.rfind(',', 0, wrong.start() + 1) + 1 if wrong.start() else 0  # quote from the last comma on
            raise ValueError(f'{text[start:start + 40].partition(",")[0]!r} is not a range; write 0-5,8,10-63')
        # '0-5,8,10-63' has the numbers 0 5 8 10 63 with '-' ',' ',' '-' between them: a number after '-' ends a run.
        numbers = np.fromstring(text.replace('-', ','), dtype=np.int64, sep=',')
        between = text.encode().translate(None, b'0123456789')
        ends = np.frombuffer(b',' + between, dtype=np.uint8) == ord('-')
        starts = numbers[~ends]
        stops = starts.copy()
        stops[np.cumsum(~ends)[ends] - 1] = numbers[ends]
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
        """The values, shape (entries,), int64.

        >>> Ranges.parse('0-3,8,10-11').array()
        array([ 0,  1,  2,  3,  8, 10, 11])
        """
        # Entry i of the array is i, moved by how far its run is from where it would be without gaps:
        # 0-3,8,10-11 are 0 1 2 3 | 4 | 5 6, moved by 0 0 0 0 | 4 | 5 5.
        lengths = self.stops - self.starts + 1
        without_gaps = np.cumsum(lengths) - lengths
        return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(self.starts - without_gaps, lengths)

    def __str__(self) -> str:
        runs = np.stack([self.starts, self.stops], axis=1).tolist()
        return ','.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)


@dataclass(frozen=True)
class Strided:
    """An index map with a regular layout: unit ``u`` owns ``offset + u * stride`` plus every sum of inner steps.

    In a fused projection of two heads of size 2, the four rows of the queries come first, then those of the keys and of
    the values. Head ``u`` begins at row ``2u`` and owns, three times at a distance of 4 (``3x4``), two rows (``2x1``):

    >>> heads = np.array([[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]])
    >>> str(Strided.find(heads))
    '0 + 2u + 3x4 + 2x1'
    >>> bool((Strided.parse('0 + 2u + 3x4 + 2x1', units=2).array() == heads).all())
    True

    Attributes:
        units: Number of rows of the map.
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
            ValueError: The text is not such a layout, or its entries don't ascend.
        """
        match = re.fullmatch(_STRIDED, text, re.ASCII)
        if not match:
            raise ValueError(f'{text[:40]!r} is not an index map; write 0 + 64u + 3x384')
        inner = tuple(tuple(map(int, pair.split('x'))) for pair in match[3].split(' + ')[1:])
        span = 0
        for count, step in reversed(inner):
            if count < 2 or step <= span:
                raise ValueError(f'{text[:40]!r} does not ascend; list steps from large to small, as in 3x384 + 64x1')
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
    """Write an ascending row that starts at 0 as sums of steps, the largest step first; None where it isn't one.

    >>> _factor(np.array([0, 1, 2, 8, 9, 10]))  # 2x8 + 3x1
    ((2, 8), (3, 1))
    """
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
