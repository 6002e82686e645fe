"""The main jobs in one call: ``prune`` and ``inspect``."""
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

import torch
from torch import nn

from ..core import DEFAULT_KINDS, KINDS
from ..plan import PrunedModel
from .inputs import Example
from .inspection import Report
from .pruner import Pruner

__all__ = ['inspect', 'prune']


def prune(
        model: Union[str, nn.Module],
        macs: Optional[float] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        device: Optional[Union[str, torch.device]] = None,
        criterion: str = 'l2',
        scope: str = 'global',
        widths: Optional[str] = None,
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        exclude: Sequence[str] = (),
        only: Sequence[str] = (),
        ratios: Optional[Mapping[str, float]] = None,
        kinds: Sequence[str] = DEFAULT_KINDS,
        streams: Optional[bool] = None,
        data: Optional[Iterable] = None,
        loss_fn: Optional[Callable] = None,
        seed: int = 0,
        example_input: Optional[Example] = None,
        pretrained: bool = False,
        base: Optional[str] = None,
        **model_args: Any,
) -> PrunedModel:
    """Cut a model to a budget in one shot, by the importance of its weights.

    For several cuts of one model, make a ``Pruner`` and call that: it traces once.

    >>> slim = prune('resnet18', macs=0.5)
    >>> dense, pruned = slim.pruning_plan.cost['macs']
    >>> abs(pruned / dense - 0.5) < 0.01
    True

    Args:
        model: timm name, ``'torchvision/<name>'``, or any module; a module is left as it is.
        macs: Budget of multiply-accumulates at batch 1: a share of the dense model, or a count of more than 1.
        params: Budget of parameters, likewise.
        latency: Budget of the time that a batch takes: a share of the dense model's (``0.5``), or milliseconds
            (``'12ms'``). Exactly one of the three is given. Layers are timed on the model's device with torch's threads
            as they are set, the first time for a minute or so; what is cut is then measured whole, and corrected until
            it's within 5 %.
        latency_batch_size: Images in a batch, where time is measured.
        device: Device of a model that is given by name; a module is cut and measured where it is.
        criterion: How units are ranked, one of ``timm_epfs.CRITERIA``.
        scope: What is ranked with what: ``'global'``, ``'local'`` or ``'isomorphic'``, as in docs/budget.md.
        widths: What says how many units each structure keeps: None for the ranked scores, ``'cost'`` for what a unit
            costs (``timm_epfs.allocate.cost_aware_widths``), or another criterion that needs no data. Scores then only
            say which units stay.
        round_to: Widths that are cut stay multiples of this. None: 16 for wide layers, less for narrow ones; under
            ``latency`` as ``'auto'``: as None, with what wide layers are fastest at on the device, as is measured, in
            place of 16.
        floor: Share of its units that each structure keeps at least.
        exclude: Patterns of layers whose outputs are not to be cut: names, prefixes of modules (``'layer1'``), or with
            wildcards (``'*.conv3'``).
        only: The same, of the only layers to cut.
        ratios: Shares to remove by pattern, set before the budget is met by the rest.
        kinds: Kinds of units to cut: ``'channels'`` (or ``'filters'``, ``'neurons'``), ``'heads'``, ``'head_dims'``,
            ``'groups'``, and, only where it is named, ``'blocks'``. Attention is cut by whole heads; with
            ``'head_dims'`` and without ``'heads'``, by the dims of all heads of a layer.
        streams: Whether to cut residual streams that are normalised over their channels (ViT, ConvNeXt), which can't
            be done exactly. None: only where the budget can't be met without, with a warning.
        data: Batches (images, targets) for criteria that need them.
        loss_fn: ``loss_fn(output, target)`` for these. None: cross-entropy.
        seed: For ``criterion='random'``.
        example_input: What the forward takes, where that isn't known: a tensor, a tuple of positional or a dict of
            keyword arguments; batch 1, only shapes matter.
        pretrained: Load timm's weights, where ``model`` is a name.
        base: Name from which the dense model can be rebuilt, where ``model`` is a module that doesn't say.
        **model_args: Keyword arguments of the model, where ``model`` is a name (``num_classes``, ``in_chans``, …).

    Returns:
        A smaller module of the same class, with its ``pruning_plan``.

    Raises:
        PruningError: What was asked for can't be done; one line says why and what to do.

    Warns:
        UserWarning: The budget was missed: by more than 1 % of the dense cost, or by more than 5 % of a latency.
    """
    pruner = Pruner(
        model, data=data, loss_fn=loss_fn, exclude=exclude, only=only, kinds=kinds, streams=streams,
        example_input=example_input, device=device, pretrained=pretrained, base=base, **model_args,
    )
    return pruner(
        macs, params, latency=latency, latency_batch_size=latency_batch_size, criterion=criterion, scope=scope,
        widths=widths, round_to=round_to, floor=floor, ratios=ratios, seed=seed,
    )


def inspect(model: Union[str, nn.Module], example_input: Optional[Example] = None, **model_args: Any) -> Report:
    """Report what can be cut of a model, without weights or compute: a giant takes seconds.

    >>> report = inspect('resnet18')
    >>> report.structures[0].name, report.structures[0].units
    ('conv1', 64)
    >>> f'{report.macs_share:.2f}'
    '1.00'

    Args:
        model: timm name, ``'torchvision/<name>'``, or any module.
        example_input: What the forward takes, where that isn't known.
        **model_args: Keyword arguments of the model, where ``model`` is a name.

    Raises:
        PruningError: There is no such model, or its forward fails.
    """
    device = 'meta' if isinstance(model, str) else None
    return Pruner(model, kinds=KINDS, example_input=example_input, device=device, **model_args).inspect()
