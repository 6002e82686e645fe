"""Labels: which entries of which dims must be cut together.

Each dim of each tensor in a forward carries either ``None`` (it can't be cut: batch, rows of an image, logits) or a
*label*: an int array with the *node* of each entry. Operations pass labels on and tie nodes to each other. Nodes that
are tied, directly or through others, are one unit: a connected component, found by union-find once the forward is over.

A tie can't express a reshape that splits or merges a dim, as ``view(B, N, 3, H, D)`` does. That is what ``Reshape``
is for.
"""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from .components import Edges, components, in_component_of
from .reshapes import Grid, Reshape

__all__ = ['PINNED', 'Label', 'Labels', 'Solution']

Label = Optional[np.ndarray]
PINNED = 0  # the node of all entries that always stay


@dataclass(frozen=True)
class Solution:
    """The units.

    Attributes:
        unit: The smallest node of each node's unit, by which the unit is known, shape (nodes,).
        pinned: Whether each node's unit must stay, shape (nodes,).
        kinds: Kind of a unit, by its smallest node, where it isn't plain channels.
    """
    unit: np.ndarray
    pinned: np.ndarray
    kinds: Dict[int, str] = field(default_factory=dict)


class Labels:
    """The nodes of one trace and everything that is known about them.

    >>> labels = Labels()
    >>> a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(6)  # nodes 1 to 3, 4 to 6, 7 to 12
    >>> _ = labels.tie(a, b)                                         # as x + y does
    >>> labels.pin(c)                                                # as returning a tensor does
    >>> solution = labels.solve()
    >>> solution.unit[a], solution.unit[b]
    (array([1, 2, 3]), array([1, 2, 3]))
    >>> solution.pinned[c].all()
    np.True_

    Args:
        whole_heads: Cut whole attention heads where possible; otherwise, the same dims of all heads of a layer.

    Attributes:
        size: Number of nodes. The first is ``PINNED``.
        among_weights: Whether the operation that is running computes a weight from others.
        source: What is running and may pin: a number.
    """

    def __init__(self, whole_heads: bool = True):
        self.size = 1
        self.whole_heads = whole_heads
        self.among_weights = False
        self.source = 0
        self._ties: List[Edges] = []
        self._ties_among_weights: List[Edges] = []
        self._pins: List[np.ndarray] = [np.array([PINNED])]
        self._sources: List[int] = []  # of each pin but the first
        self._equal_counts: List[Edges] = []
        self._reshapes: List[Reshape] = []
        self._heads: List[np.ndarray] = []
        self._residual: List[np.ndarray] = []
        self._inexact: List[Tuple[np.ndarray, str]] = []
        self._split: Dict[Tuple, Tuple[np.ndarray, ...]] = {}
        self._merged: Dict[Tuple, np.ndarray] = {}

    # -- what rules call --------------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Label:
        """A label of ``n`` new nodes. A dim of one entry can't be cut and gets none."""
        return self.new_nodes(n) if n > 1 else None

    def new_nodes(self, n: int) -> np.ndarray:
        """``n`` new nodes, also where ``n`` is 0 or 1: for a part of a dim."""
        start, self.size = self.size, self.size + n
        return np.arange(start, self.size, dtype=np.int64)

    def tie(self, a: Label, b: Label) -> Label:
        """Cut both dims in the same places; if one is ``None``, pin the other. Returns the label of what follows."""
        if a is None or b is None:
            self.pin(a)
            self.pin(b)
            return None
        if a is not b and not np.array_equal(a, b):
            self._ties.append((a.ravel(), b.ravel()))
            if self.among_weights:
                self._ties_among_weights.append(self._ties[-1])
        return a

    def tie_counts(self, a: np.ndarray, b: np.ndarray) -> None:
        """Cut as many entries of one as of the other, no matter which."""
        if a is not b and not np.array_equal(a, b):
            self._equal_counts.append((a.ravel(), b.ravel()))

    def pin(self, label: Label) -> None:
        """Cut none of these entries."""
        if label is not None:
            self._pins.append(label.ravel())
            self._sources.append(self.source)

    def mark_inexact(self, label: Label, reason: str) -> None:
        """Cutting one of these entries changes what the others compute, for ``reason``."""
        if label is not None:
            self._inexact.append((label.ravel(), reason))

    def mark_heads(self, label: Label) -> None:
        """This dim is the batch of a product of two activations, which is what attention does with its heads."""
        if label is not None:
            self._heads.append(label)

    def mark_residual(self, label: Label) -> None:
        """Two activations are added: these entries are part of a residual stream."""
        if label is not None:
            self._residual.append(label.ravel())

    def add_reshape(self, reshape: Reshape) -> None:
        """A dim was split or merged: what stays of it must be a box."""
        self._reshapes.append(reshape)

    def split(self, nodes: np.ndarray) -> List[Label]:
        """Labels of the dims that one dim was split into.

        Nodes that don't vary along an axis say nothing about it: its label is ``None``. If they vary along a single
        axis, they are its label.

        Args:
            nodes: The label of the dim, in the shape of the new ones.
        """
        out: List[Label] = [None] * nodes.ndim
        vary = [
            axis for axis in range(nodes.ndim)
            if nodes.shape[axis] > 1 and (nodes != nodes.take([0], axis=axis)).any()
        ]
        core = nodes[tuple(slice(None) if axis in vary else 0 for axis in range(nodes.ndim))]
        if len(vary) == 1:
            out[vary[0]] = np.ascontiguousarray(core)
        elif len(vary) > 1:
            for axis, label in zip(vary, self._split_axes(core)):
                out[axis] = label
        return out

    def _split_axes(self, core: np.ndarray) -> Tuple[np.ndarray, ...]:
        key = (core.shape, core.tobytes())
        if key not in self._split:
            self._split[key] = tuple(self.new_nodes(n) for n in core.shape)
            self.add_reshape(Reshape.along_longest(Grid(core, self._split[key])))
        return self._split[key]

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Nodes of a dim that labelled dims were merged into, shape (len(axes[0]), len(axes[1]), …)."""
        key = tuple(axis.tobytes() for axis in axes)
        if key not in self._merged:
            shape = [len(axis) for axis in axes]
            self._merged[key] = self.new_nodes(int(np.prod(shape))).reshape(shape)
            self.add_reshape(Reshape.along_longest(Grid(self._merged[key], tuple(axes))))
        return self._merged[key]

    # -- solving ----------------------------------------------------------------------------------------------------

    def solve(self, extra_pins: Sequence[np.ndarray] = ()) -> Solution:
        """Find the units.

        Without reshapes, this would be union-find over the ties. Each reshape adds a question: along which axis is it
        cut? The answer to one can rule out an answer to another, since an axis that isn't cut is pinned, and so is
        everything that is tied to it. So:

        1. For each reshape, choose the first axis that is neither pinned nor banned. If there is none, pin all of it.
        2. Unite the nodes that are tied or that the choices tie. Pin each unit that has a pinned node.
        3. Where the axis of a choice is pinned now, the choice was impossible. Ban it and start again at 1.

        Each round bans a choice, so this ends. A ban is never lifted: more may be pinned than necessary, never less.

        >>> labels = Labels()
        >>> channels = labels.fresh(6)
        >>> rows, columns = labels.split(channels.reshape(2, 3))
        >>> labels.solve().unit[channels]          # by columns, since there are more of them
        array([1, 2, 3, 1, 2, 3])
        >>> labels.pin(columns[:1])                # one column must stay: by rows
        >>> labels.solve().unit[channels]
        array([1, 1, 1, 4, 4, 4])
        >>> labels.pin(rows)                       # both lengths must stay
        >>> labels.solve().pinned[channels].all()
        np.True_

        Args:
            extra_pins: Labels to pin besides those that operations pinned.
        """
        tied = components(np.arange(self.size, dtype=np.int64), self._ties)
        pins = np.concatenate([*self._pins, *extra_pins])
        pinned = in_component_of(tied, pins)
        heads = self._is_head(tied)
        banned: List[Set[int]] = [set() for _ in self._reshapes]
        while True:
            choices = [
                reshape.choose(ban, pinned, heads, self.whole_heads) for reshape, ban in zip(self._reshapes, banned)
            ]
            unit, pinned_now = self._units(tied, pins, choices)
            impossible = [
                i for i, (reshape, choice) in enumerate(zip(self._reshapes, choices))
                if choice is not None and any(pinned_now[axis].any() for axis in reshape.cut_axes(choice))
            ]
            if not impossible:
                return Solution(unit, pinned_now, self._kinds(unit, choices, heads))
            for i in impossible:
                banned[i].add(choices[i])

    def _units(
            self,
            tied: np.ndarray,
            pins: np.ndarray,
            choices: Sequence[Optional[int]],
    ) -> Tuple[np.ndarray, np.ndarray]:
        """The unit of each node under these choices, and whether it is pinned."""
        ties: List[Edges] = []
        all_pins = [pins]
        for reshape, choice in zip(self._reshapes, choices):
            more_ties, more_pins = reshape.constraints(choice)
            ties += more_ties
            all_pins += more_pins
        unit = components(tied, ties)
        unit = components(unit, [_pairs(unit, a, b) for a, b in self._equal_counts])
        return unit, in_component_of(unit, np.concatenate(all_pins))

    def _is_head(self, tied: np.ndarray) -> np.ndarray:
        """Whether each node is an attention head."""
        heads = in_component_of(tied, np.concatenate([np.array([PINNED]), *self._heads]))
        return heads & (tied != tied[PINNED])

    def _kinds(self, unit: np.ndarray, choices: Sequence[Optional[int]], heads: np.ndarray) -> Dict[int, str]:
        """Kinds of units that aren't plain channels. A unit that is part of attention is named for that."""
        kinds: Dict[int, str] = {}
        for reshape, choice in zip(self._reshapes, choices):
            for label, kind in reshape.unit_kinds(choice, heads) if choice is not None else ():
                for u in np.unique(unit[label]).tolist() if kind != 'channels' else ():
                    if kinds.get(u) not in ('heads', 'head_dims'):
                        kinds[u] = kind
        return kinds

    def pinned_by(self, solution: Solution) -> Dict[int, int]:
        """What pinned each pinned unit first, by its smallest node, as far as it was pinned by ``pin``."""
        nodes = np.concatenate([np.zeros(0, dtype=np.int64), *self._pins[1:]])
        sources = np.repeat(self._sources, [len(pin) for pin in self._pins[1:]]).astype(np.int64)
        units, first = np.unique(solution.unit[nodes], return_index=True)
        return dict(zip(units.tolist(), sources[first].tolist()))

    def of_weights(self, labels: Sequence[np.ndarray]) -> np.ndarray:
        """The nodes of some labels of weights, and of what these weights were computed from, shape (nodes,)."""
        roots = components(np.arange(self.size, dtype=np.int64), self._ties_among_weights)
        return in_component_of(roots, np.concatenate([np.zeros(0, dtype=np.int64), *map(np.ravel, labels)]))

    def residual(self, solution: Solution) -> np.ndarray:
        """Whether each node's unit is part of a residual stream, shape (nodes,)."""
        return in_component_of(solution.unit, np.concatenate([np.array([PINNED]), *self._residual]))

    def reasons(self, solution: Solution) -> Dict[int, List[str]]:
        """Why units can't be cut exactly, by their smallest nodes."""
        out: Dict[int, List[str]] = {}
        for nodes, reason in self._inexact:
            for u in np.unique(solution.unit[nodes]).tolist():
                known = out.setdefault(u, [])
                if reason not in known:
                    known.append(reason)
        return out


def _pairs(unit: np.ndarray, a: np.ndarray, b: np.ndarray) -> Edges:
    """Ties that keep the counts of two labels equal: their entries are paired in the order of their units.

    With units of two entries on both sides, each is then tied to one other: (1, 2, 1, 2) and (5, 5, 6, 6) are paired
    as 1-5, 1-5, 2-6, 2-6. In the order of the entries, all four units would become one.
    """
    return a[np.argsort(unit[a], kind='stable')], b[np.argsort(unit[b], kind='stable')]
