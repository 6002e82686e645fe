"""Pictures of a run: accuracy and MACs over the epochs, the masks as they were learned, the units of each layer."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..plan import Plan
from ..report import draw, draw_layers

__all__ = ['draw_all', 'mask_histogram', 'masks_over_time']

BINS = 24  # of the histogram of mask values
_COLOURS = {'dense': '#dbe9f6', 'sparse': '#fde5cf', 'finetune': '#ddf0dd'}


def mask_histogram(masks: Sequence[Any]) -> Dict[str, Any]:
    """The distribution of a learner's mask values, small enough to be kept for each epoch.

    Args:
        masks: The mask of each structure, shape (units,).

    Returns:
        ``zero``: number of values that are exactly zero. ``counts``: histogram of the absolute values of the others,
        in bins from 0 to ``top``.
    """
    values = np.concatenate([np.asarray(mask, dtype=np.float64).ravel() for mask in masks] or [np.zeros(0)])
    magnitudes = np.abs(values[values != 0])
    top = max(1.0, float(magnitudes.max(initial=0.0)))
    counts, _ = np.histogram(magnitudes, BINS, (0, top))
    return {'zero': int((values == 0).sum()), 'counts': counts.tolist(), 'top': top}


def draw_all(
        folder: Path,
        history: Sequence[Mapping[str, Any]],
        masks: Sequence[Mapping[str, Any]],
        plan: Plan,
) -> List[Tuple[str, str]]:
    """Draw the pictures of a run. The one of the masks is drawn only if masks were learned.

    Returns:
        Title and file name of each picture. Empty if matplotlib isn't installed.
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
    epochs = [row['epoch'] for row in rows]
    epochs_and_cut = [row['epoch'] for row in history]  # the cut is measured once more, after its epoch
    for phase, colour in _COLOURS.items():
        inside = [row['epoch'] for row in rows if row['phase'] == phase]
        if inside:
            axis.axvspan(inside[0] - 1, inside[-1], color=colour, label=phase, zorder=0)
    axis.plot(epochs, [row['train_top1'] for row in rows], ':', color='#1f4e8c', label='train top1')
    axis.plot(epochs_and_cut, [row['eval_top1'] for row in history], '-', color='#1f4e8c', label='eval top1')
    axis.set(xlabel='epoch', ylabel='top-1, %', xlim=(0, max(epochs, default=1)))
    share = axis.twinx()
    share.plot(epochs_and_cut, [100 * row['alive'] for row in history], color='#c0392b', label='MACs alive')
    share.set(ylabel='MACs alive, %', ylim=(0, 105))
    lines = [*axis.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    axis.legend(lines, [line.get_label() for line in lines], loc='lower left', fontsize='small')


def masks_over_time(axis: Any, strength: Optional[Any], history: Sequence[Mapping[str, Any]], **style: Any) -> None:
    """Draw the share of the MACs whose masks are not zero ("alive"), and λ, over the epochs of the sparse phase.

    Args:
        axis: The axis of the share of MACs, which starts at 100 % for the dense model.
        strength: The axis of λ, which is logarithmic. None for methods without λ.
        history: One row per epoch.
        **style: Style of both lines.
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
    has_lambda = any('lambda' in row for row in history)
    alive, *strength, spread = figure.subplots(1, 3 if has_lambda else 2)
    masks_over_time(alive, strength[0] if has_lambda else None, history, marker='.', color='#c0392b')
    for i in sorted({0, len(masks) // 2, len(masks) - 1}):  # the first, the middle and the last epoch
        histogram = masks[i]
        edges = np.linspace(0, histogram['top'], BINS + 1)
        spread.stairs(histogram['counts'], edges, label=f'epoch {i + 1}: {histogram["zero"]} exactly zero')
    spread.set(xlabel='mask, where not zero', ylabel='units')
    spread.legend(fontsize='x-small')
