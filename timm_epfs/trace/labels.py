"""Labels: which entries of which dims stand or fall together.

Every dim of every tensor that a forward touches carries either ``None`` (it can't be cut: batch, image rows, logits) or
a *label*, an int array with one atom per entry. Operations pass labels on and tie atoms; once the forward has run,
atoms that are tied, directly or through others, are one unit. Ties are only written down while tracing and solved at
the end, in numpy, all at once.

Reshapes that split or merge a cuttable dim (heads, groups) are the one thing that a tie can't say: after
``view(B, N, 3, H, D)`` the entries left must form a box. Such a reshape is a ``Factor``: its axes get atoms of their
own, and the solver picks the axis along which units are cut.
"""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

__all__ = ['Labels', 'Label', 'Factor', 'Solution', 'PINNED']

Label = Optional[np.ndarray]
Tie = Tuple[np.ndarray, np.ndarray]
PINNED = 0  # the atom that stands for "never cut"


@dataclass
class Factor:
    """Entries that must be cut as a box.

    Attributes:
        boxes: Pairs (entries, axes): ``entries`` an atom array of shape (a, b, …), ``axes`` one label a dim.
        choices: Alternatives, the preferred first: the axis of each box along which units are cut, and their kind.
    """
    boxes: List[Tuple[np.ndarray, Tuple[np.ndarray, ...]]]
    choices: List[Tuple[Tuple[int, ...], str]]


@dataclass
class Solution:
    """What the ties amount to.

    Attributes:
        unit: Representative atom of each atom's unit, shape (atoms,).
        pinned: True for each atom whose unit can't be cut, shape (atoms,).
        kinds: Kind of a unit by its representative, where it isn't plain channels.
    """
    unit: np.ndarray
    pinned: np.ndarray
    kinds: Dict[int, str] = field(default_factory=dict)


