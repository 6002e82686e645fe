"""A plan's JSON values, untrusted: each is checked as it is read.

Text is checked before an array is allocated for it: a plan that asks for gigabytes costs nothing.
"""
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np

from ..core import (
    ANYTHING,
    DICT,
    FLAG,
    INTEGER,
    KINDS,
    LIST,
    TEXT,
    Member,
    PruningError,
    Rule,
    Structure,
    check,
    invalid,
)
from .cuts import Cut
from .json_values import json_value
from .limits import NAME, check_arguments, check_size
from .notation import Ranges, Strided
from .writing import FORMAT

__all__ = ['parse_plan']

# The largest of timm's zoo: 18,375 members (densenet264d), 16,384 units (swinv2_cr_giant), 5.9 million entries
# (eva02_enormous).
MAX_UNITS = 2 ** 18
MAX_MEMBERS = 2 ** 15
MAX_ENTRIES = 12_000_000
MAX_INDEX = 2 ** 31 - 1

# Patterns are compiled when they're first used: importing timm_epfs reads no plan.
_BASE = r'(torchvision/)?\w{1,100}(\.\w{1,100})?'
_MEMBER = r'(.+) dim ([0-9])(?: of ([0-9]{1,9}))? (out|in|per)(?: (at|rows) (.+))?'

_PLAN = {
    'format': INTEGER, 'base': ANYTHING, 'base_args': DICT, 'recipe': DICT, 'cost': DICT, 'attributes': DICT,
    'cuts': LIST,
}
_CUT = {
    'name': NAME, 'kind': Rule(', '.join(KINDS), lambda kind: kind in KINDS), 'units': INTEGER, 'keep': TEXT,
    'members': Rule('a list of at least one', lambda members: isinstance(members, list) and len(members) > 0),
    'exact': FLAG, 'reason': NAME, 'stream': FLAG, 'shortcut': LIST,
}
_REQUIRED_OF_CUT = ('name', 'kind', 'units', 'keep', 'members')
_COST = Rule('[dense, pruned]', lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(_is_cost, pair)))

IndexText = Union[Ranges, Strided]


def parse_plan(data: Any) -> Dict[str, Any]:
    """The fields of a plan, from its JSON values.

    Raises:
        PruningError: The values are not a plan; the message names the field.
    """
    _check_format(data)
    check_size(dict(data), 'plan')
    data = check(data, _PLAN, 'plan', required=_PLAN)
    base_args = json_value(data['base_args'], 'plan.base_args')
    check_arguments(base_args, 'plan.base_args')
    parsed = _parse_cuts(data['cuts'])
    return {
        'base': None if data['base'] is None else _parse_base(data['base']),
        'base_args': base_args,
        'cuts': tuple(cut.build() for cut in parsed),
        'attributes': {name: _parse_attribute(name, value) for name, value in data['attributes'].items()},
        'recipe': json_value(data['recipe'], 'plan.recipe'),
        'cost': {name: _parse_cost(name, pair) for name, pair in data['cost'].items()},
    }


@dataclass(frozen=True, eq=False)
class _ParsedMember:
    """A member whose text is checked and whose index map isn't allocated yet."""
    tensor: str
    dim: int
    role: str
    index: IndexText
    length: Optional[int]

    def build(self, units: int) -> Member:
        return Member(self.tensor, self.dim, self.role, self.index.array().reshape(units, -1), self.length)


@dataclass(frozen=True, eq=False)
class _ParsedCut:
    """A cut whose text is checked and whose arrays aren't allocated yet."""
    name: str
    kind: str
    units: int
    keep: Optional[IndexText]
    members: Tuple[_ParsedMember, ...]
    options: Dict[str, Any]

    @property
    def entries(self) -> int:
        return self.units + sum(member.index.entries for member in self.members)

    def build(self) -> Cut:
        members = tuple(member.build(self.units) for member in self.members)
        keep = np.zeros(0, np.int64) if self.keep is None else self.keep.array().reshape(-1)
        return Cut(Structure(self.name, self.kind, self.units, members, **self.options), keep)


def _check_format(data: Any) -> None:
    if not isinstance(data, Mapping) or 'format' not in data:
        raise PruningError('plan: not a timm_epfs plan, it has no field "format"; give what Plan.save wrote')
    version = check(data['format'], INTEGER, 'plan.format')
    if version > FORMAT:
        raise PruningError(f'plan: format {version}, this timm_epfs reads up to {FORMAT}: upgrade')
    if version < 1:
        raise invalid('plan.format', version, f'1 to {FORMAT}')


