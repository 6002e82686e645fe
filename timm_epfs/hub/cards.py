"""Model cards: what was cut, how that was found, and dense against pruned in measured numbers.

``metrics`` is what its caller measured; whatever isn't in it reads "not measured". MACs, parameters and size are
counted here, from the plan and the model, and can't be passed:

>>> metrics = {
...     'dataset': 'my-dataset',
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
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..core import INTEGER, PruningError, Rule, check, format_count, is_number
from ..learn import METHODS
from ..plan import Plan, recipe_steps
from ..report import draw_layers, size_on_disk
from ..surgery import build_base
from ..zoo import origin_of

__all__ = ['CARD', 'FIGURE', 'check_metrics', 'is_ours', 'make_card', 'stamp', 'write_card']

CARD, FIGURE = 'README.md', 'layers.png'
TAGS = ['timm', 'timm_epfs', 'pruning', 'image-classification']
TEMPLATE = Path(__file__).with_name('card_template.md')

_MISSING = 'not measured'
# The licenses of timm's weights that the Hub knows by name; it takes others as "other" with a name.
_HUB_LICENSES = (
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'gemma', 'mit', 'unknown',
)
_STAMP = re.compile(r'\n*<!-- timm_epfs card ([0-9a-f]{16}) -->\s*\Z')


def write_card(
        folder: Path,
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Mapping[str, Any]] = None,
        has_weights: bool = True,
) -> None:
    """Write ``README.md``, and the picture that it shows where matplotlib is installed, into a folder.

    Raises:
        PruningError: As ``make_card`` does.
    """
    metrics = check_metrics(metrics)
    figure = FIGURE if draw_layers(folder / FIGURE, model.pruning_plan) else None
    text = make_card(model, repo_id, metrics, figure, has_weights)
    (folder / CARD).write_text(text, encoding='utf-8', newline='\n')


def make_card(
        model: nn.Module,
        repo_id: str,
        metrics: Optional[Mapping[str, Any]] = None,
        figure: Optional[str] = None,
        has_weights: bool = True,
) -> str:
    """The text of a card, stamped as ours.

    Args:
        model: A pruned model with its plan.
        repo_id: Where it is to be loaded from.
        metrics: What was measured, as the module's docstring shows.
        figure: File name of the picture of what was cut.
        has_weights: Whether it's loaded with weights from there; otherwise it's a variant of the repo's name, a plan.

    Raises:
        PruningError: The metrics are none, or the plan's base can't be built.
    """
    metrics, plan = check_metrics(metrics), model.pruning_plan
    told = plan.to_dict()  # as it is after loading, so that the card is the same then
    name = repo_id.rpartition('/')[2]
    steps = recipe_steps(told['recipe'])
    license_name = (getattr(model, 'pretrained_cfg', None) or {}).get('license')
    card = ModelCard.from_template(
        _card_data(name, license_name, origin_of(model), metrics),
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        base=plan.base,
        base_args=', '.join(f'`{key}={value!r}`' for key, value in told['base_args'].items()),
        license=license_name,  # in the metadata this may be "other"
        metrics=metrics,
        rows=_compare(model, plan, metrics),
        kept=_share(*plan.cost['macs']) if 'macs' in plan.cost else 'some',
        cut=_describe_cuts(plan),
        steps=[_describe(step) for step in steps],
        methods=[method for method in METHODS if any(step.get('method') == method for step in steps)],
        recipe=json.dumps(told['recipe'], indent=1, ensure_ascii=False),
        figure=figure,
        has_weights=has_weights,
    )
    return stamp(str(card))


def stamp(text: str) -> str:
    """A card marked as ours: its last line holds a hash of the rest, so that an edit by hand shows."""
    text = _STAMP.sub('', text).rstrip()
    return f'{text}\n\n<!-- timm_epfs card {_digest(text)} -->\n'


def is_ours(text: str) -> bool:
    """Whether a card is one that ``stamp`` marked, and nobody has edited since."""
    text = text.replace('\r\n', '\n')
    found = _STAMP.search(text)
    return found is not None and found[1] == _digest(text[:found.start()].rstrip())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _card_data(
        name: str,
        license_name: Optional[str],
        origin: Optional[str],
        metrics: Mapping[str, Any],
) -> ModelCardData:
    known = license_name in (None, *_HUB_LICENSES)
    dataset, top1 = metrics.get('dataset', ''), metrics.get('pruned', {}).get('top1')
    is_id = re.fullmatch(r'[\w.-]+(/[\w.-]+)?', dataset)
    result = None if top1 is None else EvalResult(
        task_type='image-classification',
        dataset_type=re.sub(r'[^a-z0-9/]+', '-', dataset.lower()).strip('-'),
        dataset_name=dataset,
        metric_type='accuracy',
        metric_name='top-1, %',
        metric_value=top1,
    )
    return ModelCardData(
        model_name=name if result else None,
        eval_results=[result] if result else None,
        datasets=[dataset] if is_id else None,
        library_name='timm',
        pipeline_tag='image-classification',
        license=license_name if known else 'other',
        license_name=None if known else license_name,
        base_model=origin,  # of base_model_relation's words (adapter, finetune, merge, quantized) none says pruned
        tags=TAGS,
    )


def _compare(model: nn.Module, plan: Plan, metrics: Mapping[str, Any]) -> List[Tuple[str, str, str, str]]:
    """Rows of the table: what is compared, dense, pruned, change."""
    dense = build_base(plan.base, plan.base_args, 'meta').to(next(model.parameters()).dtype)
    params = [sum(p.numel() for p in each.parameters()) for each in (dense, model)]
    top1, latency = ([metrics.get(of, {}).get(what) for of in ('dense', 'pruned')] for what in ('top1', 'latency_ms'))
    return [
        _row('top-1, %', top1, '{:.2f}'.format, lambda before, after: f'{after - before:+.2f}'),
        _row('MACs', plan.cost.get('macs', (None, None)), format_count),
        _row('parameters', params, format_count),
        _row('size, MB', [size_on_disk(each) for each in (dense, model)], lambda size: f'{size / 1e6:.2f}'),
        _row('latency, ms', latency, '{:.2f}'.format),
    ]


def _ratio(before: float, after: float) -> str:
    return f'{100 * (after / before - 1):+.1f} %'


def _row(
        what: str,
        pair: Any,
        show: Callable[[float], str],
        change: Callable[[float, float], str] = _ratio,
) -> Tuple[str, str, str, str]:
    shown = [_MISSING if value is None else show(value) for value in pair]
    return what, *shown, _MISSING if None in pair or not pair[0] else change(*pair)


def _share(before: float, after: float) -> str:
    return f'{100 * after / before:.1f} %'


def _describe_cuts(plan: Plan) -> str:
    by_kind: Dict[str, List[int]] = {}
    for cut in plan.cuts:
        left, units = by_kind.setdefault(cut.structure.kind, [0, 0])
        by_kind[cut.structure.kind] = [left + len(cut.keep), units + cut.structure.units]
    kinds = ', '.join(f'{left} of {units} {kind}' for kind, (left, units) in sorted(by_kind.items()) if left < units)
    touched = sum(len(cut.keep) < cut.structure.units for cut in plan.cuts)
    return f'{touched} of {len(plan.cuts)} structures were cut. Left: {kinds or "everything"}.'


def _describe(step: Mapping[str, Any]) -> str:
    """How a plan was found, in a sentence that doesn't call a plan learned that wasn't."""
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
    """A copy of metrics that make sense, empty for None.

    Raises:
        PruningError: A key is unknown, a value isn't what the key stands for, or a number lacks what gives it meaning:
            top-1 its dataset, a latency its machine, batch size and dtype.
    """
    checked = check({} if metrics is None else metrics, _METRICS, 'metrics')
    measured = [checked.get(of, {}) for of in ('dense', 'pruned')]
    if any('top1' in values for values in measured) and 'dataset' not in checked:
        raise PruningError("metrics: top1 was given without the dataset it was measured on; add 'dataset'")
    for key in ('machine', 'batch_size', 'dtype'):
        if any('latency_ms' in values for values in measured) and key not in checked.get('latency', {}):
            raise PruningError(f"metrics: latency_ms was given without the {key}; add 'latency': {{'{key}': …}}")
    return checked


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


_LINE = Rule('one line of text', _is_line)
_COUNT = Rule('a whole number from 1 on', lambda value: INTEGER.holds(value) and value >= 1)
_VALUES = {
    'top1': Rule('percent, 0 to 100', lambda value: is_number(value) and 0 <= value <= 100),
    'latency_ms': Rule('milliseconds, more than 0', lambda value: is_number(value) and value > 0),
}
_METRICS: Dict[str, Any] = {
    'dataset': _LINE,
    'dense': _VALUES,
    'pruned': _VALUES,
    'latency': {'machine': _LINE, 'batch_size': _COUNT, 'dtype': _LINE, 'threads': _COUNT},
}
