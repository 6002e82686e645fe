"""From solved labels to structures, costs and attributes."""
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..core import CostModel, Member, Size, Structure
from .calls import Call
from .labels import Label, Solution
from .recorder import Recorder

__all__ = ['Blueprint', 'build', 'calls']


@dataclass
class _Dim:
    """One dim of one parameter, by unit: ``unit[i]`` is the representative of entry ``i``, -1 where it's pinned."""
    tensor: str
    dim: int
    unit: np.ndarray


@dataclass
class Blueprint:
    """Structures and what else follows from the counts of their units.

    Attributes:
        structures: What can be cut, in the order of the model's parameters.
        cost: The cost model.
        attributes: Sizes of the integer attributes that follow, by path.
        conflicts: Labels that would need one attribute to have two values: to be pinned.
    """
    structures: Tuple[Structure, ...]
    cost: CostModel
    attributes: Dict[str, Size]
    conflicts: List[np.ndarray]
    sizer: 'Sizer'


def build(rec: Recorder, solution: Solution) -> Blueprint:
    """Put together what a trace recorded and what its ties came to."""
    dims = _parameter_dims(rec, solution)
    groups = _by_signature(dims, _activation_labels(rec), solution)
    members = _members(rec, dims, groups, solution)
    # What no layer makes is a constant that layers read, or a vector of its own: nothing to cut.
    made = [any(m.role == 'out' and m.tensor in rec.parameters for m in found) for found in members]
    groups = [units for units, is_made in zip(groups, made) if is_made]
    members = [found for found, is_made in zip(members, made) if is_made]
    whole = _blocks(rec)
    structures = _name(whole + _structures(rec, groups, members, solution))
    structures = structures[len(whole):] + structures[:len(whole)]
    sizer = Sizer(solution, structures, groups)
    attributes, conflicts = _attributes(rec, sizer)
    return Blueprint(structures, _cost(rec, structures, sizer), attributes, conflicts, sizer)


def _parameter_dims(rec: Recorder, solution: Solution) -> List[_Dim]:
    free = np.where(solution.pinned, -1, solution.unit)
    return [
        _Dim(name, d, free[label])
        for name, (_, labels) in rec.params.items() for d, label in enumerate(labels)
        if label is not None and (free[label] >= 0).any()
    ]


def _activation_labels(rec: Recorder) -> Iterable[np.ndarray]:
    for product in rec.products:
        yield from (label for _, label in (*product.dims, *product.written) if label is not None)
    for attribute in rec.follower.attributes.values():
        yield from (label for label, _ in attribute.seen if label is not None)


def _by_signature(dims: Sequence[_Dim], labels: Iterable[np.ndarray], solution: Solution) -> List[np.ndarray]:
    """Units that own as many entries of the same dims, each group ordered as in the first parameter it's in."""
    hashes = np.zeros(len(solution.unit), dtype=np.uint64)
    first = np.full(len(solution.unit), np.iinfo(np.int64).max)
    position = 0
    for number, dim in enumerate(dims):
        at = np.flatnonzero(dim.unit >= 0)
        _mix(hashes, dim.unit[at], number + 1)
        np.minimum.at(first, dim.unit[at], position + at)
        position += len(dim.unit)
    units = np.flatnonzero(hashes)
    seen = set()
    for number, label in enumerate(labels):
        if (id(label)) not in seen:
            seen.add(id(label))
            at = label[~solution.pinned[label]]
            _mix(hashes, solution.unit[at], len(dims) + 1 + number)
    units = units[np.argsort(first[units], kind='stable')]
    groups: Dict[int, List[int]] = {}
    for u, key in zip(units.tolist(), hashes[units].tolist()):
        groups.setdefault(key, []).append(u)
    return [np.array(group) for group in groups.values() if len(group) > 1]


