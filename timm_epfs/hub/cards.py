"""Model cards: what was cut, how the cut was found, and how the pruned model compares with the dense one.

The caller passes its measurements as ``metrics``; the card shows "not measured" for any that are missing. MACs,
parameters and size can't be passed: they are counted from the plan and the model. ``dataset`` is for people;
``dataset_id`` is the dataset's repo on the Hub, which then links the two. ``timm-epfs export --int8 --metrics`` adds
what it measured as ``'int8'``.

>>> metrics = {
...     'dataset': 'CIFAR-10', 'dataset_id': 'uoft-cs/cifar10',
...     'dense': {'top1': 90.0, 'latency_ms': 2.0},
...     'pruned': {'top1': 89.0, 'latency_ms': 1.0},
...     'latency': {'machine': 'my machine', 'batch_size': 1, 'dtype': 'float32', 'threads': 2},
... }
>>> check_metrics(metrics) == metrics
True
"""
import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from ..core import INTEGER, PruningError, Rule, check, format_count, is_number, one_line, percent
from ..learn import METHODS
from ..plan import Plan, recipe_steps
from ..report import draw_layers, size_on_disk
from ..surgery import build_base
from ..zoo import origin_of
from .metadata import card_metadata, is_repo_id

__all__ = ['CARD', 'FIGURE', 'check_metrics', 'is_ours', 'make_card', 'stamp', 'write_card']

CARD, FIGURE = 'README.md', 'layers.png'
TEMPLATE = Path(__file__).with_name('card_template.md')

_MISSING = 'not measured'
_WIDGETS = {'PNG': 'png', 'JPEG': 'jpg'}  # formats of a widget's image, and how its file ends
_STAMP = re.compile(r'\n*<!-- timm_epfs card ([0-9a-f]{16}) -->\s*\Z')


def write_card(
        folder: Path,
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Mapping[str, Any]] = None,
        has_weights: bool = True,
        widget_image: Optional[Path] = None,
) -> None:
    """Write ``README.md`` into a folder and, if matplotlib is installed, the picture that it shows.

    The arguments are those of ``make_card``, but ``widget_image`` is a file, which is copied into the folder.

    Raises:
        PruningError: ``make_card`` raised it, or the image can't be read or isn't a PNG or JPEG.
    """
    metrics = check_metrics(metrics)
    figure = FIGURE if draw_layers(folder / FIGURE, model.pruning_plan) else None
    widget = None if widget_image is None else _copy_widget(widget_image, folder)
    text = make_card(model, repo_id, metrics, figure, has_weights, widget)
    (folder / CARD).write_text(text, encoding='utf-8', newline='\n')


def _copy_widget(image: Path, folder: Path) -> str:
    """Copy an image as the model page's example. Returns its name there."""
    with one_line(f'widget image {image} can\'t be used; give a PNG or JPEG'):
        with Image.open(image, formats=tuple(_WIDGETS)) as opened:
            name = f'example.{_WIDGETS[opened.format]}'
        shutil.copyfile(image, folder / name)
    return name


def make_card(
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Mapping[str, Any]] = None,
        figure: Optional[str] = None,
        has_weights: bool = True,
        widget_image: Optional[str] = None,
) -> str:
    """The text of a card, with the stamp that marks it as generated.

    Args:
        model: A pruned model with its plan.
        repo_id: The repo from which the model will be loaded.
        metrics: Measurements, as in the example of this module's docstring.
        figure: File name of the picture of what was cut. None: the card shows no picture.
        has_weights: Whether the repo holds weights. Otherwise the repo's name is that of a variant, and the card shows
            how to build the variant from its plan.
        widget_image: File name of an image in the repo, which the model's page offers as an example. None: it has none.

    Raises:
        PruningError: The metrics are invalid, or the plan's base can't be built.
    """
    metrics, plan = check_metrics(metrics), model.pruning_plan
    # Saving turns some values into others (tuples into lists). Use the saved form: a loaded model has the same card.
    saved_plan = plan.to_dict()
    name = repo_id.rpartition('/')[2]
    steps = recipe_steps(saved_plan['recipe'])
    license_name = (getattr(model, 'pretrained_cfg', None) or {}).get('license')
    card = ModelCard.from_template(
        card_metadata(repo_id, license_name, origin_of(model), metrics, widget_image),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        base=plan.base,
        base_args=', '.join(f'`{key}={value!r}`' for key, value in saved_plan['base_args'].items()),
        license=license_name,  # the real name; the metadata may say "other"
        metrics=metrics,
        rows=_comparison(model, plan, metrics),
        int8_rows=_int8_comparison(metrics.get('int8', {})),
        kept=_share(*plan.cost['macs']) if 'macs' in plan.cost else 'some',
        cut=_describe_cuts(plan),
        steps=[_describe_step(step) for step in steps],
        methods=[method for method in METHODS if any(step.get('method') == method for step in steps)],
        recipe=json.dumps(saved_plan['recipe'], indent=1, ensure_ascii=False),
        figure=figure,
        has_weights=has_weights,
    )
    return stamp(str(card))


def stamp(text: str) -> str:
    """A card with a last line that holds a hash of the text above it. An edit by hand no longer matches the hash."""
    text = _STAMP.sub('', text).rstrip()
    return f'{text}\n\n<!-- timm_epfs card {_digest(text)} -->\n'


