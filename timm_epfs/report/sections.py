"""The sections of a page about pruned models: what was measured and cut, as texts, tables and charts."""
import json
from math import isfinite
from typing import Collection, List, Mapping, Optional, Tuple, Union

from ..core import percent
from ..importance import SHARES, Curve, Sensitivity
from ..plan import Plan
from .charts import Axis, Chart, Line, axis_of
from .comparison import Rows
from .layers import Layer, layers_of
from .page import Bar, Code, Figures, Name, Number, Section, Spark, Table

__all__ = ['accuracy_section', 'comparison_section', 'layers_section', 'sensitivity_section']

_TOP1 = 'top-1'  # how the labels of accuracies start
_LEAST_DIVERGENCE = 1e-5  # as low as curves are drawn


def comparison_section(compared: Mapping[str, Rows], notes: str = '') -> Section:
    """Dense against pruned, in numbers.

    Args:
        compared: What ``compare`` gave for each pruned model, by the model's name. All are of one dense model.
        notes: How it was measured.
    """
    first = next(iter(compared.values()))
    note = f'{notes[:1].upper()}{notes[1:]}.' if notes else ''
    if len(compared) == 1:
        figures = [
            (label, _change(label, *pair), f'{show(pair[0])} → {show(pair[1])}')
            for label, (pair, show) in first.items()]
        return Section('Dense against pruned', note, [Figures(figures)])
    rows = []
    for label, ((dense, _), show) in first.items():
        pairs = [measured[label][0] for measured in compared.values()]
        cells = [Number(show(pruned), _change(label, dense, pruned)) for _, pruned in pairs]
        rows.append((Name(label), Number(show(dense)), *cells))
    return Section('Dense against pruned', note, [Table(('', 'dense', *compared), rows)])


def _change(label: str, dense: float, pruned: float) -> str:
    """What the pruned model has of a quantity: points more or less of an accuracy, percent of anything else."""
    if label.startswith(_TOP1):
        return f'{pruned - dense:+.2f}'
    return f'{100 * (pruned / dense - 1):+.1f} %' if dense else '-'


def accuracy_section(compared: Mapping[str, Rows]) -> List[Section]:
    """Top-1 against MACs over all budgets, from the dense model on; no section where no top-1 is known.

    Args:
        compared: As in ``comparison_section``.
    """
    labels = dict.fromkeys(label for rows in compared.values() for label in rows if label.startswith(_TOP1))
    if not labels:
        return []
    lines = []
    for label in labels:
        points = set()
        for rows in compared.values():
            if label in rows:
                (dense_macs, macs), (dense, pruned) = rows['MACs'][0], rows[label][0]
                points |= {(100.0, dense), (100 * macs / dense_macs, pruned)}
        lines.append(Line(label, sorted(points), has_dots=True))
    x = Axis('MACs, % of the dense model', 0, max(100.0, *(x for line in lines for x, _ in line.points)))
    y = axis_of('top-1, %', [y for line in lines for _, y in line.points])
    text = 'The dense model is at the right.'
    return [Section('Accuracy against MACs', text, [Chart('Top-1 by the MACs that are left', x, y, lines)])]


def layers_section(plans: Mapping[str, Plan]) -> Section:
    """What stays of each structure, in the order of the layers, and how that was found.

    Args:
        plans: The plan of each pruned model, by the model's name.
    """
    cuts = {name: {(layer.name, layer.kind): layer for layer in layers_of(plan)} for name, plan in plans.items()}
    shown = max(cuts.values(), key=len)  # a plan lists its blocks only if some went
    kept = [
        key for key in shown
        if key[1] != 'blocks' or any(layers[key].is_gone for layers in cuts.values() if key in layers)]
    rows = [(_name_of(shown[key]), *(_bar_of(layers.get(key)) for layers in cuts.values())) for key in kept]
    head = ('layer', *(plans if len(plans) > 1 else ('left',)))
    recipes = [
        Code(f'How the cut was found{f": {name}" if len(plans) > 1 else ""}', json.dumps(
            plan.to_dict()['recipe'], indent=1, ensure_ascii=False)) for name, plan in plans.items()]
    sentences = [_count_cut(layers.values(), name if len(plans) > 1 else '') for name, layers in cuts.items()]
    text = f'{" ".join(sentences)} Coupled layers lose the same units and share a row.'
    return Section('What went, by layer', text, [Table(head, rows), *recipes])


def _count_cut(layers: Collection[Layer], name: str) -> str:
    """How many structures got narrower and how many blocks went, in one sentence."""
    inner = [layer for layer in layers if layer.kind != 'blocks']
    narrower = sum(layer.left < layer.dense and not layer.is_gone for layer in inner)
    blocks = sum(layer.is_gone for layer in layers if layer.kind == 'blocks')
    whole = f', and {blocks} whole block{"s" if blocks > 1 else ""} went (hatched, with the layers inside)'
    return f'{f"{name}: " if name else ""}{narrower} of {len(inner)} structures got narrower{whole if blocks else ""}.'


def _name_of(layer: Layer) -> Name:
    return Name(layer.name, 'a block' if layer.kind == 'blocks' else f'{layer.dense} {layer.kind}', layer.coupled)


def _bar_of(layer: Optional[Layer]) -> Union[Bar, Number]:
    if layer is None:  # the plan has no such structure
        return Number('-')
    return Bar('gone' if layer.is_gone else str(layer.left), layer.left / layer.dense, layer.is_gone)


def sensitivity_section(sensitivity: Sensitivity) -> Section:
    """What the output loses as each structure gets narrower, one small curve for each.

    Args:
        sensitivity: What was measured.
    """
    measured = [value for curve in sensitivity.curves.values() for value in curve.divergence if isfinite(value)]
    scale = Axis('divergence', _LEAST_DIVERGENCE, max(10 * _LEAST_DIVERGENCE, *measured), is_log=True)
    has_top1 = isfinite(sensitivity.top1)
    rows = [_sensitivity_row(name, curve, scale, has_top1) for name, curve in sensitivity.curves.items()]
    quality = 'top-1, %' if has_top1 else 'same class'
    dense = f'; the dense model has top-1 {sensitivity.top1:.1f} %' if has_top1 else ''
    text = (
        f'What the output loses as one structure after the other gets narrower, on {sensitivity.images} images{dense}. '
        f'Curves: the divergence of the output, on a logarithmic scale from {scale.low:g} to {scale.high:.2g}, while '
        f'{percent(SHARES[0])} to {percent(SHARES[-1])} of the units go. Numbers: with about half of the units.')
    return Section('Sensitivity', text, [Table(('layer', 'curve', 'divergence', quality), rows)])


def _sensitivity_row(name: str, curve: Curve, scale: Axis, has_top1: bool) -> Tuple[Name, Spark, Number, Number]:
    spark = Spark(tuple(zip(SHARES, map(scale.share, curve.divergence_by_share))))
    same = curve.same_class[curve.half]
    quality = f'{curve.top1[curve.half]:.1f}' if has_top1 else percent(same) if isfinite(same) else '-'
    units = f'{curve.units} unit{"s" if curve.units > 1 else ""}'
    return Name(name, units), spark, Number(f'{curve.divergence[curve.half]:.2g}'), Number(quality)
