"""A plan says which units of a model stay. It is data: one short, readable JSON that needs no tracing to be applied.

What a plan names, it names as the model does (tensors, modules), so that a plan found on one copy of a model cuts any
other copy, rebuilds the pruned model from its dense base, and cuts any dense checkpoint of that base.
"""
import json
import re
import reprlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from ..core import KINDS, Member, PruningError, Structure, complement, distinct, write_whole
from .limits import MAX_CHARACTERS, check_arguments, check_name, check_size, check_text
from .notation import Ranges, Strided

__all__ = ['Cut', 'Plan', 'FORMAT']

FORMAT = 1
# The largest of timm's zoo: 18,375 members (densenet264d), 16,384 units (swinv2_cr_giant), 5.9 million entries
# (eva02_enormous).
MAX_UNITS = 2 ** 18
MAX_MEMBERS = 2 ** 15
MAX_ENTRIES = 12_000_000
MAX_INDEX = 2 ** 31 - 1
MAX_DEPTH = 16

_FIELDS = ('format', 'base', 'base_args', 'recipe', 'cost', 'attributes', 'cuts')
_CUT_FIELDS = ('name', 'kind', 'units', 'keep', 'members')
_CUT_OPTIONS = ('exact', 'reason', 'stream', 'shortcut')
_KIND_NAMES = {dict: 'an object', list: 'a list', str: 'text', int: 'an integer', bool: 'true or false'}
_BASE = re.compile(r'(torchvision/)?\w{1,100}(\.\w{1,100})?', re.ASCII)
_MEMBER = re.compile(r'(.+) dim ([0-9])(?: of ([0-9]{1,9}))? (out|in|per)(?: (at|rows) (.+))?')


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a structure.

    Attributes:
        structure: The structure.
        keep: Units that stay, sorted, int64, shape (left,). All of them where the structure is untouched.
    """
    structure: Structure
    keep: np.ndarray


def recipe_steps(recipe: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The recipes of a plan that was composed, one a cut. A recipe is free text: ``steps`` may be anything else."""
    steps = recipe.get('steps')
    return steps if isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps) else [recipe]


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays of a model, and how that was found.

    Attributes:
        base: timm name of the dense model, ``'torchvision/<name>'``, or None for a module of the user's own.
        base_args: Keyword arguments that build the base (``num_classes``, ``in_chans``, …), JSON values.
        cuts: Every structure of the trace, cut or not, so that plans compose and show what else could be cut.
        attributes: Integers to set on the model, by path: ``'blocks.0.attn.num_heads': 3``. A number in the path is a
            position in a list or tuple: ``'feature_info.2.num_chs': 96``.
        recipe: How the plan was found: method, criterion, target, versions; data, date and command where it ships.
        cost: (dense, pruned) by quantity: ``{'macs': (1.8e9, 0.9e9)}``.
    """
    base: Optional[str]
    base_args: Dict[str, Any]
    cuts: Tuple[Cut, ...]
    attributes: Dict[str, int] = field(default_factory=dict)
    recipe: Dict[str, Any] = field(default_factory=dict)
    cost: Dict[str, Tuple[float, float]] = field(default_factory=dict)

    def uncomposable(self, structures: Iterable[Structure]) -> Set[str]:
        """Names of structures of the pruned model that aren't what this plan left: not to be cut by a later one.

        Such as the dims of a head that is the only one left of its layer.
        """
        left = {cut.structure.name: len(cut.keep) for cut in self.cuts}
        return {s.name for s in structures if left.get(s.name) != s.units}

    def removed_blocks(self) -> Dict[str, Tuple[str, ...]]:
        """Paths of the modules that are taken out, with the names of those of their children that stay.

        What goes with a block around it isn't among them.
        """
        gone = [cut.structure for cut in self.cuts if cut.structure.kind == 'blocks' and not len(cut.keep)]
        blocks = {structure.name: structure.shortcut for structure in gone}
        return {name: children for name, children in blocks.items() if not _goes(name, blocks)}

    def lost(self, tensors: Iterable[str]) -> Set[str]:
        """Which of these tensors go with their block."""
        blocks = self.removed_blocks()
        return {name for name in tensors if _goes(name, blocks)}

    def removed(self) -> Dict[str, Dict[int, np.ndarray]]:
        """Entries that go, by tensor and dim, each sorted. An entry that several structures own goes with any.

        Blocks aren't among them: what is in a block goes with its module.
        """
        return self._removed

    @cached_property
    def _removed(self) -> Dict[str, Dict[int, np.ndarray]]:
        gone: Dict[str, Dict[int, List[np.ndarray]]] = {}
        for cut in self.cuts:
            if cut.structure.kind == 'blocks' or len(cut.keep) == cut.structure.units:
                continue
            units = complement(cut.keep, cut.structure.units)
            for member in cut.structure.members:
                gone.setdefault(member.tensor, {}).setdefault(member.dim, []).append(member.index[units].ravel())
        return {
            tensor: {dim: distinct(parts) for dim, parts in dims.items()} for tensor, dims in gone.items()
        }

    def keep_indices(self, shapes: Mapping[str, Sequence[int]]) -> Dict[str, Dict[int, np.ndarray]]:
        """Entries that stay, by tensor and dim, for the dims that change.

        Args:
            shapes: Dense shapes by tensor name. Structures need not cover a dim, so its length must be given.
        """
        return {
            tensor: {dim: complement(gone, shapes[tensor][dim]) for dim, gone in dims.items()}
            for tensor, dims in self.removed().items()
        }

    def compose(self, later: 'Plan') -> 'Plan':
        """The plan that does in one step what this one and then ``later``, made on the pruned model, do in two.

        Raises:
            PruningError: ``later`` has a structure that this plan does not leave behind.
        """
        left = {cut.structure.name: len(cut.keep) for cut in self.cuts}
        touched = [cut for cut in later.cuts if len(cut.keep) < cut.structure.units]
        for cut in touched:
            name, units = cut.structure.name, cut.structure.units
            if left.get(name) != units:
                found = f'the first leaves {left[name]}' if name in left else 'the first has no such structure'
                raise PruningError(
                    f'compose: the later plan has {name} with {units} units, {found}; make it on the pruned model'
                )

        steps = {cut.structure.name: cut.keep for cut in touched}
        cuts = tuple(
            Cut(cut.structure, cut.keep[steps[cut.structure.name]]) if cut.structure.name in steps else cut
            for cut in self.cuts
        )
        return Plan(
            base=self.base,
            base_args=self.base_args,
            cuts=cuts,
            attributes={**self.attributes, **later.attributes},
            recipe={'steps': [*recipe_steps(self.recipe), *recipe_steps(later.recipe)]},
            cost={
                quantity: (dense, later.cost[quantity][1])
                for quantity, (dense, _) in self.cost.items() if quantity in later.cost
            },
        )

    def to_dict(self) -> Dict[str, Any]:
        """The plan as JSON values."""
        return {
            'format': FORMAT,
            'base': self.base,
            'base_args': _json_value(self.base_args, 'base_args'),
            'recipe': _json_value(self.recipe, 'recipe'),
            'cost': {name: [_number(value) for value in pair] for name, pair in sorted(self.cost.items())},
            'attributes': _json_value(self.attributes, 'attributes'),
            'cuts': [_write_cut(cut) for cut in self.cuts],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> 'Plan':
        """Read a plan from JSON values, trusting none of them.

        Raises:
            PruningError: The values are no plan; the message names the field.
        """
        _check_format(data)
        check_size(dict(data), 'plan')
        _check_fields(data, _FIELDS, (), 'plan')
        if data['base'] is not None:
            _check_base(data['base'])
        for name in ('base_args', 'recipe', 'cost', 'attributes'):
            _expect(data[name], dict, name)
        base_args = _json_value(data['base_args'], 'base_args')
        check_arguments(base_args, 'plan, base_args')

        parsed = _parse_cuts(data['cuts'])
        return cls(
            base=data['base'],
            base_args=base_args,
            cuts=tuple(cut.build() for cut in parsed),
            attributes={name: _parse_attribute(name, value) for name, value in data['attributes'].items()},
            recipe=_json_value(data['recipe'], 'recipe'),
            cost={name: _parse_cost(name, pair) for name, pair in data['cost'].items()},
        )

    def to_json(self) -> str:
        """The plan as text. The same plan gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + '\n'

    @classmethod
    def from_json(cls, text: str) -> 'Plan':
        """Read what ``to_json`` wrote.

        Raises:
            PruningError: The text is not JSON or no plan.
        """
        check_text(text, 'plan')
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PruningError(f'plan: not JSON ({str(e)[:80]})') from None
        return cls.from_dict(data)

    def save(self, path: Union[str, Path]) -> None:
        """Write the plan's JSON, whole or not at all.

        Raises:
            PruningError: The file can't be written.
        """
        path = Path(path)
        text = self.to_json()
        try:
            write_whole(path, lambda part: part.write_text(text, encoding='utf-8', newline='\n'))
        except OSError as e:
            raise PruningError(f'plan not saved to {path}: {e.strerror or e}') from e

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'Plan':
        """Read a plan file.

        Raises:
            PruningError: The file can't be read or holds no plan.
        """
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read(MAX_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as e:
            raise PruningError(f'plan not read from {path}: {getattr(e, "strerror", None) or "not UTF-8 text"}') from e
        return cls.from_json(text)


@dataclass(frozen=True)
class _ParsedCut:
    """A cut whose text is checked and whose arrays are not yet allocated."""
    name: str
    units: int
    keep: Union[Ranges, Strided, None]
    members: Tuple[Tuple[str, int, str, Union[Ranges, Strided], Optional[int]], ...]
    options: Dict[str, Any]

    @property
    def entries(self) -> int:
        return self.units + sum(index.entries for *_, index, _ in self.members)

    def build(self) -> Cut:
        members = tuple(
            Member(tensor, dim, role, index.array().reshape(self.units, -1), length)
            for tensor, dim, role, index, length in self.members
        )
        structure = Structure(name=self.name, units=self.units, members=members, **self.options)
        return Cut(structure, np.zeros(0, np.int64) if self.keep is None else self.keep.array().reshape(-1))


def _goes(name: str, blocks: Mapping[str, Sequence[str]]) -> bool:
    """Whether something of this name is in one of the blocks and in none of its children that stay."""
    parts = name.split('.')
    parents = accumulate(parts, '{}.{}'.format)
    return any(parent in blocks and child not in blocks[parent] for parent, child in zip(parents, parts[1:]))


def _write_cut(cut: Cut) -> Dict[str, Any]:
    structure, left = cut.structure, len(cut.keep)
    keep = 'all' if left == structure.units else str(Ranges.find(cut.keep)) if left else 'none'
    data = {'name': structure.name, 'kind': structure.kind, 'units': structure.units, 'keep': keep}
    if not structure.exact:
        data.update(exact=False, reason=structure.reason)
    if structure.stream:
        data.update(stream=True)
    if structure.shortcut:
        data.update(shortcut=list(structure.shortcut))
    return {**data, 'members': [_write_member(member) for member in structure.members]}


def _write_member(member: Member) -> str:
    length = '' if member.length is None else f' of {member.length}'
    text = f'{member.tensor} dim {member.dim}{length} {member.role}'
    layout = Strided.find(member.index)
    if layout is None:
        return f'{text} rows {Ranges.find(member.index.ravel())}'
    identity = str(layout) == str(Strided(len(member.index)))
    return text if identity else f'{text} at {layout}'


def _parse_cuts(data: Any) -> List[_ParsedCut]:
    _expect(data, list, 'cuts')
    parsed, members, entries = [], 0, 0
    for i, cut in enumerate(data):
        parsed.append(_parse_cut(cut, f'cuts[{i}]'))
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
    _expect(data, dict, where)
    _check_fields(data, _CUT_FIELDS, _CUT_OPTIONS, where)
    for name, kind in (('units', int), ('keep', str), ('members', list), ('kind', str)):
        _expect(data[name], kind, f'{where}.{name}')
    for name, kind in (('exact', bool), ('stream', bool)):
        _expect(data.get(name, kind()), kind, f'{where}.{name}')
    shortcut = _parse_shortcut(data, where)
    units = data['units']
    if not 1 <= units <= MAX_UNITS:
        raise _bad(f'{where}.units', units, f'1 to {MAX_UNITS}')
    if data['kind'] not in KINDS:
        raise _bad(f'{where}.kind', data['kind'], ', '.join(KINDS))
    if data['keep'] == 'none' and (data['kind'] != 'blocks' or not data['name']):
        raise _bad(f'{where}.keep', data['keep'], 'at least one unit; only a block goes whole')
    if not data['members']:
        raise _bad(f'{where}.members', data['members'], 'at least one')
    check_name(data.get('reason', ''), f'plan, {where}.reason')
    return _ParsedCut(
        name=check_name(data['name'], f'plan, {where}.name'),
        units=units,
        keep=_parse_keep(data['keep'], units, f'{where}.keep'),
        members=tuple(_parse_member(text, units, f'{where}.members[{i}]') for i, text in enumerate(data['members'])),
        options={**{name: data[name] for name in ('kind', *_CUT_OPTIONS) if name in data}, 'shortcut': shortcut},
    )


def _parse_shortcut(data: Mapping[str, Any], where: str) -> Tuple[str, ...]:
    children = data.get('shortcut', [])
    _expect(children, list, f'{where}.shortcut')
    names = all(isinstance(child, str) and (child.isidentifier() or child.isdecimal()) for child in children)
    if not names or len(set(children)) < len(children) or (children and data['kind'] != 'blocks'):
        raise _bad(f'{where}.shortcut', children, 'names of children of a block, each once')
    return tuple(children)


def _parse_keep(text: str, units: int, where: str) -> Union[Ranges, Strided, None]:
    if text == 'all':
        return Strided(units)
    if text == 'none':
        return None
    try:
        keep = Ranges.parse(text)
    except ValueError as e:
        raise PruningError(f'plan, {where}: {e}') from None
    if not keep.ascending:
        raise PruningError(f'plan, {where}: units are repeated or unsorted; list each once, in order')
    if keep.top >= units:
        raise PruningError(f'plan, {where}: unit {keep.top} is out of range, there are {units}')
    return keep


def _parse_member(text: Any, units: int, where: str) -> Tuple[str, int, str, Union[Ranges, Strided], Optional[int]]:
    _expect(text, str, where)
    match = _MEMBER.fullmatch(text)
    if not match:
        raise _bad(where, text, "'layer1.0.conv1.weight dim 0 out'")
    tensor, dim, length, role, form, layout = match.groups()
    check_name(tensor, f'plan, {where}')
    try:
        index = Strided(units) if form is None else \
            Strided.parse(layout, units) if form == 'at' else Ranges.parse(layout)
    except ValueError as e:
        raise PruningError(f'plan, {where}: {e}') from None
    if index.entries % units or index.top > MAX_INDEX:
        raise _bad(where, text, f'the same number of entries for each of {units} units, each below 2^31')
    if length is not None and int(length) <= index.top:
        raise _bad(where, text, f'a dim longer than {index.top}, its last entry')
    return tensor, int(dim), role, index, length and int(length)


def _parse_attribute(name: str, value: Any) -> int:
    check_name(name, 'plan, attributes')
    _expect(value, int, f'attributes[{name[:80]!r}]')
    if not 0 <= value <= MAX_INDEX:
        raise _bad(f'attributes[{name[:80]!r}]', value, '0 or more')
    return value


def _parse_cost(name: str, pair: Any) -> Tuple[float, float]:
    where = f'cost[{check_name(name, "plan, cost")[:80]!r}]'
    _expect(pair, list, where)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in pair)
    if len(pair) != 2 or not numbers or not all(0 <= value < 1e30 for value in pair):
        raise _bad(where, pair, '[dense, pruned]')
    return float(pair[0]), float(pair[1])


