"""``html_report``: one page about a dense model and its cuts to one or several budgets."""
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..core import PruningError, device_of, percent, progress, step
from ..importance import Sensitivity
from ..latency import latency_note, time_models
from ..plan import Plan
from ..pruner import Pruner, example_for
from ..zoo import plan_of
from .comparison import Rows, compare, top1
from .page import check_page, write_page
from .sections import accuracy_section, comparison_section, layers_section, sensitivity_section

__all__ = ['html_report']

_SECONDS = 0.75  # for which the latency of each model is measured


def html_report(
        path: Union[str, Path],
        dense: Union[Pruner, nn.Module],
        pruned: Union[nn.Module, Sequence[nn.Module]],
        *,
        data: Optional[Iterable[Any]] = None,
        sensitivity: Optional[Sensitivity] = None,
        latency: bool = True,
        title: Optional[str] = None,
) -> Path:
    """Write one HTML page that compares a dense model with what was cut of it, to look at on any screen.

    The page loads nothing and runs no script. It shows MACs, parameters, size, latency and top-1 side by side, top-1
    against MACs over all models, what stays of each layer, and the measured sensitivity.

    >>> pruner = Pruner('resnet20_cifar')
    >>> cuts = [pruner(macs=share) for share in (0.7, 0.5)]
    >>> page = html_report('report.html', pruner, cuts)  # doctest: +SKIP

    Args:
        path: The .html file to write.
        dense: The dense model, or its pruner.
        pruned: One pruned model, or several that were cut from the dense one, to different budgets for example.
        data: Batches (images, targets), on which top-1 of all models is measured. None: it isn't.
        sensitivity: What ``Pruner.sensitivity`` measured. None: the page doesn't show it.
        latency: Whether to measure latency, which takes about a second for each model.
        title: Heading of the page. None: the name of the dense model.

    Returns:
        The path of the page.

    Raises:
        PruningError: A model has no plan, it isn't a classifier that top-1 can be measured of, or the page can't be
            written.
    """
    path = Path(path)
    check_page(path, 'html_report')
    model = dense.model if isinstance(dense, Pruner) else dense
    models = [pruned] if isinstance(pruned, nn.Module) else list(pruned)
    names = _names(model, models)
    compared = _compare_all(model, dict(zip(names, models)), data, _example(dense) if latency else None)
    plans = {name: each.pruning_plan for name, each in zip(names, models)}
    notes = latency_note(str(device_of(model))) if latency else ''
    sections = [
        comparison_section(compared, notes),
        *accuracy_section(compared),
        layers_section(plans),
        *([] if sensitivity is None else [sensitivity_section(sensitivity)]),
    ]
    name = dense.name if isinstance(dense, Pruner) else models[0].pruning_plan.base or type(model).__name__
    write_page(path, title or name, f'Pruned by timm_epfs to {", ".join(names)} of its MACs.', sections, 'html_report')
    return path


def _names(dense: nn.Module, models: Sequence[nn.Module]) -> List[str]:
    """What the page calls each model: what it has left of the MACs, numbered where two have the same."""
    if not models:
        raise PruningError('html_report: no pruned model was given; give at least one')
    for model in models:
        if not isinstance(getattr(model, 'pruning_plan', None), Plan):
            raise PruningError(
                f'html_report: this {type(model).__name__} has no pruning_plan; give models that prune() returned')
        if 'macs' not in model.pruning_plan.cost:
            raise PruningError('html_report: a plan doesn\'t say what its cut costs; give models that prune() returned')
    earlier_plan = plan_of(dense)  # where the dense model was itself cut
    costs = [model.pruning_plan.cost['macs'] for model in models]
    shares = [percent(after / (earlier_plan.cost['macs'][1] if earlier_plan else before)) for before, after in costs]
    return [
        share + (f' ({shares[:i].count(share) + 1})' if shares.count(share) > 1 else '')
        for i, share in enumerate(shares)]


def _compare_all(
        dense: nn.Module,
        models: Dict[str, nn.Module],
        data: Optional[Iterable[Any]],
        example: Optional[Tuple[Tuple, Dict[str, Any]]],
) -> Dict[str, Rows]:
    """What ``compare`` says of each model; top-1 where there is data, latency where there is an example."""
    both = [dense, *models.values()]
    accuracy = top1(both, progress(data, 'measuring top-1')) if data is not None else None
    milliseconds = None
    if example is not None:
        with step('measuring latency'):
            milliseconds = [1000 * taken.median for taken in time_models(both, *example, _SECONDS * len(both))]
    return {
        name: compare(
            dense, model, {} if accuracy is None else {'top-1, %': (accuracy[0], accuracy[i])},
            None if milliseconds is None else (milliseconds[0], milliseconds[i]))
        for i, (name, model) in enumerate(models.items(), 1)}


def _example(dense: Union[Pruner, nn.Module]) -> Tuple[Tuple, Dict[str, Any]]:
    """Positional and keyword arguments of a forward, of zeros on the model's device."""
    example, model = (dense.example, dense.model) if isinstance(dense, Pruner) else (example_for(dense), dense)
    device = device_of(model)
    return tree_map(lambda x: torch.zeros_like(x, device=device) if isinstance(x, torch.Tensor) else x, example)
