"""``recalibrate_bn``: estimates the BatchNorm statistics of a cut model again, from images."""
from itertools import islice
from typing import Any, Iterable, List, Optional

import torch
from torch import nn

from ..core import PruningError, eval_mode, progress, warn
from .compensation import plan_of, reconstruct

__all__ = ['recalibrate_bn']


def recalibrate_bn(
        model: nn.Module,
        loader: Iterable[Any],
        batches: Optional[int] = None,
        dense: Optional[nn.Module] = None,
) -> nn.Module:
    """Estimate the running statistics of every BatchNorm layer again, in place.

    Cutting channels changes the distribution of the inputs of later layers. A few dozen batches, without labels or
    gradients, recover much of the accuracy. The statistics become the plain average over the batches.

    With the ``dense`` model, the statistics that are there are corrected by what the cut changes of them on these
    images: mean + (cut − dense), variance · cut / dense. From a few hundred images this is much less noisy (control
    variates). ``compensate`` does the same, and also solves for better weights.

    Only BatchNorm runs in training mode; dropout and stochastic depth stay off. This is why
    ``torch.optim.swa_utils.update_bn`` isn't used: it sets the whole model to training mode, and leaves the statistics
    reset if the loader is empty or fails half-way. Weights, modes and momenta don't change, nor do statistics of layers
    that no image reached.

    Args:
        model: A model on any device. A model without BatchNorm is returned unchanged, with a warning.
        loader: Batches of images, or tuples that start with images.
        batches: Largest number of batches to use. None: all.
        dense: The dense model that a model with a ``pruning_plan`` was cut from.

    Returns:
        The same model.

    Raises:
        PruningError: The loader gave no batch; or a dense model was given with a model that wasn't cut from it. The
            statistics are unchanged.

    Warns:
        UserWarning: The model has no BatchNorm with running statistics.
    """
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        warn('recalibrate_bn: the model has no BatchNorm with running statistics, so nothing was done')
        return model
    if dense is not None:
        reconstruct(model, dense, plan_of(model), islice(loader, batches), weights=False)
        return model

    before = [
        (norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)})
        for norm in norms
    ]
    reached = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch then computes the cumulative average
        reached = _run(model, norms, loader, batches)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not reached or not norm.num_batches_tracked:
                for name, buffer in buffers.items():
                    getattr(norm, name).copy_(buffer)
    if not reached:
        raise PruningError(
            f'recalibrate_bn: found no batch in the loader (batches={batches}); give a loader with at least one batch '
            f'of images')
    return model


@torch.no_grad()
def _run(model: nn.Module, norms: List[nn.Module], loader: Iterable[Any], batches: Optional[int]) -> bool:
    """Run the images through the model with only BatchNorm in training mode. Returns whether there were any."""
    device = norms[0].running_mean.device
    reached = False
    with eval_mode(model):
        for norm in norms:
            norm.training = True  # not .train(): timm's BatchNormAct2d contains a dropout layer
        some = islice(loader, batches if batches is None else max(batches, 0))
        for batch in progress(some, 'recalibrating BatchNorm', batches):
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(images.to(device))
            reached = True
    return reached
