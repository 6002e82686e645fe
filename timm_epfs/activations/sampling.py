"""Which output positions of a layer become rows."""
import zlib

import numpy as np
import torch
from torch import Tensor

__all__ = ['sample_positions']

ROWS = 16_384  # rows of a layer, at least
ROWS_PER_FEATURE = 3


def sample_positions(name: str, available: int, images: int, features: int) -> Tensor:
    """Output positions to take from each image, one drawn from each of equally long stretches, ascending.

    They are the same for all images and in all calls.

    >>> sample_positions('conv', available=4, images=10_000, features=27)
    tensor([0, 3])

    Args:
        name: Name of the layer, the seed.
        available: Number of output positions of an image.
        images: Number of images.
        features: Length of a row.
    """
    rows = max(ROWS, ROWS_PER_FEATURE * features)
    count = min(available, -(-rows // images))
    drawn = np.random.default_rng(zlib.crc32(name.encode())).random(count)
    return torch.from_numpy(((np.arange(count) + drawn) * available / count).astype(np.int64))