def _mix(hashes: np.ndarray, units: np.ndarray, number: int) -> None:
    """Fold 'this unit owns so many entries here' into the hash of each unit (splitmix64)."""
    if not len(units):
        return
    owners, counts = np.unique(units, return_counts=True)
    with np.errstate(over='ignore'):
        x = hashes[owners] ^ (np.uint64(number) * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashes[owners] = (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _members(
        rec: Recorder,
        dims: Sequence[_Dim],
        groups: Sequence[np.ndarray],
        solution: Solution,
) -> List[Tuple[Member, ...]]:
    """Members of each group of units, in the order of the dims."""
    group = np.full(len(solution.unit), -1, dtype=np.int64)
    rank = np.zeros(len(solution.unit), dtype=np.int64)
    for number, units in enumerate(groups):
        group[units] = number
        rank[units] = np.arange(len(units))
    inputs = np.zeros(rec.labels.size, dtype=bool)
    for label in rec.inputs_of_products:
        inputs[label] = True

    members: List[List[Member]] = [[] for _ in groups]
    for dim in dims:
        owner = np.where(dim.unit >= 0, group[dim.unit], -1)
        order = np.lexsort((rank[dim.unit], owner))
        numbers, starts = np.unique(owner[order], return_index=True)
        length = len(owner) if (owner < 0).any() else None
        for number, at in zip(numbers.tolist(), np.split(order, starts[1:])):
            if number >= 0:
                index = at.reshape(len(groups[number]), -1)
                members[number].append(Member(dim.tensor, dim.dim, _role(rec, dim, inputs), index, length))
    return [tuple(found) for found in members]


def _structures(
        rec: Recorder,
        groups: Sequence[np.ndarray],
        members: Sequence[Tuple[Member, ...]],
        solution: Solution,
) -> List[Structure]:
    reasons = rec.labels.reasons(solution)
    residual = rec.labels.residual(solution)
    structures = []
    for units, found in zip(groups, members):
        why = sorted({reason for u in units.tolist() for reason in reasons.get(u, ())})
        structures.append(Structure(
            '',
            solution.kinds.get(int(units[0]), 'channels'),
            len(units),
            found,
            exact=not why,
            reason='; '.join(why),
            stream=bool(residual[units].any()) and 'normalised over the channels' in why,
        ))
    return structures


def _blocks(rec: Recorder) -> List[Structure]:
    """One structure of one unit a block; its members are what a mask on the block's branches would scale."""
    found = []
    for block in rec.blocks:
        members = tuple(
            Member(name, 0, 'out', np.arange(rec.parameters[name].shape[0])[None]) for name in block.last
        )
        found.append(Structure(block.module, 'blocks', 1, members, shortcut=block.shortcut))
    return found


def _role(rec: Recorder, dim: _Dim, inputs: np.ndarray) -> str:
    tensor, labels = rec.params[dim.tensor]
    if tensor.ndim < 2:
        return 'per'
    if inputs[labels[dim.dim]].any():
        return 'in'
    others = [label for d, label in enumerate(labels) if d != dim.dim and label is not None]
    contracted = any(inputs[label].any() for label in others)
    return 'out' if contracted or dim.tensor.endswith('weight') else 'per'


def _name(structures: Sequence[Structure]) -> Tuple[Structure, ...]:
    """A structure is named for the first module that makes its units; a block is that module."""
    used = {s.name: 1 for s in structures if s.kind == 'blocks'}
    named = []
    for s in structures:
        if s.kind == 'blocks':
            named.append(s)
            continue
        maker = next((m for m in s.members if m.role == 'out'), s.members[0])
        name = maker.tensor.rpartition('.')[0] or maker.tensor
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f'{name}#{used[name]}'
        named.append(replace(s, name=name))
    return tuple(named)


class Sizer:
    """Lengths of labels as functions of the counts."""

    def __init__(self, solution: Solution, structures: Sequence[Structure], groups: Sequence[np.ndarray]):
        self._names = [s.name for s in structures]
        self._structure = np.full(len(solution.unit), -1, dtype=np.int64)
        for i, units in enumerate(groups):
            self._structure[units] = i
        self._structure = np.where(solution.pinned, -1, self._structure[solution.unit])
        self._units = [len(units) for units in groups]
        self._cache: Dict[int, Tuple[np.ndarray, Size]] = {}

    def __call__(self, n: int, label: Label) -> Size:
        """The size of a dim of dense length ``n``; a dim without a label is never cut."""
        if label is None:
            return Size(n)
        if id(label) not in self._cache:  # the label is kept with its size: its id stays taken
            owner = self._structure[label]
            which, counts = np.unique(owner[owner >= 0], return_counts=True)
            coefs = tuple((self._names[i], int(c) // self._units[i]) for i, c in zip(which.tolist(), counts))
            self._cache[id(label)] = (label, Size(int((owner < 0).sum()), coefs))
        return self._cache[id(label)][1]

    def lengths(self, left: Mapping[str, int]) -> Callable[[int, Label], int]:
        """(dense length, label) → length, at the given numbers of units left."""
        known: Dict[int, int] = {}

        def length(n: int, label: Label) -> int:
            if label is None:
                return n
            if id(label) not in known:
                known[id(label)] = self(n, label)(left)
            return known[id(label)]
        return length


def _attributes(rec: Recorder, sizer: Sizer) -> Tuple[Dict[str, Size], List[np.ndarray]]:
    out, conflicts = {}, []
    for attribute in rec.follower.attributes.values():
        sizes = {
            Size(attribute.value) if label is None else _scaled(sizer(0, label), scale)
            for label, scale in attribute.seen
        }
        if len(sizes) > 1 or None in sizes:
            free = [label for label, _ in attribute.seen if label is not None and sizer(0, label).coefs]
            conflicts += free
        elif (size := sizes.pop()).coefs:
            out[attribute.path] = size
    return out, conflicts


def _scaled(size: Size, scale: Fraction) -> Optional[Size]:
    """The attribute's size where ``attribute · scale`` has ``size``; ``None`` if it would be no integer."""
    numbers = [Fraction(n) / scale for n in (size.const, *(coef for _, coef in size.coefs))]
    if any(n.denominator != 1 for n in numbers):
        return None
    return Size(int(numbers[0]), tuple((name, int(n)) for (name, _), n in zip(size.coefs, numbers[1:])))


class _Gates:
    """The blocks around a layer, by the modules that run it: it goes with any of them, unless it is its shortcut."""

    def __init__(self, rec: Recorder):
        self.sizes = {block.module: Size(0, ((block.module, 1),)) for block in rec.blocks}
        self.stays = {block.module: [f'{block.module}.{child}' for child in block.shortcut] for block in rec.blocks}

    def __call__(self, modules: Sequence[str]) -> Tuple[Size, ...]:
        return tuple(
            self.sizes[name] for name in modules if name in self.sizes and not set(self.stays[name]) & set(modules))


def calls(rec: Recorder, sizer: Sizer) -> Tuple[Call, ...]:
    """What the counted forward calls, with sizes in place of lengths."""
    gates = _Gates(rec)
    return tuple(
        Call(function, tuple(tuple(sizer(n, label) for n, label in dims) for dims in tensors), gates(modules))
        for function, tensors, modules in rec.calls
    )


def _cost(rec: Recorder, structures: Sequence[Structure], sizer: Sizer) -> CostModel:
    terms: List[Tuple[str, float, Tuple[Size, ...]]] = []
    gates = _Gates(rec)
    for product in rec.products:
        gate = gates(product.modules)
        terms.append(('macs', 1.0, (*(sizer(n, label) for n, label in product.dims), *gate)))
        terms.append(('activations', 1.0, (*(sizer(n, label) for n, label in product.written), *gate)))
    for name, tensor in rec.parameters.items():
        labels: List[Label] = rec.params[name][1] if name in rec.params else [None] * tensor.ndim
        gate = tuple(
            size for block, size in gates.sizes.items()
            if name.startswith(f'{block}.') and not name.startswith(tuple(f'{child}.' for child in gates.stays[block])))
        terms.append(('params', 1.0, (*(sizer(n, label) for n, label in zip(tensor.shape, labels)), *gate)))
    return CostModel([s.name for s in structures], terms)
