"""Pictures: the units that each layer keeps, and the image files that cards and reports show.

matplotlib is imported only when something is drawn. Figures are made without ``pyplot``, so that no window opens and no
global state changes.
"""
import json
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from torch import nn

from ..core import KINDS, PruningError, check_place, one_line
from ..plan import Plan
from ..zoo import as_plan
from .layers import Layer, layers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['check_picture', 'draw', 'draw_layers', 'new_figure', 'plot']

_GREY = '#dcdcdc'
_COLOURS = {
    'channels': '#1f4e8c', 'heads': '#c0562b', 'head_dims': '#b8860b', 'groups': '#2e7d5b', 'blocks': '#6a4c93',
}
_NAMES = 48  # names that fit below the bars; of a longer list, every second, third … name is shown
_LETTERS = 28  # longest name that is shown whole


def plot(model: Union[nn.Module, Plan, Mapping[str, Any], str, Path]) -> 'Figure':
    """Draw how many units each layer had and how many it keeps, as bars in the order of the layers.

    There is one row of bars for each kind of unit. The dense model is grey, the units that are kept are coloured, and
    layers that were removed with a whole block are hatched. Heights are on a square-root scale, so that narrow layers
    are visible beside wide ones.

    Args:
        model: A pruned model, a plan, its dict, the path of its JSON, or the folder of a saved model.

    Returns:
        The figure: ``plot(slim).savefig('layers.png')``.

    Raises:
        PruningError: There is no plan, or matplotlib isn't installed.
    """
    plan = _plan_of(model)
    figure = new_figure(_size(plan))
    _layers(figure, plan)
    return figure


def draw_layers(path: Path, plan: Plan, title: str = '') -> bool:
    """Write the picture of ``plot`` to a file.

    Args:
        path: As in ``draw``.
        plan: The plan to draw.
        title: Title of the picture. Empty: none.

    Returns:
        As ``draw`` does.
    """
    def paint(figure: 'Figure') -> None:
        _layers(figure, plan)
        if title:
            figure.suptitle(title, fontsize='medium')

    return draw(path, _size(plan), paint)


def draw(path: Path, size: Tuple[float, float], paint: Callable[['Figure'], None]) -> bool:
    """Write one picture. The same content always gives the same bytes.

    Args:
        path: The PNG file to write. Its folder is created if it doesn't exist.
        size: Width and height in inches.
        paint: Draws into the figure that it is given.

    Returns:
        Whether the picture was written. It is not if matplotlib isn't installed.
    """
    try:
        figure = new_figure(size)
    except PruningError:
        return False
    paint(figure)
    figure.set_dpi(110)
    figure.canvas.draw()
    path.parent.mkdir(exist_ok=True)
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert('RGB')
    pixels.quantize(64).save(path, optimize=True)  # a third of the size that savefig would write
    return True


def check_picture(path: Path, what: str) -> None:
    """Check before a long computation that a picture of its result can be drawn.

    Args:
        path: The file.
        what: What the message starts with.

    Raises:
        PruningError: It isn't a .png file, it can't be written, or matplotlib isn't installed.
    """
    check_place(path, what)
    if path.suffix != '.png':
        raise PruningError(f'{what} {path} was given, only .png is drawn; name a .png file')
    new_figure((1, 1))


def new_figure(size: Tuple[float, float]) -> 'Figure':
    """An empty figure.

    Args:
        size: Width and height in inches.

    Raises:
        PruningError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PruningError("pictures need matplotlib, which isn't installed; pip install 'timm-epfs[plot]'") from None
    figure = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _plan_of(model: Any) -> Plan:
    if isinstance(model, nn.Module):
        if not isinstance(getattr(model, 'pruning_plan', None), Plan):
            raise PruningError(
                f'plot: this {type(model).__name__} has no pruning_plan; give a model that prune() returned')
        return model.pruning_plan
    if not isinstance(model, (str, Path)) or not Path(model).is_dir():
        return as_plan(model)
    with one_line(f'plot: {model} holds no model that timm_epfs saved'):
        config = json.loads((Path(model) / 'config.json').read_text(encoding='utf-8'))
        return Plan.from_dict(config['model_args']['plan'])


def _kinds(layers: Sequence[Layer]) -> List[str]:
    present = {layer.kind for layer in layers}
    return [kind for kind in KINDS if kind in present]


def _size(plan: Plan) -> Tuple[float, float]:
    layers = layers_of(plan)
    names = _names(layers)
    names_height = 0.085 * max(map(len, names), default=0)
    width = max(6.0, min(15.0, 1.5 + 0.2 * len(names)))
    return width, 0.8 + 1.9 * max(1, len(_kinds(layers))) + names_height


def _names(layers: Sequence[Layer]) -> List[str]:
    names = [layer.name for layer in layers]
    return [name if len(name) <= _LETTERS else f'…{name[1 - _LETTERS:]}' for name in names]


def _layers(figure: 'Figure', plan: Plan) -> None:
    layers = layers_of(plan)
    kinds = _kinds(layers)
    heights = [0.4 if kind == 'blocks' else 1.0 for kind in kinds] or [1.0]
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, kind in zip(rows, kinds):
        positions = [i for i, layer in enumerate(layers) if layer.kind == kind]
        _bars(axis, kind, positions, [layers[i] for i in positions])
        axis.legend(fontsize='x-small', ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)
        axis.spines[['top', 'right']].set_visible(False)
    step = max(1, ceil(len(layers) / _NAMES))
    rows[-1].set_xticks(range(0, len(layers), step), _names(layers)[::step], rotation=90, fontsize='x-small')
    rows[-1].set_xlim(-0.7, len(layers) - 0.3)


def _bars(axis: 'Axes', kind: str, positions: List[int], layers: List[Layer]) -> None:
    """Draw the row of bars of one kind, on a square-root scale."""
    from matplotlib.ticker import FixedLocator
    dense = [layer.dense for layer in layers]
    axis.bar(positions, dense, width=0.8, color=_GREY, label='dense')
    axis.bar(positions, [layer.left for layer in layers], width=0.8, color=_COLOURS[kind], label='left')
    hatched = [(at, layer.dense) for at, layer in zip(positions, layers) if layer.is_gone]
    if hatched:
        axis.bar(
            *zip(*hatched), width=0.8, color='none', edgecolor='#777777', hatch='////', linewidth=0,
            label='gone with its block')
    top = max(dense)
    axis.set_yscale('function', functions=(lambda y: abs(y) ** 0.5, lambda y: y ** 2))
    axis.set(ylim=(0, 1.03 * top), ylabel=kind)
    axis.yaxis.set_major_locator(
        FixedLocator(sorted({0, *(max(1, round(top * share)) for share in (1 / 16, 1 / 4, 1))})))