def _check_format(data: Any) -> None:
    if not isinstance(data, Mapping) or 'format' not in data:
        raise PruningError('plan: this is no timm_epfs plan (no field "format")')
    version = data['format']
    _expect(version, int, 'format')
    if version > FORMAT:
        raise PruningError(f'plan: format {version}, this timm_epfs reads up to {FORMAT}: upgrade')
    if version < 1:
        raise _bad('format', version, f'1 to {FORMAT}')


def _check_base(name: Any) -> None:
    if not isinstance(name, str) or not _BASE.fullmatch(name):
        raise _bad('base', name, "a timm name, 'torchvision/<name>' or null")
    if '_epfs' in name or name.startswith('epfs_'):
        raise _bad('base', name, 'a dense model; this one is pruned already')


def _check_fields(data: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], where: str) -> None:
    missing = [name for name in required if name not in data]
    unknown = [str(name)[:40] for name in data if name not in (*required, *optional)]
    if missing:
        raise PruningError(f'plan, {where}: no field {missing[0]!r}')
    if unknown:
        raise PruningError(f'plan, {where}: unknown field {unknown[0]!r}; known: {", ".join((*required, *optional))}')


def _expect(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(where, value, _KIND_NAMES[kind])


def _bad(where: str, value: Any, expected: Any) -> PruningError:
    return PruningError(f'plan, {where}: found {reprlib.repr(value)[:80]}, expected {expected}')


def _number(value: float) -> Union[int, float]:
    value = float(value)
    return int(value) if value.is_integer() else value


def _json_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a JSON value, dicts sorted, tuples as lists, numpy scalars as numbers."""
    if depth > MAX_DEPTH:
        raise PruningError(f'plan, {where[:80]}: nested more than {MAX_DEPTH} deep')
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        for key in value:
            check_name(key, f'plan, {where[:80]}')
        return {key: _json_value(value[key], f'{where}.{key}', depth + 1) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, f'{where}[{i}]', depth + 1) for i, item in enumerate(value)]
    if isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and isfinite(value)):
        return value
    raise _bad(where[:80], value, 'a JSON value')
