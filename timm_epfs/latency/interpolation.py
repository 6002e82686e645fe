"""A model's latency as a function of how many units each structure keeps: the sum of its calls, from a table.

As NetAdapt (Yang et al., ECCV 2018) and HALP (Shen et al., NeurIPS 2022) do it: layers are measured at a few widths,
and widths between are interpolated, so that a search prices thousands of candidates without running any of them.
"""
import copy
from typing import Callable, Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np

from ..core import CostModel, Size, Structure
from .kernels import Kernel

__all__ = ['LatencyModel', 'points']

_LOWEST, _FINE = 2, 8       # eighths of its units, at which a structure's calls are measured: from here on, up to all
_COARSE_BELOW = 128         # units, below which quarters do
_STEPS = (16, 8, 4, 2)      # widths that are measured are multiples of one of these
_LEAST = 1e-9               # seconds of a call

Axis = Tuple[Size, List[Dict[str, int]]]


class LatencyModel:
    """Prices counts as a ``CostModel`` does, with one quantity more: ``'latency'``, in seconds a batch.

    Args:
        cost: Prices all other quantities.
        structures: What the counts are of.
        kernels: What the model runs.
        seconds: ``seconds(kernel, left)``: what one call takes where these numbers of units are left.

    Attributes:
        seconds: What was measured of each call, on the grid of its two axes, shape (calls, points, points).
    """

    def __init__(
            self,
            cost: CostModel,
            structures: Sequence[Structure],
            kernels: Sequence[Kernel],
            seconds: Callable[[Kernel, Mapping[str, int]], float],
    ):
        self.names, self._cost = cost.names, cost
        units = {s.name: s.units for s in structures}
        tables = [_table(kernel, units, seconds) for kernel in kernels]
        width = max([2, *(len(lefts) for axes, _ in tables for _, lefts in axes)])
        self._grid = np.zeros((len(tables), 2, width))
        self._cells = np.zeros((len(tables), 2), dtype=np.int64)
        self.seconds = np.zeros((len(tables), width, width))
        self._const = np.zeros((len(tables), 2))
        self._rows = np.zeros((len(tables), 2, len(self.names)))
        position = {name: i for i, name in enumerate(self.names)}
        for i, (axes, values) in enumerate(tables):
            for axis, (size, lefts) in enumerate(axes):
                ends = [size(left) for left in lefts]
                self._grid[i, axis] = [*ends, *(ends[-1] + 1 + np.arange(width - len(ends)))]
                self._cells[i, axis] = len(ends) - 2
                self._const[i, axis] = size.const
                for name, coef in size.coefs:
                    self._rows[i, axis, position[name]] += coef
            for axis in range(len(axes), 2):
                self._grid[i, axis] = np.arange(width)
            self.seconds[i] = np.pad(values, [(0, width - n) for n in values.shape], mode='edge')
        gates = [{name for gate in kernel.gates for name, _ in gate.coefs} for kernel in kernels]
        self._gated = [position[name] for name in sorted(set().union(*gates))]
        inside = [[self.names[i] in own for i in self._gated] for own in gates]
        self._inside = np.array(inside, dtype=bool).reshape(len(gates), len(self._gated))

    def with_seconds(self, seconds: np.ndarray) -> 'LatencyModel':
        other = copy.copy(self)
        other.seconds = seconds
        return other

    def __call__(self, quantity: str, counts: np.ndarray) -> float:
        """Cost at the given numbers of units left, as of ``CostModel``; of ``'latency'`` in seconds."""
        if quantity != 'latency':
            return self._cost(quantity, counts)
        return float(self.seconds_of_calls(counts).sum())

    def seconds_of_calls(self, counts: np.ndarray) -> np.ndarray:
        """Seconds of each call at the given numbers of units left, shape (calls,)."""
        return self._run(counts) * self._at(counts)[0]

    def gradient(self, quantity: str, counts: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, at the given counts, shape (len(names),)."""
        if quantity != 'latency':
            return self._cost.gradient(quantity, counts)
        seconds, slopes = self._at(counts)
        out = (self._run(counts)[:, None] * slopes).ravel() @ self._rows.reshape(-1, len(self.names))
        gone = self._inside * (1 - counts[self._gated])
        alone = gone.sum(1, keepdims=True) - gone == 0  # no other block around the call is gone
        out[self._gated] += seconds @ (self._inside & alone)
        return out

    def share(self, quantity, names, counts) -> float:
        """As of ``CostModel``, of its quantities."""
        return self._cost.share(quantity, names, counts)

    def counts(self, left: Mapping[str, int]) -> np.ndarray:
        """A count vector from a dict by name."""
        return self._cost.counts(left)

    def _run(self, counts: np.ndarray) -> np.ndarray:
        """1 for each call that runs, 0 for those in blocks that are gone, shape (calls,)."""
        return 1.0 - self._inside[:, np.asarray(counts)[self._gated] == 0].any(1)

    def _at(self, counts: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Seconds of each call, shape (calls,), and how they grow along its axes, shape (calls, 2): bilinear."""
        x = self._const + self._rows @ np.asarray(counts, dtype=np.float64)
        cell = np.clip((x[:, :, None] >= self._grid).sum(2) - 1, 0, np.maximum(self._cells, 0))
        low = np.take_along_axis(self._grid, cell[:, :, None], 2)[:, :, 0]
        high = np.take_along_axis(self._grid, cell[:, :, None] + 1, 2)[:, :, 0]
        t, width = (x - low) / (high - low), high - low
        each = np.arange(len(x))
        (a, b), (c, d) = [
            [self.seconds[each, cell[:, 0] + i, cell[:, 1] + j] for j in (0, 1)] for i in (0, 1)
        ]
        left, right = a + (b - a) * t[:, 1], c + (d - c) * t[:, 1]
        across = (b - a) + (d - c - b + a) * t[:, 0]
        seconds = left + (right - left) * t[:, 0]
        return np.maximum(seconds, _LEAST), np.stack([(right - left) / width[:, 0], across / width[:, 1]], axis=1)


def points(kernel: Kernel, units: Mapping[str, int]) -> List[List[Dict[str, int]]]:
    """Numbers of units left at which a call is measured: rows along its first axis, columns along its second.

    Args:
        kernel: The call.
        units: Units of the dense model, by name.
    """
    return _grid(_axes(kernel, units), units)


def _grid(axes: List[Axis], units: Mapping[str, int]) -> List[List[Dict[str, int]]]:
    first, second = [*(left for _, left in axes), [{}], [{}]][:2]
    return [[{**units, **a, **b} for b in second] for a in first]


def _table(kernel: Kernel, units: Mapping[str, int], seconds: Callable) -> Tuple[List[Axis], np.ndarray]:
    """Axes along which a call is measured, and its seconds at their points, shape (rows, columns)."""
    axes = _axes(kernel, units)
    values = np.array([[seconds(kernel, left) for left in row] for row in _grid(axes, units)])
    for axis in (0, 1):  # what else runs on the machine makes a call slower, never faster
        values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
    return axes, values


def _axes(kernel: Kernel, units: Mapping[str, int]) -> List[Axis]:
    """Two at most. All structures that the sizes of one depend on lose the same share; a call's place is the sum of the
    sizes."""
    axes = []
    for sizes in _independent(kernel):
        names = sorted({name for size in sizes for name, _ in size.coefs})
        step = 1 if min(units[name] for name in names) >= _COARSE_BELOW else 2
        shares = [eighths / _FINE for eighths in range(_LOWEST, _FINE + 1, step)]
        left = [{name: _aligned(share, units[name]) for name in names} for share in shares]
        total: Dict[str, int] = {}
        for name, coef in (pair for size in sizes for pair in size.coefs):
            total[name] = total.get(name, 0) + coef
        place = Size(sum(size.const for size in sizes), tuple(total.items()))
        axes.append((place, [a for i, a in enumerate(left) if a not in left[:i]]))
    return axes


def _aligned(share: float, units: int) -> int:
    step = next((step for step in _STEPS if units % step == 0 and units >= 4 * step), 1)
    return max(1, round(share * units / step)) * step


def _independent(kernel: Kernel) -> List[List[Size]]:
    """The sizes that a cut changes, those that share a structure together; all in one where there are more than two."""
    groups: List[Tuple[Set[str], List[Size]]] = []
    for size in dict.fromkeys(size for array in kernel.arrays for size in array.sizes if size.coefs):
        names, sizes = {name for name, _ in size.coefs}, [size]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, sizes = names | group[0], group[1] + sizes
        groups.append((names, sizes))
    if len(groups) > 2:
        return [[size for _, sizes in groups for size in sizes]]
    return [sizes for _, sizes in groups]
