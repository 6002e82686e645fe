"""Pictures, drawn where matplotlib is installed and left out where it isn't."""
from pathlib import Path
from typing import Any, Callable, Tuple

from .plan import Plan

__all__ = ['draw', 'draw_layers']


def draw(path: Path, size: Tuple[float, float], paint: Callable[[Any], None]) -> bool:
    """Write one picture. The same content gives the same bytes.

    Args:
        path: A PNG file; its folder is made where it's missing.
        size: Width and height in inches.
        paint: Fills the figure it is given.

    Returns:
        Whether it was drawn: not where matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and no global state
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(figure)
    paint(figure)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={'Software': None})
    return True


def draw_layers(path: Path, plan: Plan) -> bool:
    """Draw how many units each structure had and has left."""
    return draw(path, (8, max(2.5, 1 + 0.16 * len(plan.cuts))), lambda figure: _layers(figure, plan))


def _layers(figure: Any, plan: Plan) -> None:
    axis = figure.add_subplot()
    names = [cut.structure.name for cut in plan.cuts]
    axis.barh(names, [cut.structure.units for cut in plan.cuts], color='#e3e3e3', label='dense')
    axis.barh(names, [len(cut.keep) for cut in plan.cuts], color='#1f4e8c', label='left')
    axis.invert_yaxis()
    axis.tick_params(labelsize='x-small')
    axis.set(xlabel='units')
    axis.legend(fontsize='small')
