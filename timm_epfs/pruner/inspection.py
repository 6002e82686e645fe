"""``Report``: what can be cut of a model, as a table and as data."""
import re
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from ..core import CostModel, Structure, format_count, percent, shorten
from ..trace import OUTPUT_WIDTH, Trace

__all__ = ['Report', 'Row', 'make_report']

_WIDTH = 120
_FIXED = 10  # lines about widths that stay


@dataclass(frozen=True)
class Row:
    """One structure, or several of the same shape.

    Attributes:
        name: Name of the structure. For several, a pattern that matches them, as ``exclude=`` and ``only=`` take it.
        kind: ``'channels'``, ``'heads'``, ``'head_dims'``, ``'groups'`` or ``'blocks'``.
        units: Number of units of each structure.
        macs_share: Share of the model's MACs in layers that get smaller when units are cut. Shares overlap, because a
            layer has a structure on its input and another on its output.
        exact: Whether masking units and cutting them give the same outputs.
        reason: Why not, where it isn't exact.
        stream: Whether it is a residual stream that is normalised over its channels. Such streams are cut only on
            request, or if the budget can't be met otherwise.
        count: Number of structures in this row.
    """
    name: str
    kind: str
    units: int
    macs_share: float
    exact: bool = True
    reason: str = ''
    stream: bool = False
    count: int = 1


