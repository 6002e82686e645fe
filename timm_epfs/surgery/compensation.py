"""``compensate``: weights and BatchNorm statistics with which a cut model makes up for the units that went."""
from dataclasses import replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import fast_format, image_batches
from ..core import PruningError, complement, eval_mode, first_few, named_tensors, one_line, plain_attention, warn
from ..plan import Plan, recipe_steps
from .reconstruction import Reconstruction
from .tensors import tensor_misfits, unchanged_on_error, wrong_base

__all__ = ['compensate', 'plan_of', 'reconstruct']

BATCH, BATCH_ELEMENTS = 64, 3 * 2 ** 20  # largest number of images that run through the models at once, and of values


def compensate(
        model: nn.Module,
        dense: nn.Module,
        images: Any,
        num_images: Optional[int] = None,
) -> nn.Module:
    """Make up for the units that a cut removed, in place, from a few hundred images without labels or training.

    Every linear layer and convolution gets the weights with which it comes nearest to the outputs of the dense model's
    layer, from what it now reads (least squares); BatchNorm's statistics follow (``surgery/reconstruction.py`` has the
    equations). What stays as it is: a layer that gets no better on images that were held out, depthwise convolutions,
    layers that the forward uses twice, and weights that are changed before they are used (weight standardisation).

    All images pass through both models side by side, layer by layer. To hold no more than a gigabyte of activations
    (or 64 images, if these have more), some images join where the layers have become small, so the first layers are
    solved from fewer of them.

    Under ``torch.distributed``, each process gives its own images, and all get the same weights.

    >>> import timm, timm_epfs
    >>> dense = timm.create_model('resnet20_cifar')
    >>> slim = timm_epfs.prune(dense, macs=0.7)
    >>> slim = timm_epfs.compensate(slim, dense, torch.randn(8, 3, 32, 32))
    >>> slim.pruning_plan.recipe['compensated']
    {'images': 8}

    Args:
        model: A cut model with its ``pruning_plan``, on any device. Its weights may have been trained since.
        dense: The dense model, or one that was cut less, with the weights that the cut model had before.
        images: Images in one tensor, a list of batches, or a loader. A batch is a tensor of images, or a tuple that
            starts with one.
        num_images: Largest number of images to use. None: 1,024, or as many as have 16 million pixels, if these are
            fewer (334 of 224 x 224). Where memory doesn't hold what a layer reads of all of them, fewer are used.

    Returns:
        The same model. The recipe of its plan says how many images were used.

    Raises:
        PruningError: The model wasn't cut by timm_epfs, or from another dense model; or the images can't be used. The
            model is as it was.

    Warns:
        UserWarning: A layer has more inputs than there are rows to fit it on.
    """
    plan = plan_of(model)
    reconstruction, used = reconstruct(model, dense, plan, images, num_images)
    if reconstruction.scarce:
        warn(
            f'compensate: layers with more inputs than there are rows to fit them on: '
            f'{first_few(reconstruction.scarce)}; give more images')
    model.pruning_plan = replace(plan, recipe=_with_last_step(plan.recipe, {'compensated': {'images': used}}))
    return model


def _with_last_step(recipe: Mapping[str, Any], added: Mapping[str, Any]) -> Dict[str, Any]:
    """A recipe with something added to its last cut."""
    *first, last = recipe_steps(recipe)
    return {'steps': [*first, {**last, **added}]} if first else {**last, **added}


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was cut.

    Raises:
        PruningError: It has none.
    """
    plan = getattr(model, 'pruning_plan', None)
    if not isinstance(plan, Plan):
        raise PruningError('the model has no pruning_plan, so it wasn\'t cut by timm_epfs; give a cut model')
    return plan


def reconstruct(
        model: nn.Module,
        dense: nn.Module,
        plan: Plan,
        images: Any,
        num_images: Optional[int] = None,
        weights: bool = True,
) -> Tuple[Reconstruction, int]:
    """Reconstruct a cut model's layers in place, or leave it as it was.

    Args:
        model: The cut model.
        dense: The dense model.
        plan: What was cut.
        images: As in ``compensate``.
        num_images: As in ``compensate``.
        weights: Whether to change weights. Otherwise only BatchNorm statistics are changed.

    Returns:
        What was done, and the number of images.
    """
    kept = _kept_entries(model, dense, plan)
    batches = image_batches(images, model, num_images)
    with unchanged_on_error(model), eval_mode(model), eval_mode(dense), plain_attention(model, dense), \
            one_line(f'the models can\'t run images of shape {tuple(batches[0].shape[1:])}'):
        memory_format = fast_format(batches[0], model, dense)
        batches = [batch.contiguous(memory_format=memory_format) for batch in _of_equal_length(batches)]
        reconstruction = Reconstruction(model, dense, kept, batches, weights)
        reconstruction.run()
    return reconstruction, reconstruction.images


def _of_equal_length(batches: Sequence[Tensor]) -> List[Tensor]:
    """The same images in few batches: each has a thread, and many small ones leave the allocator's memory in pieces."""
    shapes = dict.fromkeys(batch.shape[1:] for batch in batches)
    alike = [torch.cat([batch for batch in batches if batch.shape[1:] == shape]) for shape in shapes]
    return [part for images in alike for part in images.split(max(1, min(BATCH, BATCH_ELEMENTS // images[0].numel())))]


def _kept_entries(model: nn.Module, dense: nn.Module, plan: Plan) -> Dict[Tuple[str, int], np.ndarray]:
    """Entries of the dense model's dims that the cut model has, by tensor and dim.

    Raises:
        PruningError: The models don't have the shapes of the plan.
    """
    dense_tensors, kept = named_tensors(dense), {}
    earlier: Optional[Plan] = getattr(dense, 'pruning_plan', None)
    problems = [] if earlier else tensor_misfits(plan, dense_tensors, may_lack=lambda name: False)
    removed = {} if problems else plan.removed_since(earlier)
    if earlier and not removed:
        problems.append('nothing was cut of it since')
    for name, tensor in {} if problems else named_tensors(model).items():
        if name not in dense_tensors:
            problems.append(f'{name} is missing')
            continue
        shape = list(dense_tensors[name].shape)
        for dim, gone in removed.get(name, {}).items():
            kept[name, dim] = complement(gone, shape[dim])
            shape[dim] -= len(gone)
        if tuple(shape) != tuple(tensor.shape):
            problems.append(f'{name} would be cut to {tuple(shape)}, the model has {tuple(tensor.shape)}')
    if problems:
        raise wrong_base(plan, problems, 'give the dense model that was cut')
    return kept
