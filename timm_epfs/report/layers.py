"""What a plan did to each layer, as rows for tables and pictures."""
from dataclasses import dataclass
from typing import List, Set, Tuple

from ..plan import Cut, Plan

__all__ = ['Layer', 'layers_of']


@dataclass(frozen=True)
class Layer:
    """One structure of a plan: coupled layers, which lose the same units, are one.

    Attributes:
        name: Name of the structure.
        kind: One of ``timm_epfs.core.KINDS``.
        dense: Number of its units in the dense model.
        left: Number of units that stay.
        is_gone: Whether it was removed with a whole block, or is a block that was removed.
        coupled: Names of the other layers that lose the same units.
    """
    name: str
    kind: str
    dense: int
    left: int
    is_gone: bool
    coupled: Tuple[str, ...]


def layers_of(plan: Plan) -> List[Layer]:
    """The structures of a plan in the order of the layers. Blocks are among them only if some were removed."""
    removed = _removed(plan)
    return [_layer(cut, cut.structure.name in removed) for cut in _ordered(plan)]


def _layer(cut: Cut, is_gone: bool) -> Layer:
    structure = cut.structure
    coupled = structure.layers - {structure.name, structure.name.partition('#')[0]}
    left = 0 if is_gone else len(cut.keep)
    return Layer(structure.name, structure.kind, structure.units, left, is_gone, tuple(sorted(coupled)))


def _ordered(plan: Plan) -> List[Cut]:
    inner = [cut for cut in plan.cuts if cut.structure.kind != 'blocks']
    blocks = [cut for cut in plan.cuts if cut.structure.kind == 'blocks']
    if all(len(cut.keep) for cut in blocks):
        return inner
    position = {id(cut): float(i) for i, cut in enumerate(inner)}
    for block in blocks:  # right before the first layer inside the block
        inside = (i for i, cut in enumerate(inner) if cut.structure.name.startswith(f'{block.structure.name}.'))
        position[id(block)] = next(inside, len(inner)) - 0.5
    return sorted((*inner, *blocks), key=lambda cut: position[id(cut)])


def _removed(plan: Plan) -> Set[str]:
    """Names of the structures that were removed whole: blocks, and structures that were only inside of them."""
    blocks = {cut.structure.name for cut in plan.cuts if not len(cut.keep)}
    lost_tensors = plan.lost(member.tensor for cut in plan.cuts for member in cut.structure.members)
    inside = {cut.structure.name for cut in plan.cuts if all(m.tensor in lost_tensors for m in cut.structure.members)}
    return blocks | inside
