"""What can be cut of a model, as a table and as data."""
import re
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from ..core import CostModel, Structure, format_count, percent, shorten
from ..trace import Trace

__all__ = ['Report', 'Row', 'make_report']

_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One structure, or several alike.

    Attributes:
        name: Name of the structure; of several, a pattern that ``exclude=`` and ``only=`` take.
        kind: ``'channels'``, ``'heads'``, ``'groups'`` or ``'blocks'``.
        units: Number of units, of each.
        macs_share: Share of the model's MACs in layers that change when units are cut. Shares overlap: a layer
            belongs to the structures on both its sides.
        exact: True where masking units and cutting them give the same outputs.
        reason: Where not exact, why.
        stream: True for a residual stream that is normalised over its channels, cut only on request or in need.
        count: How many structures the row stands for.
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
        macs_share: Share of the MACs in layers that some structure cuts.
        macs_share_exact: The same, by exact structures alone.
        structures: Every structure, in the order of the model's parameters.
        groups: The same with structures of one shape in one row, as the table shows them.
        skipped: Places in the model's code around which nothing is cut, with the reasons.
    """
    model: str
    macs: float
    params: float
    macs_share: float
    macs_share_exact: float
    structures: Tuple[Row, ...]
    groups: Tuple[Row, ...]
    skipped: Tuple[Tuple[str, str], ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        """The report as JSON values. The rows of groups are left out: they say nothing of their own."""
        data = asdict(self)
        del data['groups']
        for row in data['structures']:
            del row['count']
        skipped = [{'where': where, 'why': why} for where, why in self.skipped]
        return {**data, 'structures': list(data['structures']), 'skipped': skipped}

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
        else:
            lines.append('nothing can be cut: every width is held by the input, the output or a mixing of channels')
        if self.skipped:
            lines += ['', 'nothing is cut around:']
            lines += [shorten(f'  {where}: {why}', _WIDTH) for where, why in self.skipped]
        return '\n'.join(lines)


def make_report(name: str, traced: Trace) -> Report:
    """The report of a model that was traced.

    Args:
        name: What the report calls it.
        traced: Its trace.
    """
    cost, structures = traced.cost, traced.structures
    dense = cost.counts({s.name: s.units for s in structures})
    inside = [s for s in structures if s.kind != 'blocks']  # a block taken out whole cuts no layer
    return Report(
        model=name,
        macs=cost('macs', dense),
        params=cost('params', dense),
        macs_share=cost.share('macs', {s.name for s in inside}, dense),
        macs_share_exact=cost.share('macs', {s.name for s in inside if s.exact}, dense),
        structures=tuple(_row([s], cost, dense) for s in structures),
        groups=tuple(_row(alike, cost, dense) for alike in _alike(structures)),
        skipped=tuple((s.where, s.why) for s in traced.skipped),
    )


def _row(alike: Sequence[Structure], cost: CostModel, dense) -> Row:
    first = alike[0]
    share = cost.share('macs', {s.name for s in alike}, dense)
    name = _pattern([s.name for s in alike])
    return Row(name, first.kind, first.units, share, first.exact, first.reason, first.stream, len(alike))


def _alike(structures: Iterable[Structure]) -> List[List[Structure]]:
    """Structures that differ by nothing but the numbers of their blocks, together."""
    groups: Dict[Tuple, List[Structure]] = {}
    for s in structures:
        block, _, layer = (s.name, '', '') if s.kind == 'blocks' else s.name.rpartition('.')
        key = (re.sub(r'\d+', '0', block), layer, s.kind, s.units, s.exact, s.reason, s.stream)
        groups.setdefault(key, []).append(s)
    return list(groups.values())


def _pattern(names: Sequence[str]) -> str:
    """The name that they share, with ``*`` for the numbers that differ."""
    columns = zip(*(re.split(r'(\d+)', name) for name in names))
    return ''.join(parts[0] if len(set(parts)) == 1 else '*' for parts in columns)


def _table(rows: Sequence[Row]) -> List[str]:
    cells = [('structure', 'kind', 'units', 'MACs', 'exact')]
    for row in rows:
        units = f'{row.units}' if row.count == 1 else f'{row.count} x {row.units}'
        exact = 'yes' if row.exact else f'no: {row.reason}'
        cells.append((row.name, row.kind, units, percent(row.macs_share), exact))
    name, kind, units, share = (max(len(row[i]) for row in cells) for i in range(4))
    room = _WIDTH - kind - units - share - 4 * 2 - 24  # 24: the start of the reason
    name = min(name, room)
    return [
        shorten(
            f'{shorten(row[0], name):<{name}}  {row[1]:<{kind}}  {row[2]:>{units}}  {row[3]:>{share}}  {row[4]}',
            _WIDTH,
        ).rstrip()
        for row in cells
    ]
