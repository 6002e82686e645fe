"""A picture of what the output loses as each structure gets narrower."""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core import percent
from ..importance import SHARES, Sensitivity
from .pictures import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw_sensitivity']


def draw_sensitivity(path: Path, sensitivity: Sensitivity, title: str = '') -> bool:
    """Write a picture of all curves to a PNG file: one row per structure, dark where the output loses much.

    Args:
        path: As in ``draw``.
        sensitivity: What was measured.
        title: Title of the picture. Empty: none.

    Returns:
        As ``draw`` does.
    """
    names = list(sensitivity.curves)

    def paint(figure: 'Figure') -> None:
        from matplotlib.colors import LogNorm
        axis = figure.subplots()
        values = np.maximum([curve.divergence_by_share for curve in sensitivity.curves.values()], 1e-5)
        image = axis.imshow(values, aspect='auto', cmap='Blues', norm=LogNorm())
        axis.set_yticks(range(len(names)), names, fontsize='x-small')
        axis.set_xticks(range(len(SHARES)), [percent(share) for share in SHARES], fontsize='x-small')
        axis.set_xlabel('share of the units removed, one at least')
        axis.set_title(title, fontsize='medium')
        figure.colorbar(image, label='divergence of the output')

    return draw(path, (7.0, 1.4 + 0.17 * len(names)), paint)
