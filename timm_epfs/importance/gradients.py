"""Gradients of a loss with respect to some tensors of a model, summed over data: what Taylor and OBD-C score by."""
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ..core import PruningError, eval_mode, kind_of, progress

__all__ = ['gradients_of']


def gradients_of(
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        criterion: str,
        data: Optional[Iterable[Any]],
        loss_fn: Optional[Callable[[Any, Any], torch.Tensor]],
        seed: int,
) -> Dict[str, torch.Tensor]:
    """For Taylor, the sum over the data of each tensor's gradient; for OBD-C, the mean over images of its square.

    The gradients are those of stand-in leaves that share the weights' memory. So frozen layers get a gradient, too, and
    no ``.grad`` or ``requires_grad`` of the model is touched. OBD-C runs one image at a time. torch-pruning's own hooks
    can't be used for it: they are right only for convolutions without groups, dilation and bias, and for linear layers
    on (batch, features).
    """
    if data is None:
        raise PruningError(f'criterion {criterion!r} needs data, found none; give data=, batches of (images, targets)')
    by_id = {id(tensor): tensor.detach().requires_grad_() for tensor in tensors.values()}  # a tied tensor is one leaf
    leaves = {name: by_id[id(tensor)] for name, tensor in tensors.items()}
    sums = {key: torch.zeros_like(leaf, dtype=torch.float32) for key, leaf in by_id.items()}
    device = next(iter(leaves.values())).device
    generator = torch.Generator().manual_seed(seed)
    fisher, count = criterion == 'obdc', 0
    # The global random state is restored afterwards: a loader that shuffles draws from it.
    with eval_mode(model), torch.enable_grad(), torch.random.fork_rng([device] if device.type == 'cuda' else []):
        for images, targets in progress(_batches(data, criterion, device), 'computing gradients'):
            outputs = functional_call(model, leaves, (images,))
            if loss_fn is None:
                _check_scores(outputs, criterion, model)
            if fisher and loss_fn is None:
                probabilities = outputs.detach().float().softmax(-1).cpu()
                targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)
            loss = _one_number((loss_fn or F.cross_entropy)(outputs, targets))
            gradients = torch.autograd.grad(loss, list(by_id.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients):
                total += gradient.float().square() if fisher else gradient
            count += 1
    if not count:
        hint = 'an iterator can be read only once, so give a list or a loader' if iter(data) is data else 'give one'
        raise PruningError(f'criterion {criterion!r} needs data, found no batch in it; {hint}')
    return {name: sums[id(tensor)] / (count if fisher else 1) for name, tensor in tensors.items()}


def _check_scores(outputs: Any, criterion: str, model: nn.Module) -> None:
    """Raise ``PruningError`` if cross-entropy can't be taken of outputs, or no class can be drawn from them."""
    if not isinstance(outputs, torch.Tensor) or criterion == 'obdc' and outputs.ndim != 2:
        raise PruningError(
            f'criterion {criterion!r} takes the cross-entropy of scores of classes, but this {type(model).__name__} '
            f'returns {kind_of(outputs)}; give loss_fn=, a function of output and target')


def _one_number(loss: Any) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    raise PruningError(f'loss_fn= returned {kind_of(loss)}; return the whole loss, a tensor of one number')


def _batches(data: Iterable[Any], criterion: str, device: torch.device) -> Iterator[Tuple[Any, Any]]:
    """The batches on the device; for OBD-C, batches of one image. Images and targets may be nested."""
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise PruningError(
                f'criterion {criterion!r} needs batches of (images, targets), found {kind_of(batch)}; '
                f'give a loader that yields both')
        images, targets = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tuple(batch[:2]))
        if criterion == 'obdc':
            yield from ((images[i:i + 1], _at(targets, i)) for i in range(len(images)))
        else:
            yield images, targets


def _at(targets: Any, image: int) -> Any:
    """The targets of one image, of what a loader collates: a tensor, or a list or tuple of one entry per image."""
    if isinstance(targets, dict):
        return {name: _at(part, image) for name, part in targets.items()}
    return targets[image:image + 1]
