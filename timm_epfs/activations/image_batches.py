"""Batches of images from whatever users hold them in."""
from itertools import islice
from typing import Any, Iterable, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..core import PruningError, device_of, one_line

__all__ = ['fast_format', 'image_batches', 'labelled_batches']

# More images than this cost more memory than they are worth, and larger batches, too.
IMAGES, PIXELS, BATCH_PIXELS = 1024, 2 ** 24, 2 ** 20
# On a CPU, tensors of more than 32 MiB are mapped and unmapped each time, which can take as long as the convolutions.
FAST_BATCH_PIXELS = 2 ** 18


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
    return [batch for batch, _ in labelled_batches(data, model, images, BATCH_PIXELS)]


def labelled_batches(
        data: Any,
        model: nn.Module,
        images: Optional[int] = None,
        batch_pixels: int = FAST_BATCH_PIXELS,
) -> List[Tuple[Tensor, Optional[Tensor]]]:
    """Batches as those of ``image_batches``, each with the classes of its images, shape (images,).

    The classes are None where the second entry of a batch isn't one whole number of at least 0 per image.

    Args:
        data, model, images: As in ``image_batches``.
        batch_pixels: Largest number of pixels of a batch, on a CPU.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = device_of(model)
    batches: List[Tuple[Tensor, Optional[Tensor]]] = []
    found = 0
    for given in [data] if isinstance(data, Tensor) else _iterate(data):
        batch, classes = _checked(given), _classes(given)
        pixels = batch[0, 0].numel() if batch.ndim > 2 else 1
        most = min(IMAGES, max(1, PIXELS // pixels)) if images is None else images
        size = max(1, (batch_pixels if device.type == 'cpu' else BATCH_PIXELS) // pixels)
        left = most - found
        parts = batch[:left].to(device, dtype).split(size)
        labels = [None] * len(parts) if classes is None else classes[:left].to(device).split(size)
        batches += zip(parts, labels)
        found += len(batch[:left])
        if found >= most:
            break
    if not batches:
        raise PruningError('found no images; give at least one batch of them')
    return batches


def fast_format(images: Tensor, *models: nn.Module) -> torch.memory_format:
    """The memory format of images that runs fastest: channels last on a CPU, if the models' forwards work with it.

    Args:
        images: A batch of images.
        models: The models that get them, in evaluation mode.
    """
    if images.ndim != 4 or images.device.type != 'cpu':
        return torch.contiguous_format
    two = images[:1].expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last)  # a view of one always works
    try:
        with torch.no_grad():
            for model in models:
                model(two)
    except Exception:  # a forward that views a map as if it were contiguous, or can't run the images at all
        return torch.contiguous_format
    return torch.channels_last


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
