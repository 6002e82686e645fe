"""CIFAR-10 decoded once and kept as bytes; batches are put together and augmented on the device."""
import hashlib
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Tuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from common import one_line
from safetensors import safe_open
from timm.data import create_dataset
from torch import Tensor
from tqdm import tqdm

from timm_epfs.core import write_whole

__all__ = ['TAGS', 'Images', 'load', 'name_of']

PADDING = 4
# By the fingerprint of the test images: only runs on the same images are compared.
KNOWN = {'2fb7dfcd': 'CIFAR-10 as JPEG of quality 75'}
TAGS = {'CIFAR-10 as JPEG of quality 75': 'cifar10_jpeg75'}  # of weights that were trained on them


def load(data_dir: Path, cache: Path) -> Dict[str, Tensor]:
    """Pixels, uint8 of shape (images, 3, 32, 32), and targets of both splits.

    Args:
        data_dir: Folder with ``train`` and ``test`` (folders or tar files), or torchvision's copy.
        cache: File that holds what was decoded, and of which folder; it's written anew for another one.

    Raises:
        SystemExit: With one line, if there are no such images.
    """
    source = {'data_dir': str(data_dir.resolve())}
    if not cache.exists() or _metadata(cache) != source:
        tensors: Dict[str, Tensor] = {}
        try:
            for split in ('train', 'test'):
                tensors.update(_decode(open_split(data_dir, split), split))
        except Exception as e:
            raise SystemExit(
                f'{data_dir} has no CIFAR-10 that can be read, be it folders train and test or torchvision\'s copy: '
                f'name it by --data-dir ({one_line(e)})') from e
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, lambda part: safetensors.torch.save_file(tensors, part, source))
    return safetensors.torch.load_file(cache)


def _metadata(path: Path) -> Dict[str, str]:
    with safe_open(path, 'pt') as file:
        return file.metadata() or {}


def open_split(data_dir: Path, split: str) -> Any:
    for root in (data_dir / split, data_dir / f'{split}.tar'):
        if root.exists():
            return create_dataset('', root=str(root))
    return create_dataset('torch/cifar10', root=str(data_dir), split=split)


def _decode(dataset: Any, split: str) -> Dict[str, Tensor]:
    pixels, targets = zip(*(
        (np.asarray(image.convert('RGB')), target)
        for image, target in tqdm((dataset[i] for i in range(len(dataset))), f'decoding {split}', len(dataset))
    ))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return {f'{split}.pixels': stacked, f'{split}.targets': torch.tensor(targets)}


def name_of(tensors: Mapping[str, Tensor]) -> str:
    """What the images are, or a fingerprint of them."""
    mark = hashlib.sha256(tensors['test.pixels'].numpy().tobytes()).hexdigest()[:8]
    return KNOWN.get(mark, f'images {mark}')


class Images:
    """Batches of normalised images on the device.

    Args:
        pixels: Shape (images, 3, height, width), uint8.
        targets: Shape (images,), int64.
        config: Mean and std, of pixel values between 0 and 1, and the input size, which images are resized to.
        batch_size: Images per batch.
        device: Where the images are kept.
        training: In a new order each time, cropped at random after padding and flipped; the last ones are left out
            where they make no whole batch.
    """

    def __init__(
            self,
            pixels: Tensor,
            targets: Tensor,
            config: Mapping[str, Any],
            batch_size: int,
            device: torch.device,
            training: bool,
    ):
        self.pixels, self.targets = pixels.to(device), targets.to(device)
        self.mean, self.std = (255 * torch.tensor(config[key], device=device).view(3, 1, 1) for key in ('mean', 'std'))
        self.size = tuple(config['input_size'][1:])
        self.batch_size, self.training = batch_size, training

    def __len__(self) -> int:
        whole, rest = divmod(len(self.targets), self.batch_size)
        return whole + bool(rest and not self.training)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        images = len(self.targets)
        order = torch.randperm(images) if self.training else torch.arange(images)
        for index in order.to(self.pixels.device).split(self.batch_size)[:len(self)]:
            pixels = self.pixels[index]
            pixels = self._augmented(pixels) if self.training else pixels
            pixels = (pixels.float() - self.mean) / self.std
            if self.size != pixels.shape[2:]:
                pixels = F.interpolate(pixels, self.size, mode='bilinear', align_corners=False)
            yield pixels, self.targets[index]

    def _augmented(self, pixels: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        draws = torch.randint(2 * PADDING + 1, (2, count, 1)).to(pixels.device)
        rows, columns = (start + torch.arange(n, device=pixels.device) for start, n in zip(draws, (height, width)))
        flipped = (torch.rand(count, 1) < 0.5).to(pixels.device)
        columns = torch.where(flipped, columns.flip(1), columns)
        padded = F.pad(pixels, [PADDING] * 4).permute(0, 2, 3, 1)
        which = torch.arange(count, device=pixels.device)[:, None, None]
        return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
