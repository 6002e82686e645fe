"""Pictures of a run: accuracy and MACs over time, the masks while they were learned, what is left of each layer."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..plan import Plan
from ..report import draw, draw_layers

__all__ = ['draw_all', 'mask_histogram', 'masks_over_time']

BINS = 24
_COLOURS = {'dense': '#dbe9f6', 'sparse': '#fde5cf', 'finetune': '#ddf0dd'}


def mask_histogram(masks: Sequence[Any]) -> Dict[str, Any]:
    """How the masks of a learner are spread, small enough to keep one for each epoch.

    Args:
        masks: Values of each structure's units.

    Returns:
        ``zero``: how many are exactly zero; ``counts`` of the others in bins up to ``top``.
    """
    values = np.concatenate([np.asarray(mask, dtype=np.float64).ravel() for mask in masks] or [np.zeros(0)])
    alive = np.abs(values[values != 0])
    top = max(1.0, float(alive.max(initial=0.0)))
    return {'zero': int((values == 0).sum()), 'counts': np.histogram(alive, BINS, (0, top))[0].tolist(), 'top': top}


def draw_all(
        folder: Path,
        history: Sequence[Mapping[str, Any]],
        masks: Sequence[Mapping[str, Any]],
        plan: Plan,
) -> List[Tuple[str, str]]:
    """Draw what there is to draw.

    Returns:
        Title and file name of each picture; none where matplotlib isn't installed.
    """
    drawings = [('Accuracy and MACs over time', 'accuracy.png', (8, 4), lambda figure: _accuracy(figure, history))]
    if masks:
        drawings.append(
            ('Masks while they were learned', 'masks.png', (10, 3.5), lambda figure: _masks(figure, history, masks)))
    drawn = [(title, name) for title, name, size, paint in drawings if draw(folder / name, size, paint)]
    return [*drawn, ('Units left', 'layers.png')] if draw_layers(folder / 'layers.png', plan) else drawn


def _accuracy(figure: Any, history: Sequence[Mapping[str, Any]]) -> None:
    axis = figure.add_subplot()
    rows = [row for row in history if row['phase'] != 'cut']
    epochs, marks = [row['epoch'] for row in rows], [row['epoch'] for row in history]  # a cut falls between epochs
    for phase, colour in _COLOURS.items():
        inside = [row['epoch'] for row in rows if row['phase'] == phase]
        if inside:
            axis.axvspan(inside[0] - 1, inside[-1], color=colour, label=phase, zorder=0)
    axis.plot(epochs, [row['train_top1'] for row in rows], ':', color='#1f4e8c', label='train top1')
    axis.plot(marks, [row['eval_top1'] for row in history], '-', color='#1f4e8c', label='eval top1')
    axis.set(xlabel='epoch', ylabel='top-1, %', xlim=(0, max(epochs, default=1)))
    share = axis.twinx()
    share.plot(marks, [100 * row['alive'] for row in history], color='#c0392b', label='MACs alive')
    share.set(ylabel='MACs alive, %', ylim=(0, 105))
    lines = [*axis.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    axis.legend(lines, [line.get_label() for line in lines], loc='lower left', fontsize='small')


def masks_over_time(axis: Any, strength: Optional[Any], history: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """Draw the share of the MACs that is alive, and λ, over the epochs in which masks are learned.

    Args:
        axis: Of the share; starts at the dense model.
        strength: Of λ, logarithmic; None for methods that have none.
        history: One row an epoch.
        **style: Of both lines.
    """
    rows = [row for row in history if row['phase'] == 'sparse']
    epochs = list(range(1, len(rows) + 1))
    axis.plot([0, *epochs], [100, *(100 * row['alive'] for row in rows)], **style)
    axis.set(xlabel='sparse epoch', ylabel='MACs alive, %', ylim=(0, 105))
    if strength is not None:
        strength.plot(epochs, [row['lambda'] for row in rows], **style)
        strength.set(xlabel='sparse epoch', ylabel='λ', yscale='log')
        strength.xaxis.get_major_locator().set_params(integer=True)


def _masks(figure: Any, history: Sequence[Mapping[str, Any]], masks: Sequence[Mapping[str, Any]]) -> None:
    steered = any('lambda' in row for row in history)
    alive, *strength, spread = figure.subplots(1, 3 if steered else 2)
    masks_over_time(alive, strength[0] if steered else None, history, marker='.', color='#c0392b')
    for at in sorted({0, len(masks) // 2, len(masks) - 1}):
        histogram = masks[at]
        edges = np.linspace(0, histogram['top'], BINS + 1)
        spread.stairs(histogram['counts'], edges, label=f'epoch {at + 1}: {histogram["zero"]} exactly zero')
    spread.set(xlabel='mask, where not zero', ylabel='units')
    spread.legend(fontsize='x-small')
