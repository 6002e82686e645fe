"""The grid on which a call is measured: seconds at a few of its lengths, along two axes at most."""
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np

from ..core import Size
from .kernels import Kernel

__all__ = ['Axis', 'CallGrid', 'grid_axes', 'points']

_LOWEST, _ALL = 2, 8        # eighths of the units at which a call is measured: from here on, up to all of them
_EVERY_EIGHTH = 128         # units from which on every eighth is measured, not every quarter
_STEPS = (16, 8, 4, 2)      # widths that are measured are multiples of the first of these that fits


@dataclass(frozen=True)
class Axis:
    """Lengths of a call that change together, and the points at which it is measured.

    Attributes:
        length: Where the call stands on the axis, as a function of the units left: the sum of those lengths.
        points: Units left of the structures that the lengths depend on, from the fewest to all of them.
    """
    length: Size = Size(0)
    points: Tuple[Mapping[str, int], ...] = ({},)

    @property
    def ticks(self) -> List[int]:
        """Lengths at the points, ascending."""
        return [self.length(left) for left in self.points]


@dataclass(frozen=True)
class CallGrid:
    """What one call takes, measured at every pair of points of its two axes.

    Attributes:
        axes: Two axes. One along which nothing changes has a single point.
        seconds: What was measured, shape (points of the first axis, points of the second).
        enclosing_blocks: Names of the residual blocks around the call: it runs where none of them is gone.
    """
    axes: Tuple[Axis, Axis]
    seconds: np.ndarray
    enclosing_blocks: Set[str]

    @classmethod
    def measure(
            cls,
            kernel: Kernel,
            units: Mapping[str, int],
            seconds: Callable[[Kernel, Mapping[str, int]], float],
    ) -> 'CallGrid':
        """Ask for the seconds of a call at all points of its grid.

        Fewer units never take longer, and other programs make a measurement longer, never shorter: a point at which
        more was measured than at a larger one takes the larger one's time.
        """
        measured = np.array([[seconds(kernel, left) for left in row] for row in points(kernel, units)])
        for axis in (0, 1):
            measured = np.flip(np.minimum.accumulate(np.flip(measured, axis), axis), axis)
        enclosing_blocks = {name for block in kernel.enclosing_blocks for name, _ in block.coefs}
        return cls(grid_axes(kernel, units), measured, enclosing_blocks)


def points(kernel: Kernel, units: Mapping[str, int]) -> List[List[Dict[str, int]]]:
    """Numbers of units left at which a call is measured: rows along its first axis, columns along its second.

    Args:
        kernel: The call.
        units: Units of the dense model, by name.
    """
    first, second = grid_axes(kernel, units)
    return [[{**units, **a, **b} for b in second.points] for a in first.points]


def grid_axes(kernel: Kernel, units: Mapping[str, int]) -> Tuple[Axis, Axis]:
    """The two axes along which a call is measured.

    Along one of them, all structures that its lengths depend on keep the same share of their units.
    """
    axes = []
    for lengths in _independent_lengths(kernel):
        names = sorted({name for length in lengths for name, _ in length.coefs})
        every = 1 if min(units[name] for name in names) >= _EVERY_EIGHTH else 2
        shares = [eighths / _ALL for eighths in range(_LOWEST, _ALL + 1, every)]
        lefts = [{name: _aligned(share, units[name]) for name in names} for share in shares]
        different = [left for i, left in enumerate(lefts) if left not in lefts[:i]]
        axes.append(Axis(_sum(lengths), tuple(different)))
    return tuple([*axes, Axis(), Axis()][:2])


def _aligned(share: float, units: int) -> int:
    """A share of the units, as a multiple that devices like where the structure is wide enough."""
    step = next((step for step in _STEPS if units % step == 0 and units >= 4 * step), 1)
    return max(1, round(share * units / step)) * step


def _sum(sizes: Sequence[Size]) -> Size:
    coefs: Dict[str, int] = {}
    for name, coef in (pair for size in sizes for pair in size.coefs):
        coefs[name] = coefs.get(name, 0) + coef
    return Size(sum(size.const for size in sizes), tuple(coefs.items()))


def _independent_lengths(kernel: Kernel) -> List[List[Size]]:
    """The lengths that a cut changes, those that depend on a common structure together: at most two such groups.

    A convolution has its input and its output channels. Where there are more than two (a concatenation of many
    tensors), they make one group: a grid over all of them would take too many measurements.
    """
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