class Labels:
    """The atoms of one trace and everything that is known about them.

    Args:
        whole_heads: Cut attention by whole heads where that can be; otherwise by the dims of all heads of a layer.
    """

    def __init__(self, whole_heads: bool = True):
        self.size = 1  # atom 0 is PINNED
        self.whole_heads = whole_heads
        self._ties: List[Tie] = []
        self._pins: List[np.ndarray] = []
        self._batched: List[np.ndarray] = []
        self._inexact: List[Tuple[np.ndarray, str]] = []
        self._residual: List[np.ndarray] = []
        self._equal: List[Tie] = []
        self._factors: List[Factor] = []
        self._axes: Dict[Tuple, Tuple[np.ndarray, ...]] = {}
        self._merged: Dict[Tuple, np.ndarray] = {}

    def fresh(self, n: int) -> Label:
        """A label of ``n`` new atoms; a dim of one entry can't be cut and gets none."""
        return self.atoms(n) if n > 1 else None

    def atoms(self, n: int) -> np.ndarray:
        """``n`` new atoms, also for ``n`` of 0 and 1: parts of a dim that is put together."""
        start, self.size = self.size, self.size + n
        return np.arange(start, self.size, dtype=np.int64)

    def tie(self, a: Label, b: Label) -> Label:
        """Same entries in both; a label tied to ``None`` is pinned. Returns the label to go on with."""
        if a is None or b is None:
            self.pin(a)
            self.pin(b)
            return None
        if a is not b and not np.array_equal(a, b):
            self._ties.append((a.ravel(), b.ravel()))
        return a

    def tie_counts(self, a: np.ndarray, b: np.ndarray) -> None:
        """As many entries stay in one as in the other. Which goes with which is chosen last: whole units together."""
        if a is not b and not np.array_equal(a, b):
            self._equal.append((a.ravel(), b.ravel()))

    def pin(self, label: Label) -> None:
        """These atoms stay, whatever is cut."""
        if label is not None:
            self._pins.append(label.ravel())

    def mark_inexact(self, label: Label, reason: str) -> None:
        """Cutting these atoms changes what the others compute, for ``reason``."""
        if label is not None:
            self._inexact.append((label.ravel(), reason))

    def mark_batched(self, label: Label) -> None:
        """This dim is the batch of a product of two activations: the way attention treats its heads."""
        if label is not None:
            self._batched.append(label)

    def mark_residual(self, label: Label) -> None:
        """Two activations are added here: part of a residual stream."""
        if label is not None:
            self._residual.append(label.ravel())

    def add_factor(self, factor: Factor) -> None:
        """A dim was reshaped: the units left of it must form a box."""
        self._factors.append(factor)

    def split(self, entries: np.ndarray) -> List[Label]:
        """Labels of the axes of a dim that was reshaped to ``entries.shape``.

        An axis along which the entries don't vary is free of them (``None``); if only one varies it takes them over.
        """
        out: List[Label] = [None] * entries.ndim
        vary = [
            axis for axis in range(entries.ndim)
            if entries.shape[axis] > 1 and (entries != entries.take([0], axis=axis)).any()
        ]
        core = entries[tuple(slice(None) if axis in vary else 0 for axis in range(entries.ndim))]
        if len(vary) == 1:
            out[vary[0]] = np.ascontiguousarray(core)
        elif len(vary) > 1:
            for axis, label in zip(vary, self._split_axes(core)):
                out[axis] = label
        return out

    def _split_axes(self, core: np.ndarray) -> Tuple[np.ndarray, ...]:
        key = (core.shape, core.tobytes())
        if key not in self._axes:
            axes = tuple(self.fresh(n) for n in core.shape)
            self._axes[key] = axes
            choices = sorted(range(core.ndim), key=lambda axis: -core.shape[axis])
            self.add_factor(Factor([(core, axes)], [((axis,), 'channels') for axis in choices]))
        return self._axes[key]

    def merge(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Entries of a dim made by merging labelled axes, shape (len(axes[0]), len(axes[1]), …)."""
        key = tuple(axis.tobytes() for axis in axes)
        if key not in self._merged:
            shape = tuple(len(axis) for axis in axes)
            entries = self.fresh(int(np.prod(shape))).reshape(shape)
            self._merged[key] = entries
            choices = sorted(range(len(axes)), key=lambda axis: -shape[axis])
            self.add_factor(Factor([(entries, tuple(axes))], [((axis,), 'channels') for axis in choices]))
        return self._merged[key]

    def solve(self, extra_pins: Sequence[np.ndarray] = ()) -> Solution:
        """Solve the ties: first without the factors, then with one axis chosen for each, until the choices hold."""
        base = _components(np.arange(self.size, dtype=np.int64), self._ties)
        pins = np.concatenate([np.array([PINNED]), *self._pins, *extra_pins])
        pinned = _spread(base, pins)
        banned: List[set] = [set() for _ in self._factors]
        batched = _spread(base, np.concatenate([np.array([PINNED]), *self._batched]))
        batched &= base != base[PINNED]
        while True:
            chosen = [
                _choose(factor, ban, pinned, batched, self.whole_heads) for factor, ban in zip(self._factors, banned)
            ]
            factor_pins = [pins]
            edges = []
            for factor, choice in zip(self._factors, chosen):
                _constrain(factor, choice, edges, factor_pins)
            unit = _components(base.copy(), edges)
            if self._equal:
                unit = _components(base.copy(), edges + _pair_units(unit, self._equal))
            now_pinned = _spread(unit, np.concatenate(factor_pins))
            broken = [
                i for i, (factor, choice) in enumerate(zip(self._factors, chosen))
                if choice is not None and any(
                    now_pinned[axes[axis]].any() for (_, axes), axis in zip(factor.boxes, factor.choices[choice][0])
                )
            ]
            if not broken:
                break
            for i in broken:
                banned[i].add(chosen[i])
        return Solution(unit, now_pinned, _kinds(self._factors, chosen, unit, batched))

    def residual(self, solution: Solution) -> np.ndarray:
        """True for each atom whose unit is part of a residual stream, shape (atoms,)."""
        return _spread(solution.unit, np.concatenate([np.array([PINNED]), *self._residual]))

    def reasons(self, solution: Solution) -> Dict[int, List[str]]:
        """Why units can't be cut exactly, by representative atom."""
        out: Dict[int, List[str]] = {}
        for atoms, reason in self._inexact:
            for u in np.unique(solution.unit[atoms]):
                known = out.setdefault(int(u), [])
                if reason not in known:
                    known.append(reason)
        return out


def _choose(factor: Factor, banned: set, pinned: np.ndarray, batched: np.ndarray, whole_heads: bool) -> Optional[int]:
    """The first choice whose axes are free, an axis that attention treats as heads before or after any other."""
    free = [
        i for i, (which, _) in enumerate(factor.choices)
        if i not in banned and not any(pinned[axes[axis]].any() for (_, axes), axis in zip(factor.boxes, which))
    ]
    heads = [
        i for i in free
        if all(batched[axes[axis]].all() for (_, axes), axis in zip(factor.boxes, factor.choices[i][0]))
    ]
    others = [i for i in free if i not in heads]
    return ((heads + others if whole_heads else others + heads) or [None])[0]


def _kinds(
        factors: Sequence[Factor],
        chosen: Sequence[Optional[int]],
        unit: np.ndarray,
        batched: np.ndarray,
) -> Dict[int, str]:
    """Kinds of the units that factors are cut along, by representative, where they aren't plain channels."""
    kinds: Dict[int, str] = {}
    for factor, choice in zip(factors, chosen):
        which, kind = factor.choices[choice] if choice is not None else ((), '')
        for (_, axes), axis in zip(factor.boxes, which):
            name = kind
            if kind == 'channels' and any(batched[label].all() for label in axes):
                name = 'heads' if batched[axes[axis]].all() else 'head_dims'
            for u in np.unique(unit[axes[axis]]).tolist() if name != 'channels' else ():
                if kinds.get(u) not in ('heads', 'head_dims'):
                    kinds[u] = name
    return kinds


def _constrain(factor: Factor, choice: Optional[int], edges: List, pins: List[np.ndarray]) -> None:
    for box, (entries, axes) in enumerate(factor.boxes):
        active = None if choice is None else factor.choices[choice][0][box]
        for axis, label in enumerate(axes):
            if axis == active:
                rows = np.moveaxis(entries, axis, 0).reshape(len(label), -1)
                edges.append((rows.ravel(), np.repeat(label, rows.shape[1])))
            else:
                pins.append(label)
        if active is None:
            pins.append(entries.ravel())


def _pair_units(unit: np.ndarray, equal: Sequence[Tie]) -> List[Tie]:
    """Ties that keep two counts equal, in the order of the units, so that a unit of several entries meets one such."""
    return [(a[np.argsort(unit[a], kind='stable')], b[np.argsort(unit[b], kind='stable')]) for a, b in equal]


def _spread(unit: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """True for every atom whose unit holds one of ``atoms``."""
    hit = np.zeros(len(unit), dtype=bool)
    hit[unit[atoms]] = True
    return hit[unit]


def _components(unit: np.ndarray, ties: Sequence[Tie]) -> np.ndarray:
    """Hook the larger of two roots under the smaller and halve the paths, until every tie is inside one unit."""
    if not ties:
        return unit
    a = np.concatenate([left for left, _ in ties])
    b = np.concatenate([right for _, right in ties])
    while True:
        a, b = unit[a], unit[b]
        open_ = a != b
        if not open_.any():
            return unit
        a, b = a[open_], b[open_]
        np.minimum.at(unit, np.maximum(a, b), np.minimum(a, b))
        while True:
            shorter = unit[unit]
            if np.array_equal(shorter, unit):
                break
            unit = shorter
