"""Reshapes that split or merge a dim: only some cuts leave something that can still be reshaped."""
from dataclasses import dataclass
from typing import Collection, List, Optional, Sequence, Tuple

import numpy as np

from .components import Edges

__all__ = ['Choice', 'Grid', 'Reshape']


@dataclass(frozen=True)
class Grid:
    """A dim of length a·b·… that the model views as (a, b, …), or the other way round.

    Attributes:
        nodes: Node of each entry of the long dim, shape (a, b, …).
        axes: Labels of the short dims, of lengths a, b, ….
    """
    nodes: np.ndarray
    axes: Tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Choice:
    """One way to cut the grids of a reshape.

    Attributes:
        axes: For each grid, the axis along which it is cut.
        kind: Kind of the units, ``'channels'`` or ``'groups'``.
    """
    axes: Tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Reshape:
    """Grids that are cut together, each along one axis.

    Suppose a model views 6 channels as (2, 3). If channel 1 alone were cut, 5 would be left, and no view has 5
    entries in two equal rows. What stays must be a *box*: the same columns in every row. So whole columns are cut,
    channels 1 and 4 together, or else whole rows::

        0 1 2                 0 . 2                     . . .
        3 4 5    column 1:    3 . 5    or row 0:        3 4 5

    A choice of axis 1 says that both entries of column 1 are tied to the node that the second axis has there, and that
    the first axis keeps its length.

    Attributes:
        grids: One grid or more.
        choices: Ways to cut them, the preferred one first.
    """
    grids: Sequence[Grid]
    choices: Sequence[Choice]

    @classmethod
    def along_longest(cls, grid: Grid) -> 'Reshape':
        """One grid that is cut along its longest axis where that is possible."""
        lengths = grid.nodes.shape
        axes = sorted(range(len(lengths)), key=lambda axis: -lengths[axis])
        return cls([grid], [Choice((axis,), 'channels') for axis in axes])

    @classmethod
    def in_groups(cls, grids: Sequence[Grid], whole_groups: bool) -> 'Reshape':
        """Grids of shape (groups, channels of a group).

        Args:
            grids: The grids; their first axes are the same.
            whole_groups: Prefer to cut whole groups to cutting the same channels of every group.
        """
        whole = Choice((0,) * len(grids), 'groups')
        within = Choice((1,) * len(grids), 'channels')
        return cls(grids, [whole, within] if whole_groups else [within, whole])

    def cut_axes(self, choice: int) -> List[np.ndarray]:
        """Labels of the axes that a choice cuts, one for each grid."""
        return [grid.axes[axis] for grid, axis in zip(self.grids, self.choices[choice].axes)]

    def choose(
            self,
            banned: Collection[int],
            pinned: np.ndarray,
            heads: np.ndarray,
            whole_heads: bool,
    ) -> Optional[int]:
        """The first choice that is possible; those that cut attention heads go before all others, or after them.

        Args:
            banned: Choices that turned out to be impossible.
            pinned: Whether each node is pinned.
            heads: Whether each node is an attention head.
            whole_heads: Whether cutting heads is preferred.

        Returns:
            The number of the choice; None if none is possible.
        """
        possible = [
            choice for choice in range(len(self.choices))
            if choice not in banned and not any(pinned[axis].any() for axis in self.cut_axes(choice))
        ]

        def last(choice: int) -> bool:
            return all(heads[axis].all() for axis in self.cut_axes(choice)) != whole_heads

        return min(possible, key=last, default=None)  # the first of those that are equally good

    def constraints(self, choice: Optional[int]) -> Tuple[List[Edges], List[np.ndarray]]:
        """What follows from a choice.

        Args:
            choice: Its number; None to cut none of the grids.

        Returns:
            ties: Each slice across the chosen axis, tied to the axis's node there.
            pins: Labels of the axes that keep their length, and of whole grids that stay.
        """
        ties, pins = [], []
        for number, grid in enumerate(self.grids):
            cut = None if choice is None else self.choices[choice].axes[number]
            pins += [label for axis, label in enumerate(grid.axes) if axis != cut]
            if cut is None:
                pins.append(grid.nodes.ravel())
            else:
                label = grid.axes[cut]
                slices = np.moveaxis(grid.nodes, cut, 0).reshape(len(label), -1)
                ties.append((slices.ravel(), np.repeat(label, slices.shape[1])))
        return ties, pins

    def unit_kinds(self, choice: int, heads: np.ndarray) -> List[Tuple[np.ndarray, str]]:
        """The label of each axis that a choice cuts, and the kind of its units.

        Args:
            choice: Its number.
            heads: Whether each node is an attention head.
        """
        kinds = []
        for grid, cut in zip(self.grids, self.cut_axes(choice)):
            kind = self.choices[choice].kind
            if kind == 'channels' and any(heads[label].all() for label in grid.axes):
                kind = 'heads' if heads[cut].all() else 'head_dims'
            kinds.append((cut, kind))
        return kinds
