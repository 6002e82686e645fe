"""BatchNorm statistics of a network that was cut, estimated again from images."""
from itertools import islice
from typing import Any, Iterable, List, Optional

import torch
from torch import nn

from ..core import PruningError, eval_mode, warn

__all__ = ['recalibrate_bn']


def recalibrate_bn(model: nn.Module, loader: Iterable[Any], batches: Optional[int] = None) -> nn.Module:
    """Estimate the running statistics of every BatchNorm again, in place.

    Cutting channels shifts what the layers after them see; a few dozen batches without labels or gradients recover
    much of the accuracy. The statistics become the plain average over the batches. Only BatchNorm runs in training
    mode: dropout and stochastic depth stay off, which is why ``torch.optim.swa_utils.update_bn`` isn't used (it trains
    the whole model, and leaves the statistics wiped where the loader is empty or fails half-way). Weights, modes and
    momenta are left as they were, and so are statistics that no image reached.

    Args:
        model: A model on any device. One without BatchNorm is returned as is, with a warning.
        loader: Batches of images, or tuples that start with images.
        batches: Use at most so many batches, all by default.

    Returns:
        The same model.

    Raises:
        PruningError: The loader gave no batch (the statistics are left as they were).
    """
    norms = [
        module for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        warn('recalibrate_bn: no BatchNorm with running statistics in the model, nothing done')
        return model

    before = [
        (norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)})
        for norm in norms
    ]
    reached = False
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average
        reached = _run(model, norms, loader, batches)
    finally:
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not reached or not norm.num_batches_tracked:
                for name, buffer in buffers.items():
                    getattr(norm, name).copy_(buffer)
    if not reached:
        raise PruningError(
            'asked to recalibrate BatchNorm, found no batch in the loader '
            f'(batches={batches}): give a loader with at least one batch of images')
    return model


@torch.no_grad()
def _run(model: nn.Module, norms: List[nn.Module], loader: Iterable[Any], batches: Optional[int]) -> bool:
    """Show the images to the model with BatchNorm alone in training mode, and say whether there were any."""
    device = norms[0].running_mean.device
    reached = False
    with eval_mode(model):
        for norm in norms:
            norm.training = True  # not .train(): timm's BatchNormAct2d holds a drop layer
        for batch in islice(loader, batches if batches is None else max(batches, 0)):
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(images.to(device))
            reached = True
    return reached