@dataclass(frozen=True)
class Report:
    """What ``inspect`` found. ``print(report)`` shows a table, ``report.to_dict()`` is JSON.

    Attributes:
        model: Name of the model, or of its class.
        macs: MACs of one forward at batch 1.
        params: Number of parameters.
        macs_share: Share of the MACs in layers that get smaller when some structure is cut.
        macs_share_exact: Share of the MACs in layers that get smaller when some exact structure is cut.
        structures: Every structure, in the order of the model's parameters.
        groups: The structures again, those of one shape in one row, as the table shows them.
        skipped: Lines of the model's code around which nothing is cut, and the reasons.
        left_out: Number of further structures, which the pruner's options leave out, or an earlier cut.
        on_numbers: Where and why the forward can't be traced by shapes alone, if it can't.
        fixed: Layers whose output width can't be cut: name, width and why.
    """
    model: str
    macs: float
    params: float
    macs_share: float
    macs_share_exact: float
    structures: Tuple[Row, ...]
    groups: Tuple[Row, ...]
    skipped: Tuple[Tuple[str, str], ...] = ()
    left_out: int = 0
    on_numbers: str = ''
    fixed: Tuple[Tuple[str, int, str], ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        """The report as JSON values. ``groups`` is left out, since it can be derived from ``structures``."""
        data = asdict(self)
        del data['groups']
        for row in data['structures']:
            del row['count']
        skipped = [{'where': where, 'why': why} for where, why in self.skipped]
        fixed = [{'name': name, 'units': units, 'why': why} for name, units, why in self.fixed]
        return {**data, 'structures': list(data['structures']), 'skipped': skipped, 'fixed': fixed}

    def __str__(self) -> str:
        lines = [f'{self.model}: {format_count(self.macs)} MACs, {format_count(self.params)} parameters']
        if self.structures:
            lines += [
                f'{percent(self.macs_share)} of the MACs are in layers that can be cut, '
                f'{percent(self.macs_share_exact)} exactly',
                '',
                *_table(self.groups),
            ]
            if len(self.groups) < len(self.structures):
                lines += ['', f'{len(self.structures)} structures, those of one shape in one row']
        elif not self.left_out:
            lines.append('nothing can be cut')
        if self.left_out:
            number = f'{self.left_out} more' if self.structures else f'all {self.left_out}'
            lines += ['', f'{number} structures are left out by exclude=, only=, kinds=, streams= or an earlier cut']
        if self.skipped:
            lines += ['', 'nothing is cut around:']
            lines += [shorten(f'  {where}: {why}', _WIDTH) for where, why in self.skipped]
        # That a model's outputs stay goes without saying, unless nothing else is left to say.
        fixed = [entry for entry in self.fixed if entry[2] != OUTPUT_WIDTH or not self.structures]
        if fixed:
            lines += ['', 'widths that stay:', *_fixed_lines(fixed)]
        if self.on_numbers:
            lines += ['', 'traced on numbers, since shapes alone don\'t tell which way the forward takes:',
                      shorten(f'  {self.on_numbers}', _WIDTH)]
        return '\n'.join(lines)


def make_report(name: str, traced: Trace, structures: Sequence[Structure]) -> Report:
    """Make the report of a traced model.

    Args:
        name: What the report calls the model.
        traced: The model's trace.
        structures: Those of its structures that may be cut.
    """
    cost = traced.cost
    dense = cost.counts({s.name: s.units for s in traced.structures})
    inside = [s for s in structures if s.kind != 'blocks']  # cutting a block removes layers, and makes none smaller
    return Report(
        model=name,
        macs=cost('macs', dense),
        params=cost('params', dense),
        macs_share=cost.share('macs', {s.name for s in inside}, dense),
        macs_share_exact=cost.share('macs', {s.name for s in inside if s.exact}, dense),
        structures=tuple(_row([s], cost, dense) for s in structures),
        groups=tuple(_row(alike, cost, dense) for alike in _alike(structures)),
        skipped=tuple((s.where, s.why) for s in traced.skipped),
        on_numbers=traced.on_numbers,
        fixed=tuple((name, units, why) for name, (units, why) in traced.fixed.items()),
        left_out=len(traced.structures) - len(structures),
    )


def _fixed_lines(fixed: Sequence[Tuple[str, int, str]]) -> List[str]:
    """A line for each width and reason."""
    alike: Dict[Tuple[str, int, str], List[str]] = {}
    for name, units, why in fixed:
        alike.setdefault((re.sub(r'\d+', '0', name), units, why), []).append(name)
    lines = [f'  {_pattern(names)} ({units:,}): {why}' for (_, units, why), names in alike.items()]
    left = len(lines) - _FIXED
    lines = lines[:_FIXED] + ([f'  and {left} more'] if left > 0 else [])
    return [shorten(line, _WIDTH) for line in lines]


def _row(alike: Sequence[Structure], cost: CostModel, dense) -> Row:
    first = alike[0]
    share = cost.share('macs', {s.name for s in alike}, dense)
    name = _pattern([s.name for s in alike])
    return Row(name, first.kind, first.units, share, first.exact, first.reason, first.stream, len(alike))


def _alike(structures: Iterable[Structure]) -> List[List[Structure]]:
    """Group structures that differ only in the numbers in their names."""
    groups: Dict[Tuple, List[Structure]] = {}
    for s in structures:
        block, _, layer = (s.name, '', '') if s.kind == 'blocks' else s.name.rpartition('.')
        key = (re.sub(r'\d+', '0', block), layer, s.kind, s.units, s.exact, s.reason, s.stream)
        groups.setdefault(key, []).append(s)
    return list(groups.values())


def _pattern(names: Sequence[str]) -> str:
    """The name that structures share, with ``*`` in place of numbers that differ."""
    columns = zip(*(re.split(r'(\d+)', name) for name in names))
    return ''.join(parts[0] if len(set(parts)) == 1 else '*' for parts in columns)


def _table(rows: Sequence[Row]) -> List[str]:
    cells = [('structure', 'kind', 'units', 'MACs', 'exact')]
    for row in rows:
        units = f'{row.units}' if row.count == 1 else f'{row.count} x {row.units}'
        exact = 'yes' if row.exact else f'no: {row.reason}'
        cells.append((row.name, row.kind, units, percent(row.macs_share), exact))
    name, kind, units, share = (max(len(row[i]) for row in cells) for i in range(4))
    room_for_reason = 24
    name = min(name, _WIDTH - kind - units - share - 4 * 2 - room_for_reason)
    return [
        shorten(
            f'{shorten(row[0], name):<{name}}  {row[1]:<{kind}}  {row[2]:>{units}}  {row[3]:>{share}}  {row[4]}',
            _WIDTH,
        ).rstrip()
        for row in cells
    ]
