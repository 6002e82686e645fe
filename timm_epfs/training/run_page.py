"""The HTML page of a run: dense against pruned, accuracy over the epochs, the masks as they were learned."""
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple

import numpy as np

from ..core import percent
from ..plan import Plan
from ..report import (
    Axis,
    Band,
    Cell,
    Chart,
    Line,
    Rows,
    Section,
    accuracy_section,
    axis_of,
    comparison_section,
    layers_section,
    write_page,
)
from .run_pictures import BINS

__all__ = ['write_run_page']

_MOST_COLUMNS = 48  # of the density of the masks: of a longer phase, every second, third … epoch is shown


def write_run_page(
        path: Path,
        options: Mapping[str, Any],
        rows: Rows,
        notes: str,
        history: Sequence[Mapping[str, Any]],
        masks: Sequence[Mapping[str, Any]],
        plan: Plan,
) -> None:
    """Write the page. Its arguments are those of ``write_report``, but ``path`` is the .html file.

    Raises:
        PruningError: The file can't be written.
    """
    dense, pruned = rows['MACs'][0]
    method = 'in one shot' if options['method'] == 'none' else f'by the method {options["method"]}'
    lead = f'Pruned by timm_epfs to {percent(pruned / dense)} of its MACs, {method}.'
    compared = {'pruned': rows}
    sections = [
        comparison_section(compared, notes), *accuracy_section(compared), *_epochs(history), *_masks(history, masks),
        layers_section({'pruned': plan})]
    write_page(path, options['model'], lead, sections)


def _epochs(history: Sequence[Mapping[str, Any]]) -> List[Section]:
    return [Section('While it was trained', '', [_accuracy(history)])] if history else []


def _masks(history: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]]) -> List[Section]:
    if not masks:
        return []
    text = 'A mask that becomes zero takes its unit out of the model. Epochs are those of the sparse phase.'
    return [Section('Masks over time', text, [_zeros(history, masks), *_strength(history), _density(masks)])]


def _accuracy(history: Sequence[Mapping[str, Any]]) -> Chart:
    rows = [row for row in history if row['phase'] != 'cut']
    lines = [
        Line('validation', [(row['epoch'], row['eval_top1']) for row in history]),  # the cut is measured once more
        Line('training', [(row['epoch'], row['train_top1']) for row in rows]),
    ]
    bands = []
    for phase in dict.fromkeys(row['phase'] for row in rows):
        inside = [row['epoch'] for row in rows if row['phase'] == phase]
        bands.append(Band({'finetune': 'fine-tuning'}.get(phase, f'{phase} phase'), inside[0] - 1, inside[-1]))
    y = axis_of('top-1, %', [value for line in lines for _, value in line.points])
    return Chart('Top-1 by epoch', Axis('epoch', 0, max(1, history[-1]['epoch'])), y, lines, bands)


def _sparse(history: Sequence[Mapping[str, Any]]) -> List[Tuple[int, Mapping[str, Any]]]:
    """The rows of the sparse phase, each with its number in it."""
    return list(enumerate((row for row in history if row['phase'] == 'sparse'), 1))


def _zeros(history: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]]) -> Chart:
    zeros = [100 * histogram['zero'] / max(1, histogram['zero'] + sum(histogram['counts'])) for histogram in masks]
    alive = [(0, 100.0), *((epoch, 100 * row['alive']) for epoch, row in _sparse(history))]
    lines = [Line('MACs whose masks are not zero', alive), Line('masks that are zero', list(enumerate(zeros, 1)))]
    return Chart('What is left', Axis('epoch', 0, len(masks)), Axis('%', 0, 105), lines)


def _strength(history: Sequence[Mapping[str, Any]]) -> List[Chart]:
    points = [(epoch, row['lambda']) for epoch, row in _sparse(history) if row.get('lambda')]
    if not points:
        return []
    y = axis_of('λ', [value for _, value in points], is_log=True)
    return [Chart('Strength of the penalty', Axis('epoch', 0, points[-1][0]), y, [Line('λ', points)])]


def _density(masks: Sequence[Mapping[str, Any]]) -> Chart:
    """How the values of the masks that are not zero spread, one column for each epoch."""
    every = -(-len(masks) // _MOST_COLUMNS)
    most = max(max(histogram['counts']) for histogram in masks) or 1
    cells = []
    for i in range(0, len(masks), every):
        edges = np.linspace(0, masks[i]['top'], BINS + 1).tolist()
        columns = (i, min(i + every, len(masks)))
        cells += [
            Cell(columns, (low, high), (count / most) ** 0.5)
            for low, high, count in zip(edges, edges[1:], masks[i]['counts']) if count]
    y = Axis('absolute mask', 0, max(histogram['top'] for histogram in masks))
    return Chart('Values of the masks that are not zero', Axis('epoch', 0, len(masks)), y, cells=cells)
