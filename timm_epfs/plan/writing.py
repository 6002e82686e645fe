"""A plan as JSON values."""
from typing import TYPE_CHECKING, Any, Dict, Union

from ..core import Member
from .cuts import Cut
from .json_values import json_value
from .notation import Ranges, Strided

if TYPE_CHECKING:
    from .pruning_plan import Plan

__all__ = ['FORMAT', 'plan_values']

FORMAT = 1


def plan_values(plan: 'Plan') -> Dict[str, Any]:
    """A plan as JSON values, in the order in which they are written."""
    return {
        'format': FORMAT,
        'base': plan.base,
        'base_args': json_value(plan.base_args, 'plan.base_args'),
        'recipe': json_value(plan.recipe, 'plan.recipe'),
        'cost': {name: [_number(value) for value in pair] for name, pair in sorted(plan.cost.items())},
        'attributes': json_value(plan.attributes, 'plan.attributes'),
        'cuts': [_cut(cut) for cut in plan.cuts],
    }


def _cut(cut: Cut) -> Dict[str, Any]:
    structure, left = cut.structure, len(cut.keep)
    keep = 'all' if left == structure.units else str(Ranges.find(cut.keep)) if left else 'none'
    data = {'name': structure.name, 'kind': structure.kind, 'units': structure.units, 'keep': keep}
    if not structure.exact:
        data.update(exact=False, reason=structure.reason)
    if structure.stream:
        data.update(stream=True)
    if structure.shortcut:
        data.update(shortcut=list(structure.shortcut))
    return {**data, 'members': [_member(member) for member in structure.members]}


def _member(member: Member) -> str:
    """``'layer1.0.conv1.weight dim 0 out'``, with the index map where it isn't one entry per unit, in order.

    ``at`` precedes a regular map, ``rows`` the entries of the units, one after the other.
    """
    length = '' if member.length is None else f' of {member.length}'
    text = f'{member.tensor} dim {member.dim}{length} {member.role}'
    layout = Strided.find(member.index)
    if layout is None:
        return f'{text} rows {Ranges.find(member.index.ravel())}'
    one_a_unit = Strided(len(member.index))
    return text if str(layout) == str(one_a_unit) else f'{text} at {layout}'


def _number(value: float) -> Union[int, float]:
    value = float(value)
    return int(value) if value.is_integer() else value