def is_ours(text: str) -> bool:
    """Whether a card has a stamp, and nobody has edited the card since it was stamped."""
    text = text.replace('\r\n', '\n')
    stamped = _STAMP.search(text)
    return stamped is not None and stamped[1] == _digest(text[:stamped.start()].rstrip())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _comparison(model: nn.Module, plan: Plan, metrics: Mapping[str, Any]) -> List[Tuple[str, str, str, str]]:
    """Rows of the table: quantity, dense value, pruned value, change."""
    dense = build_base(plan.base, plan.base_args, 'meta').to(next(model.parameters()).dtype)
    params = [sum(p.numel() for p in each.parameters()) for each in (dense, model)]
    sizes = [size_on_disk(each) for each in (dense, model)]

    def measured(quantity: str) -> List[Optional[float]]:
        return [metrics.get(which, {}).get(quantity) for which in ('dense', 'pruned')]

    return [
        _top1_row(measured('top1')),
        _row('MACs', plan.cost.get('macs', (None, None)), format_count),
        _row('parameters', params, format_count),
        _row('size, MB', sizes, lambda size: f'{size / 1e6:.2f}'),
        _latency_row(measured('latency_ms')),
    ]


def _int8_comparison(measured: Mapping[str, Any]) -> List[Tuple[str, str, str, str]]:
    """Rows of the table of the pruned model in both number formats: quantity, float32, int8, change."""
    def pair(quantity: str) -> List[Optional[float]]:
        return [measured.get(which, {}).get(quantity) for which in ('float32', 'int8')]

    return [_top1_row(pair('top1')), _latency_row(pair('latency_ms'))] if measured else []


def _relative_change(before: float, after: float) -> str:
    return f'{100 * (after / before - 1):+.1f} %'


def _row(
        quantity: str,
        pair: Any,
        show: Callable[[float], str],
        change: Callable[[float, float], str] = _relative_change,
) -> Tuple[str, str, str, str]:
    dense, pruned = (_MISSING if value is None else show(value) for value in pair)
    return quantity, dense, pruned, _MISSING if None in pair or not pair[0] else change(*pair)


def _top1_row(pair: Any) -> Tuple[str, str, str, str]:
    return _row('top-1, %', pair, '{:.2f}'.format, lambda before, after: f'{after - before:+.2f}')


def _latency_row(pair: Any) -> Tuple[str, str, str, str]:
    return _row('latency, ms', pair, '{:.2f}'.format)


def _share(before: float, after: float) -> str:
    return percent(after / before)


def _describe_cuts(plan: Plan) -> str:
    left, units = Counter(), Counter()
    for cut in plan.cuts:
        left[cut.structure.kind] += len(cut.keep)
        units[cut.structure.kind] += cut.structure.units
    kinds = ', '.join(f'{left[kind]} of {units[kind]} {kind}' for kind in sorted(units) if left[kind] < units[kind])
    number_cut = sum(len(cut.keep) < cut.structure.units for cut in plan.cuts)
    return f'{number_cut} of {len(plan.cuts)} structures were cut. Left: {kinds or "everything"}.'


def _describe_step(step: Mapping[str, Any]) -> str:
    """One sentence on how a plan was found. It calls a plan "learned" only if a method that learns found it."""
    method, criterion = (json.dumps(step.get(key)).strip('"')[:80] for key in ('method', 'criterion'))
    if method in METHODS:
        return f'Learned while the model was trained, by {METHODS[method].__name__}.'
    if criterion == 'random':
        return 'Drawn at random; nothing was learned.'
    if method == 'one-shot':
        return f'Cut in one shot by the criterion `{criterion}`; not learned.'
    if 'method' in step:
        return f'Found by `{method}`, which is none of the methods that learn.'
    return 'How it was found is not stated.'


def check_metrics(metrics: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """A checked copy of metrics, empty for None.

    Raises:
        PruningError: A key is unknown, a value is invalid, or a number lacks its context: top-1 needs the dataset;
            latency needs the machine, the batch size and the dtype; in int8, the engine in place of the dtype.
    """
    checked = check({} if metrics is None else metrics, _METRICS, 'metrics')
    int8 = checked.get('int8', {})
    measured = [checked.get(which, {}) for which in ('dense', 'pruned')]
    in_int8 = [int8.get(which, {}) for which in ('float32', 'int8')]
    if any('top1' in values for values in (*measured, *in_int8)) and 'dataset' not in checked:
        raise PruningError("metrics: top1 was given without the dataset it was measured on; add 'dataset'")
    _check_latency(measured, checked.get('latency', {}), 'latency', 'dtype')
    _check_latency(in_int8, int8, 'int8', 'engine')
    return checked


def _check_latency(measured: List[Mapping[str, Any]], context: Mapping[str, Any], name: str, runs_in: str) -> None:
    """Raise ``PruningError`` if a latency was given without its context, which ``metrics`` has under a name."""
    for key in ('machine', 'batch_size', runs_in):
        if any('latency_ms' in values for values in measured) and key not in context:
            raise PruningError(f"metrics: latency_ms was given without the {key}; add '{name}': {{'{key}': …}}")


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


_LINE = Rule('one line of text', _is_line)
_COUNT = Rule('a whole number of at least 1', lambda value: INTEGER.holds(value) and value >= 1)
_VALUES = {
    'top1': Rule('percent, 0 to 100', lambda value: is_number(value) and 0 <= value <= 100),
    'latency_ms': Rule('milliseconds, more than 0', lambda value: is_number(value) and value > 0),
}
_METRICS: Dict[str, Any] = {
    'dataset': _LINE,
    'dataset_id': Rule("a dataset's id on the Hub", lambda value: isinstance(value, str) and is_repo_id(value)),
    'dense': _VALUES,
    'pruned': _VALUES,
    'latency': {'machine': _LINE, 'batch_size': _COUNT, 'dtype': _LINE, 'threads': _COUNT},
    'int8': {  # of the pruned model, as timm-epfs export --int8 --metrics writes it
        'float32': _VALUES, 'int8': _VALUES, 'engine': _LINE, 'machine': _LINE, 'batch_size': _COUNT, 'threads': _COUNT,
    },
}