def _parse_base(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(_BASE, name, re.ASCII):
        raise invalid('plan.base', name, "a timm name, 'torchvision/<name>' or null")
    if '_epfs' in name or name.startswith('epfs_'):
        raise invalid('plan.base', name, 'a dense model; this one is pruned already')
    return name


def _parse_cuts(data: List[Any]) -> List[_ParsedCut]:
    parsed, members, entries = [], 0, 0
    for i, cut in enumerate(data):
        parsed.append(_parse_cut(cut, f'plan.cuts[{i}]'))
        members, entries = members + len(parsed[-1].members), entries + parsed[-1].entries
        if members > MAX_MEMBERS or entries > MAX_ENTRIES:
            raise PruningError(
                f'plan: its index maps are too large; {MAX_MEMBERS} members and {MAX_ENTRIES} entries are allowed'
            )
    (name, times), = Counter(cut.name for cut in parsed).most_common(1) or [('', 0)]
    if times > 1:
        raise PruningError(f'plan: {times} structures are named {name[:80]!r}; names are unique')
    return parsed


def _parse_cut(data: Any, where: str) -> _ParsedCut:
    data = check(data, _CUT, where, required=_REQUIRED_OF_CUT)
    kind, units, keep = data['kind'], data['units'], data['keep']
    if not 1 <= units <= MAX_UNITS:
        raise invalid(f'{where}.units', units, f'1 to {MAX_UNITS}')
    if keep == 'none' and (kind != 'blocks' or not data['name']):
        raise invalid(f'{where}.keep', keep, 'at least one unit; only a block goes whole')
    return _ParsedCut(
        name=data['name'],
        kind=kind,
        units=units,
        keep=_parse_keep(keep, units, f'{where}.keep'),
        members=tuple(_parse_member(text, units, f'{where}.members[{i}]') for i, text in enumerate(data['members'])),
        options={
            **{name: data[name] for name in ('exact', 'reason', 'stream') if name in data},
            'shortcut': _parse_shortcut(data.get('shortcut', []), kind, f'{where}.shortcut'),
        },
    )


def _parse_shortcut(children: List[Any], kind: str, where: str) -> Tuple[str, ...]:
    names = all(isinstance(child, str) and (child.isidentifier() or child.isdecimal()) for child in children)
    if not names or len(set(children)) < len(children) or (children and kind != 'blocks'):
        raise invalid(where, children, 'names of children of a block, each once')
    return tuple(children)


def _parse_keep(text: str, units: int, where: str) -> Optional[IndexText]:
    if text == 'all':
        return Strided(units)
    if text == 'none':
        return None
    try:
        keep = Ranges.parse(text)
    except ValueError as e:
        raise PruningError(f'{where}: {e}') from None
    if not keep.ascending:
        raise PruningError(f'{where}: units are repeated or unsorted; list each once, in order')
    if keep.top >= units:
        raise PruningError(f'{where}: unit {keep.top} is out of range, there are {units}')
    return keep


def _parse_member(text: Any, units: int, where: str) -> _ParsedMember:
    match = re.fullmatch(_MEMBER, check(text, TEXT, where))
    if not match:
        raise invalid(where, text, "'layer1.0.conv1.weight dim 0 out'")
    tensor, dim, length, role, form, layout = match.groups()
    try:
        index = Strided(units) if form is None else \
            Strided.parse(layout, units) if form == 'at' else Ranges.parse(layout)
    except ValueError as e:
        raise PruningError(f'{where}: {e}') from None
    if index.entries % units or index.top > MAX_INDEX:
        raise invalid(where, text, f'the same number of entries for each of {units} units, each below 2^31')
    if length is not None and int(length) <= index.top:
        raise invalid(where, text, f'a dim longer than {index.top}, its last entry')
    return _ParsedMember(check(tensor, NAME, where), int(dim), role, index, length and int(length))


def _parse_attribute(name: str, value: Any) -> int:
    where = f'plan.attributes[{check(name, NAME, "plan.attributes")[:80]!r}]'
    if not 0 <= check(value, INTEGER, where) <= MAX_INDEX:
        raise invalid(where, value, f'0 to {MAX_INDEX}')
    return value


def _parse_cost(name: str, pair: Any) -> Tuple[float, float]:
    dense, pruned = check(pair, _COST, f'plan.cost[{check(name, NAME, "plan.cost")[:80]!r}]')
    return float(dense), float(pruned)


def _is_cost(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30
