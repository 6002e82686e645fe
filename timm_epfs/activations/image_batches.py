"""Batches of images from whatever users hold them in."""
from itertools import islice
from typing import Any, Iterable, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..core import PruningError, device_of, one_line

__all__ = ['image_batches', 'labelled_batches']

# More images than this cost more memory than they are worth, larger batches than this too.
IMAGES, PIXELS, BATCH_PIXELS = 1024, 2 ** 24, 2 ** 20


def image_batches(data: Any, model: nn.Module, images: Optional[int] = None) -> List[Tensor]:
    """Batches of images, checked, with the device and the dtype of a model's parameters.

    Args:
        data: Images in one tensor, a list of batches, or a loader. A batch is a tensor of images, shape
            (images, channels, height, width), or a tuple or list that starts with one.
        model: The model.
        images: Largest number of images to use. None: 1,024, or as many as have 16 million pixels, if these are fewer.

    Raises:
        PruningError: There are no images, or they aren't images that a model can run.
    """
    return [batch for batch, _ in labelled_batches(data, model, images)]


def labelled_batches(
        data: Any,
        model: nn.Module,
        images: Optional[int] = None,
) -> List[Tuple[Tensor, Optional[Tensor]]]:
    """Batches as those of ``image_batches``, each with the classes of its images, shape (images,).

    The classes are None where the second entry of a batch isn't one whole number of at least 0 per image.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    batches: List[Tuple[Tensor, Optional[Tensor]]] = []
    found = 0
    for given in [data] if isinstance(data, Tensor) else _iterate(data):
        batch, classes = _checked(given), _classes(given)
        pixels = batch[0, 0].numel() if batch.ndim > 2 else 1
        most = min(IMAGES, max(1, PIXELS // pixels)) if images is None else images
        size, left = max(1, BATCH_PIXELS // pixels), most - found
        parts = batch[:left].to(device_of(model), dtype).split(size)
        labels = [None] * len(parts) if classes is None else classes[:left].to(device_of(model)).split(size)
        batches += zip(parts, labels)
        found += len(batch[:left])
        if found >= most:
            break
    if not batches:
        raise PruningError('found no images; give at least one batch of them')
    return batches


def _classes(batch: Any) -> Optional[Tensor]:
    classes = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    whole = isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point()
    return classes if whole and len(classes) == len(batch[0]) and bool((classes >= 0).all()) else None


def _iterate(data: Iterable[Any]) -> Iterable[Any]:
    if data is None or isinstance(data, (str, dict)) or not hasattr(data, '__iter__'):
        raise PruningError(
            f'images of type {type(data).__name__} were given; give a tensor of images, or batches in a list or loader')
    with one_line('images can\'t be read'):
        yield from data


def _checked(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor):
        keys = f' with the keys {", ".join(map(str, islice(batch, 5)))}' if isinstance(batch, dict) else ''
        raise PruningError(
            f'found a batch of type {type(batch).__name__}{keys}; give tensors of images, or tuples that start with '
            f'one')
    if not images.is_floating_point():
        raise PruningError(f'found images of dtype {images.dtype}; convert them to floats and normalise them')
    if not images.numel():
        raise PruningError(f'found a batch of shape {tuple(images.shape)}, which has no images; leave it out')
    if not torch.isfinite(images).all():
        raise PruningError('found images with values that are not finite; look for NaN or inf in the data')
    return images.detach()
