"""From solved labels to a proposal: structures, what they cost, and the integers that follow."""
from dataclasses import dataclass, replace
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..core import CostModel, Member, Size, Structure
from .blocks import Block
from .costs import build_cost
from .grouping import group_units
from .labels import Solution
from .recorder import Recorder
from .sizes import Sizer, attribute_sizes

__all__ = ['FixedDim', 'Proposal', 'build', 'fixed_dims']


@dataclass(frozen=True)
class Proposal:
    """What can be cut, if it can be verified.

    Attributes:
        structures: The structures, in the order of the model's parameters, residual blocks last.
        cost: The cost model.
        attributes: Sizes of the integer attributes that follow, by path.
        conflicts: Labels that must be pinned first, since an attribute would have to have two values, and why.
        sizer: Sizes of labels.
        blocks: The residual blocks among the structures.
        solution: The units that the structures and sizes come from.
    """
    structures: Tuple[Structure, ...]
    cost: CostModel
    attributes: Dict[str, Size]
    conflicts: List[Tuple[np.ndarray, str]]
    sizer: Sizer
    blocks: Tuple[Block, ...]
    solution: Solution


class FixedDim(NamedTuple):
    """A dim of a weight that can't be cut.

    Attributes:
        module: Name of the layer.
        units: Length of the dim.
        unit: Unit of its first entry.
        source: Number of the operation that pins it, ``RETURNED``, or None where no operation does.
    """
    module: str
    units: int
    unit: int
    source: Optional[int]


@dataclass(frozen=True)
class _Dim:
    """One dim of a parameter or buffer.

    Attributes:
        tensor: Its name.
        dim: Number of the dim.
        unit: Unit of each entry, -1 where it's pinned.
    """
    tensor: str
    dim: int
    unit: np.ndarray


def build(rec: Recorder, solution: Solution, blocks: Tuple[Block, ...]) -> Proposal:
    """Put together what was recorded, the units that its ties come to, and residual blocks."""
    free = np.where(solution.pinned, -1, solution.unit)
    dims = [
        _Dim(name, d, free[label])
        for name, (_, labels) in rec.params.items() for d, label in enumerate(labels)
        if label is not None and (free[label] >= 0).any()
    ]
    groups = group_units([dim.unit for dim in dims], (free[label] for label in _activation_labels(rec)), len(free))
    members = _members(rec, dims, groups, len(free))
    # What no layer makes is a constant that layers read, or a vector of its own: nothing to cut.
    made = [any(m.role == 'out' and m.tensor in rec.parameters for m in found) for found in members]
    groups = [units for units, is_made in zip(groups, made) if is_made]
    members = [found for found, is_made in zip(members, made) if is_made]
    structures = (
        *_named(_structures(rec, groups, members, solution), blocks),
        *(_block_structure(rec, block) for block in blocks),
    )
    sizer = Sizer(solution, structures, groups)
    attributes, conflicts = attribute_sizes(rec.follower.attributes.values(), sizer)
    cost = build_cost(rec, structures, sizer, blocks)
    return Proposal(structures, cost, attributes, conflicts, sizer, blocks, solution)


def fixed_dims(rec: Recorder, solution: Solution) -> Iterator[FixedDim]:
    """The dims of weights that layers write and that can't be cut."""
    written, sources = rec.labels.of_weights(rec.written), rec.labels.pinned_by(solution)
    for name, (_, labels) in rec.params.items():
        for label in labels if name in rec.parameters else ():
            if label is not None and written[label].all() and solution.pinned[label].all():
                owner = Member(name, 0, 'out', label).owner
                unit = int(solution.unit[label[0]])
                yield FixedDim(owner or name, len(label), unit, sources.get(unit))


def _activation_labels(rec: Recorder) -> Iterator[np.ndarray]:
    """Labels of what products compute and of the lengths that attributes hold, each once."""
    labels = [label for product in rec.products for _, label in (*product.dims, *product.written)]
    labels += [label for attribute in rec.follower.attributes.values() for label, _ in attribute.seen]
    yield from {id(label): label for label in labels if label is not None}.values()


def _members(
        rec: Recorder,
        dims: Sequence[_Dim],
        groups: Sequence[np.ndarray],
        size: int,
) -> List[Tuple[Member, ...]]:
    """Members of each group of units, in the order of the dims."""
    group = np.full(size, -1, dtype=np.int64)
    rank = np.zeros(size, dtype=np.int64)
    for number, units in enumerate(groups):
        group[units] = number
        rank[units] = np.arange(len(units))
    read, written = rec.labels.of_weights(rec.contracted), rec.labels.of_weights(rec.written)
    members: List[List[Member]] = [[] for _ in groups]
    for dim in dims:
        owner = np.where(dim.unit >= 0, group[dim.unit], -1)
        order = np.lexsort((rank[dim.unit], owner))
        numbers, starts = np.unique(owner[order], return_index=True)
        length = len(owner) if (owner < 0).any() else None
        for number, at in zip(numbers.tolist(), np.split(order, starts[1:])):
            if number >= 0:
                index = at.reshape(len(groups[number]), -1)
                members[number].append(Member(dim.tensor, dim.dim, _role(rec, dim, read, written), index, length))
    return [tuple(found) for found in members]


def _role(rec: Recorder, dim: _Dim, read: np.ndarray, written: np.ndarray) -> str:
    """What a dim is to its tensor, as in ``Member``.

    Args:
        rec: The recorder.
        dim: The dim.
        read: Whether a product sums over each node of a weight, shape (nodes,).
        written: Whether a product writes each node of a weight.
    """
    tensor, labels = rec.params[dim.tensor]
    if tensor.ndim < 2:
        return 'per'
    if read[labels[dim.dim]].any():
        return 'in'
    others = [label for d, label in enumerate(labels) if d != dim.dim and label is not None]
    is_weight = (
        written[labels[dim.dim]].any() or any(read[label].any() for label in others) or dim.tensor.endswith('weight'))
    return 'out' if is_weight else 'per'


def _structures(
        rec: Recorder,
        groups: Sequence[np.ndarray],
        members: Sequence[Tuple[Member, ...]],
        solution: Solution,
) -> List[Structure]:
    """One structure for each group, without a name yet."""
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


def _named(structures: Sequence[Structure], blocks: Sequence[Block]) -> List[Structure]:
    """The structures, each named for the first module that makes its units. Blocks have their modules' names."""
    used = {block.module: 1 for block in blocks}
    named = []
    for s in structures:
        maker = next((m for m in s.members if m.role == 'out'), s.members[0])
        name = maker.owner or maker.tensor
        used[name] = used.get(name, 0) + 1
        named.append(replace(s, name=name if used[name] == 1 else f'{name}#{used[name]}'))
    return named


def _block_structure(rec: Recorder, block: Block) -> Structure:
    """A structure of one unit, whose members are what a mask on the block's branches would scale."""
    members = tuple(Member(name, 0, 'out', np.arange(rec.parameters[name].shape[0])[None]) for name in block.last)
    return Structure(block.module, 'blocks', 1, members, shortcut=block.shortcut)
