"""A model's latency as a function of how many units each structure keeps.

A model's latency is the sum of the latencies of its calls. Each call is measured at a few sizes beforehand, the points
of a grid, and what it takes at sizes in between is interpolated. So a search prices thousands of candidates without
running any:

1. A call's axes (``call_grids.grid_axes``): its lengths that a cut changes, at most two that change independently.
2. Its grid (``call_grids.CallGrid``): seconds at every pair of points of its two axes.
3. All grids in one array (``_Grids``), which interpolates in each of them at once.
4. ``LatencyModel``: unit counts → a position in every grid → the sum over the calls that run.

NetAdapt (Yang et al., ECCV 2018) and HALP (Shen et al., NeurIPS 2022) price a search by measured layers, too.
"""
import copy
from dataclasses import dataclass, replace
from typing import Callable, Collection, Mapping, Sequence, Tuple

import numpy as np

from ..core import CostModel, PruningError, Structure
from .call_grids import CallGrid
from .kernels import Kernel

__all__ = ['LatencyModel']

_LEAST = 1e-9   # seconds of a call: below the smallest point, a straight line may fall below zero


@dataclass(frozen=True)
class _Grids:
    """The grids of all calls in one array each, with as many points along an axis as the longest axis has.

    Attributes:
        ticks: Lengths at the points of both axes, shape (calls, 2, points). Where an axis has fewer points, it goes on
            in steps of one.
        inner: The points between the first and the last of each axis, padded with infinity, shape (calls, 2,
            points - 2). The number of them that a length has reached is its cell: with points 2, 4, 6, 8 and length 5,
            ``inner`` is 4, 6, and 5 is in cell 1, from 4 to 6.
        seconds: What was measured, shape (calls, points, points). Where an axis has fewer points, its last seconds are
            repeated.
    """
    ticks: np.ndarray
    inner: np.ndarray
    seconds: np.ndarray

    def __post_init__(self):
        for array in (self.ticks, self.inner, self.seconds):
            array.flags.writeable = False

    @classmethod
    def of(cls, grids: Sequence[CallGrid]) -> '_Grids':
        width = max([2, *(n for grid in grids for n in grid.seconds.shape)])
        ticks = np.zeros((len(grids), 2, width))
        inner = np.full((len(grids), 2, width - 2), np.inf)
        seconds = np.zeros((len(grids), width, width))
        for i, grid in enumerate(grids):
            for j, axis in enumerate(grid.axes):
                own = axis.ticks
                ticks[i, j] = [*own, *(own[-1] + 1 + np.arange(width - len(own)))]
                inner[i, j, :max(0, len(own) - 2)] = own[1:-1]
            seconds[i] = np.pad(grid.seconds, [(0, width - n) for n in grid.seconds.shape], mode='edge')
        return cls(ticks, inner, seconds)

    def at(self, lengths: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Interpolate bilinearly in the cell of each grid that a call stands in.

        Its corners are the measured seconds a, b (above) and c, d (below). u is how far the call stands from the
        upper edge to the lower one, along the first axis, v how far from the left edge to the right one, along the
        second; both run from 0 to 1::

            a ── b
            │    │      seconds = (1-u) · [a + v·(b-a)] + u · [c + v·(d-c)]
            c ── d

        Args:
            lengths: Where each call stands along its two axes, shape (calls, 2). Below the first point of an axis the
                first cell is continued.

        Returns:
            Seconds of each call, shape (calls,), and how they grow with each length, shape (calls, 2).
        """
        each, both = np.arange(len(lengths)), np.arange(2)
        cell = (lengths[:, :, None] >= self.inner).sum(2)
        low, high = (self.ticks[each[:, None], both, cell + end] for end in (0, 1))
        first, second = cell.T
        (a, b), (c, d) = [[self.seconds[each, first + i, second + j] for j in (0, 1)] for i in (0, 1)]
        u, v = ((lengths - low) / (high - low)).T
        upper, lower = a + (b - a) * v, c + (d - c) * v
        across = (b - a) + (d - c - b + a) * u
        slopes = np.stack([lower - upper, across], axis=1) / (high - low)
        return np.maximum(upper + (lower - upper) * u, _LEAST), slopes


class LatencyModel:
    """Prices counts as a ``CostModel`` does, and one more quantity: ``'latency'``, in seconds per batch. Immutable.

    A linear layer from ``a`` (8 units) to ``b`` (16) inside the residual block ``c``, on a device that takes 1 ms per
    weight. It is measured at quarters of both widths; between them, at (3, 10), its time is interpolated, and it takes
    none where the block is gone:

    >>> import torch
    >>> from timm_epfs.core import Size
    >>> from timm_epfs.latency.call_grids import points
    >>> from timm_epfs.latency.kernels import Array
    >>> one, a, b, c = Size(1), *(Size(0, ((name, 1),)) for name in 'abc')
    >>> image, weight = Array((one, a), (0, 1), torch.float32), Array((b, a), (0, 1), torch.float32)
    >>> linear = Kernel('linear', torch.nn.functional.linear, (image, weight), {}, enclosing_blocks=(c,))
    >>> units = {'a': 8, 'b': 16, 'c': 1}
    >>> [[(left['a'], left['b']) for left in row] for row in points(linear, units)]  # doctest: +NORMALIZE_WHITESPACE
    [[(2, 4), (2, 8), (2, 12), (2, 16)],
     [(4, 4), (4, 8), (4, 12), (4, 16)],
     [(6, 4), (6, 8), (6, 12), (6, 16)],
     [(8, 4), (8, 8), (8, 12), (8, 16)]]

    >>> structures = [Structure(name, 'channels', units[name], ()) for name in 'abc']
    >>> model = LatencyModel(CostModel('abc', []), structures, [linear], lambda call, left: left['a'] * left['b'] / 1e3)
    >>> counts = np.array([3, 10, 1])
    >>> model('latency', counts), model.gradient('latency', counts)
    (0.03, array([0.01 , 0.003, 0.03 ]))
    >>> model('latency', np.array([3, 10, 0]))
    0.0

    Args:
        cost: Prices all other quantities.
        structures: What the counts are of.
        kernels: The calls of a forward.
        seconds: ``seconds(kernel, left)``: what one call takes where these numbers of units are left.
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
        grids = [CallGrid.measure(kernel, units, seconds) for kernel in kernels]
        self._grids = _Grids.of(grids)

        # A call's lengths are linear in the counts: const + rows @ counts.
        position = {name: i for i, name in enumerate(self.names)}
        self._const = np.array([[axis.length.const for axis in grid.axes] for grid in grids]).reshape(len(grids), 2)
        self._rows = np.zeros((len(grids), 2, len(self.names)))
        for i, grid in enumerate(grids):
            for j, axis in enumerate(grid.axes):
                for name, coef in axis.length.coefs:
                    self._rows[i, j, position[name]] += coef

        # Which blocks each call is inside of, shape (calls, blocks), and the blocks' positions in the counts.
        self._blocks = [position[name] for name in sorted(set().union(*(grid.enclosing_blocks for grid in grids)))]
        inside = [[self.names[i] in grid.enclosing_blocks for i in self._blocks] for grid in grids]
        self._inside = np.array(inside, dtype=bool).reshape(len(grids), len(self._blocks))

    @property
    def seconds(self) -> np.ndarray:
        """What was measured of each call, on its grid of two axes, shape (calls, points, points), read-only.

        Where an axis has fewer points than another call's, its last seconds are repeated.
        """
        return self._grids.seconds

    def with_seconds(self, seconds: np.ndarray) -> 'LatencyModel':
        """The same calls with other seconds: those of an earlier run.

        Raises:
            PruningError: The shape isn't that of ``seconds``: they are of another model.
        """
        seconds = np.array(seconds, dtype=np.float64)
        if seconds.shape != self.seconds.shape:
            raise PruningError(
                f'latency: measured seconds of shape {seconds.shape} were given for calls of shape '
                f'{self.seconds.shape}; give those of the same model')
        model = copy.copy(self)
        model._grids = replace(self._grids, seconds=seconds)
        return model

    def __call__(self, quantity: str, counts: np.ndarray) -> float:
        """Cost at the given numbers of units left, as of ``CostModel``; of ``'latency'`` in seconds."""
        if quantity != 'latency':
            return self._cost(quantity, counts)
        return float(self.seconds_of_calls(counts).sum())

    def seconds_of_calls(self, counts: np.ndarray) -> np.ndarray:
        """Seconds of each call at the given numbers of units left, shape (calls,)."""
        return self._runs(counts) * self._grids.at(self._lengths(counts))[0]

    def gradient(self, quantity: str, counts: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, at the given counts, shape (len(names),)."""
        if quantity != 'latency':
            return self._cost.gradient(quantity, counts)
        seconds, slopes = self._grids.at(self._lengths(counts))
        out = (self._runs(counts)[:, None] * slopes).ravel() @ self._rows.reshape(-1, len(self.names))
        # Putting a block back adds the calls inside it, except those inside another block that is gone.
        gone = self._inside * (1 - counts[self._blocks])
        no_other = gone.sum(1, keepdims=True) - gone == 0
        out[self._blocks] += seconds @ (self._inside & no_other)
        return out

    def share(self, quantity: str, names: Collection[str], counts: np.ndarray) -> float:
        """As of ``CostModel``, of its quantities."""
        return self._cost.share(quantity, names, counts)

    def counts(self, left: Mapping[str, int]) -> np.ndarray:
        """A count vector from a dict by name."""
        return self._cost.counts(left)

    def _lengths(self, counts: np.ndarray) -> np.ndarray:
        """Where each call stands along its two axes, shape (calls, 2)."""
        return self._const + self._rows @ np.asarray(counts, dtype=np.float64)

    def _runs(self, counts: np.ndarray) -> np.ndarray:
        """1 for each call that runs, 0 for those inside blocks that are gone, shape (calls,)."""
        return 1.0 - self._inside[:, np.asarray(counts)[self._blocks] == 0].any(1)
