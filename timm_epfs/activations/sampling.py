"""Which output positions of a layer become rows."""
import zlib

import numpy as np
import torch
from torch import Tensor

__all__ = ['sample_positions']

FEWEST, MOST, PER_FEATURE = 2048, 16_384, 3  # rows of a layer, over all images
ELEMENTS = 2 ** 24  # elements of these rows, over all groups, where that are enough rows


def sample_positions(name: str, available: int, images: int, groups: int, features: int) -> Tensor:
    """Output positions to take from each image, one drawn from each of equally long stretches, ascending.

    They are the same for all images and in all calls.

    >>> sample_positions('conv', available=4, images=10_000, groups=1, features=27).shape
    torch.Size([2])

    Args:
        name: Name of the layer, the seed.
        available: Number of output positions of an image.
        images: Number of images.
        groups: Number of its groups.
        features: Length of a row.
    """
    rows = max(FEWEST, PER_FEATURE * features, min(MOST, ELEMENTS // (groups * features)))
    count = min(available, -(-rows // images))
    drawn = np.random.default_rng(zlib.crc32(name.encode())).random(count)
    return torch.from_numpy(((np.arange(count) + drawn) * available / count).astype(np.int64))
