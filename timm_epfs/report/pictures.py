"""Pictures: what is left of each layer, and the files that cards and reports show.

matplotlib is imported when something is drawn. Figures are made without ``pyplot``: no window, and no global state.
"""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, List, Mapping, Set, Tuple, Union

import numpy as np
from PIL import Image
from torch import nn

from ..core import KINDS, PruningError, one_line
from ..plan import Cut, Plan
from ..zoo import as_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['draw', 'draw_layers', 'new_figure', 'plot']

_GREY = '#dcdcdc'
_COLOURS = {
    'channels': '#1f4e8c', 'heads': '#c0562b', 'head_dims': '#b8860b', 'groups': '#2e7d5b', 'blocks': '#6a4c93',
}
_NAMES = 48  # that many fit below the bars; of more, every second or third is shown
_LETTERS = 28


def plot(model: Union[nn.Module, Plan, Mapping[str, Any], str, Path]) -> 'Figure':
    """Draw how many units each layer had and has left, as bars along the depth.

    One row of bars for each kind of unit, in the order of the model's layers: dense in grey, what is left in colour,
    what went with a whole block hatched. Heights are on a square-root scale: narrow layers show beside wide ones.

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
    """Write the picture of ``plot``, with a title where one is given. Path and return value are those of ``draw``."""
    def paint(figure: 'Figure') -> None:
        _layers(figure, plan)
        if title:
            figure.suptitle(title, fontsize='medium')

    return draw(path, _size(plan), paint)


def draw(path: Path, size: Tuple[float, float], paint: Callable[['Figure'], None]) -> bool:
    """Write one picture. The same content gives the same bytes.

    Args:
        path: A PNG file; its folder is made where it's missing.
        size: Width and height in inches.
        paint: Fills the figure it is given.

    Returns:
        Whether it was drawn: not where matplotlib isn't installed.
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
    pixels.quantize(64).save(path, optimize=True)  # a third of the bytes that savefig writes
    return True


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
        raise PruningError("pictures need matplotlib, which isn't installed: pip install 'timm-epfs[plot]'") from None
    figure = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _plan_of(model: Any) -> Plan:
    if isinstance(model, nn.Module):
        if not isinstance(getattr(model, 'pruning_plan', None), Plan):
            raise PruningError(f'plot: this {type(model).__name__} has no pruning_plan; give what prune() returned')
        return model.pruning_plan
    if not isinstance(model, (str, Path)) or not Path(model).is_dir():
        return as_plan(model)
    with one_line(f'plot: {model} holds no model that timm_epfs saved'):
        config = json.loads((Path(model) / 'config.json').read_text(encoding='utf-8'))
        return Plan.from_dict(config['model_args']['plan'])


def _shown(plan: Plan) -> List[Cut]:
    """What has a bar, in the order of the layers. Blocks have one only where some were taken out."""
    inner = [cut for cut in plan.cuts if cut.structure.kind != 'blocks']
    blocks = [cut for cut in plan.cuts if cut.structure.kind == 'blocks']
    if all(len(cut.keep) for cut in blocks):
        return inner
    at = {id(cut): float(i) for i, cut in enumerate(inner)}
    for block in blocks:  # before the first layer in it
        inside = (i for i, cut in enumerate(inner) if cut.structure.name.startswith(f'{block.structure.name}.'))
        at[id(block)] = next(inside, len(inner)) - 0.5
    return sorted((*inner, *blocks), key=lambda cut: at[id(cut)])


def _gone(plan: Plan) -> Set[str]:
    """Structures of which nothing is left: removed blocks, and what was only in them."""
    blocks = {cut.structure.name for cut in plan.cuts if not len(cut.keep)}
    lost = plan.lost(member.tensor for cut in plan.cuts for member in cut.structure.members)
    inside = {cut.structure.name for cut in plan.cuts if all(m.tensor in lost for m in cut.structure.members)}
    return blocks | inside


def _kinds(plan: Plan) -> List[str]:
    present = {cut.structure.kind for cut in _shown(plan)}
    return [kind for kind in KINDS if kind in present]


def _size(plan: Plan) -> Tuple[float, float]:
    names = _names(_shown(plan))
    below = 0.085 * max(map(len, names), default=0)
    return max(6.0, min(15.0, 1.5 + 0.2 * len(names))), 0.8 + 1.9 * max(1, len(_kinds(plan))) + below


def _names(cuts: List[Cut]) -> List[str]:
    names = [cut.structure.name for cut in cuts]
    return [name if len(name) <= _LETTERS else f'…{name[1 - _LETTERS:]}' for name in names]


def _layers(figure: 'Figure', plan: Plan) -> None:
    from matplotlib.ticker import FixedLocator
    shown, kinds, gone = _shown(plan), _kinds(plan), _gone(plan)
    heights = [0.4 if kind == 'blocks' else 1.0 for kind in kinds] or [1.0]
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, kind in zip(rows, kinds):
        at = [i for i, cut in enumerate(shown) if cut.structure.kind == kind]
        whole = [shown[i].structure.units for i in at]
        left = [0 if shown[i].structure.name in gone else len(shown[i].keep) for i in at]
        axis.bar(at, whole, width=0.8, color=_GREY, label='dense')
        axis.bar(at, left, width=0.8, color=_COLOURS[kind], label='left')
        hatched = [(i, units) for i, units in zip(at, whole) if shown[i].structure.name in gone]
        if hatched:
            axis.bar(
                *zip(*hatched), width=0.8, color='none', edgecolor='#777777', hatch='////', linewidth=0,
                label='gone with its block')
        top = max(whole)
        axis.set_yscale('function', functions=(lambda y: abs(y) ** 0.5, lambda y: y ** 2))
        axis.set(ylim=(0, 1.03 * top), ylabel=kind)
        axis.yaxis.set_major_locator(FixedLocator(sorted({0, *(max(1, round(top * s)) for s in (1 / 16, 1 / 4, 1))})))
        axis.legend(fontsize='x-small', ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)
        axis.spines[['top', 'right']].set_visible(False)
    step = -(-len(shown) // _NAMES)
    names = _names(shown)
    rows[-1].set_xticks(range(0, len(shown), step or 1), names[::step or 1], rotation=90, fontsize='x-small')
    rows[-1].set_xlim(-0.7, len(shown) - 0.3)
