"""``prune`` and ``inspect``: a ``Pruner`` that is used once."""
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

import torch
from torch import nn

from ..core import KINDS, Budget
from ..plan import PrunedModel
from .inputs import Example
from .inspection import Report
from .pruner import Pruner

__all__ = ['inspect', 'prune']


def prune(
        model: Union[str, nn.Module],
        macs: Optional[Union[float, Budget]] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        device: Optional[Union[str, torch.device]] = None,
        criterion: Optional[str] = None,
        scope: str = 'global',
        widths: Optional[str] = None,
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        exclude: Optional[Sequence[str]] = None,
        only: Optional[Sequence[str]] = None,
        ratios: Optional[Mapping[str, float]] = None,
        kinds: Optional[Sequence[str]] = None,
        streams: Optional[bool] = None,
        data: Optional[Iterable] = None,
        compensate: bool = True,
        loss_fn: Optional[Callable] = None,
        seed: int = 0,
        example_input: Optional[Example] = None,
        pretrained: bool = False,
        base: Optional[str] = None,
        **model_args: Any,
) -> PrunedModel:
    """Cut a model to a budget in one shot, without training.

    To cut one model several times, make a ``Pruner`` and call it: it traces the model only once.

    >>> slim = prune('resnet18', macs=0.5)
    >>> dense, pruned = slim.pruning_plan.cost['macs']
    >>> abs(pruned / dense - 0.5) < 0.01
    True

    Args:
        model: timm name, ``'torchvision/<name>'``, ``'local-dir:<folder>'``, ``'hf-hub:<repo>'``, or any module. A
            module is not changed.
        macs: Budget of multiply-accumulates at batch 1: a share of the dense model's (``0.5``), or a count above 1
            (``2e9``). Exactly one of ``macs``, ``params`` and ``latency`` is needed.
        params: Budget of parameters: a share or a count.
        latency: Budget of the time that a batch takes: a share of the dense model's (``0.5``), or milliseconds
            (``'12ms'``). The layers are timed on the model's device, with the number of threads that torch is set to,
            which takes a minute or so the first time. Whole cut models are then measured, and the cut is corrected
            until it is within 5 % of the budget.
        latency_batch_size: Number of images in a batch when latency is measured.
        device: Device of a model that is given by name. A module is cut and measured where it is.
        criterion: How units are scored, one of ``timm_epfs.CRITERIA``. None: ``'l2'``; with ``data``, ``'obs'``, and
            unless ``widths`` is given, it is ``'sensitivity'``.
        scope: Which units are ranked together: ``'global'``, ``'local'`` or ``'isomorphic'``, as in docs/budget.md.
        widths: What decides how many units each structure keeps; the scores then only decide which. None: the scores
            decide both. ``'sensitivity'``: what the network's output loses, measured on ``data``
            (``Pruner.sensitivity``). ``'cost'``: the cost of a unit (``timm_epfs.allocate.cost_aware_width_weights``).
            Or another criterion that needs no data.
        round_to: Structures that are cut keep widths that are multiples of this. None: 16 for wide layers, less for
            narrow ones. ``'auto'``: as None, but in place of 16 the multiple at which wide layers are measured to be
            fastest on the device. Under ``latency``, None means ``'auto'``.
        floor: Smallest share of its units that each structure keeps.
        exclude: Patterns of layers whose outputs are not cut: names of layers or of modules (``'layer1'``: all layers
            in it), with or without wildcards (``'*.conv3'``, ``'layer?.0'``).
        only: Patterns of the only layers whose outputs are cut. None: all are.
        ratios: Shares of units to remove, by pattern. These are set first; all other structures then meet the budget.
        kinds: Kinds of units to cut: ``'channels'`` (or ``'filters'``, ``'neurons'``), ``'heads'``, ``'head_dims'``,
            ``'groups'`` and ``'blocks'``. None: all but blocks; and under ``latency``, where one search chooses widths
            and depth, blocks, too. Attention is cut by whole heads; with ``'head_dims'`` and without ``'heads'``, the
            same dims of all heads of a layer are cut.
        streams: Whether to cut residual streams that are normalised over their channels (ViT, ConvNeXt). Such a cut is
            never exact. None: only if the budget can't be met otherwise, with a warning.
        data: Batches of images, or tuples that start with images. They decide which units stay, unless ``criterion`` is
            given, and the weights that stay make up for those that went (``timm_epfs.compensate``). Criteria that need
            targets take batches (images, targets).
        compensate: Whether weights make up for what went, where there is data.
        loss_fn: ``loss_fn(output, target)``, for the same criteria. None: cross-entropy.
        seed: Seed of ``criterion='random'``, and of the targets that ``'obdc'`` draws.
        example_input: Input of the forward, for models that don't declare it: a tensor, a tuple of positional or a dict
            of keyword arguments, at batch 1. Only the shapes matter.
        pretrained: Whether to load published weights, where ``model`` is a name.
        base: Name from which the dense model can be rebuilt, where ``model`` is a module that doesn't know its name.
        **model_args: Keyword arguments of the model, where ``model`` is a name (``num_classes``, ``in_chans``, …).

    Returns:
        A smaller model of the same class, with its ``pruning_plan``.

    Raises:
        PruningError: An argument is invalid, the model can't be traced, or the budget is out of reach.

    Warns:
        UserWarning: The budget is missed, by more than 1 % of the dense cost or more than 5 % of a latency; or residual
            streams had to be cut (``streams``).
    """
    pruner = Pruner(
        model, data=data, loss_fn=loss_fn, exclude=exclude, only=only, kinds=kinds, streams=streams,
        example_input=example_input, device=device, pretrained=pretrained, base=base, **model_args,
    )
    return pruner(
        macs, params, compensate=compensate, latency=latency, latency_batch_size=latency_batch_size,
        criterion=criterion, scope=scope, widths=widths, round_to=round_to, floor=floor, ratios=ratios, seed=seed,
    )


def inspect(
        model: Union[str, nn.Module],
        example_input: Optional[Example] = None,
        *,
        exclude: Optional[Sequence[str]] = None,
        only: Optional[Sequence[str]] = None,
        kinds: Sequence[str] = KINDS,
        **model_args: Any,
) -> Report:
    """Report what can be cut of a model.

    It needs neither weights nor compute, so the largest models take only seconds.

    >>> report = inspect('resnet18')
    >>> report.structures[0].name, report.structures[0].units
    ('conv1', 64)
    >>> f'{report.macs_share:.2f}'
    '1.00'

    Args:
        model: As in ``prune``.
        example_input: As in ``prune``.
        exclude: As in ``prune``.
        only: As in ``prune``.
        kinds: As in ``prune``, but blocks are listed by default, too.
        **model_args: Keyword arguments of the model, where ``model`` is a name.

    Raises:
        PruningError: There is no such model, its input isn't known, its forward fails, or a pattern matches nothing.
    """
    device = 'meta' if isinstance(model, str) else None
    return Pruner(
        model, exclude=exclude, only=only, kinds=kinds, example_input=example_input, device=device, **model_args,
    ).inspect()
