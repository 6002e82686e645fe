"""Batches for training and evaluation: timm's datasets and loaders, and handwritten digits that need no download."""
import argparse
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.models import get_model_input_config
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..core import PruningError, eval_mode, one_line
from ..pruner import example_for
from ..report import check_classes, image_splits

__all__ = ['Batches', 'Digits', 'count_classes', 'describe', 'image_mode', 'open_batches']

DIGITS = 'digits'
DIGITS_SIZE = 16  # pixels: twice their own size, so that the last features of a CIFAR network are 4 x 4
# No flips, because a mirrored digit is not a digit; large crops only, because small images have little border to lose.
_DIGITS_AUGMENTATION = {'scale': (0.75, 1.0), 'ratio': (0.85, 1.18), 'hflip': 0.0, 'color_jitter': 0.0}
_AUGMENTATION = ('train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'no_aug')


@dataclass(frozen=True)
class Batches:
    """Loaders of (images, targets) on the device, each with a length.

    Attributes:
        train: Training images, augmented, in a new order each epoch.
        validation: Validation images; each process has its share of them.
        test: All validation images, for a single process.
    """
    train: Any
    validation: Any
    test: Any

    def set_epoch(self, number: int) -> None:
        """Pass the number of the epoch on to the dataset and the sampler, which derive their order from it."""
        for name in ('dataset', 'sampler'):
            part = getattr(self.train, name, None)
            if hasattr(part, 'set_epoch'):
                part.set_epoch(number)


def open_batches(args: argparse.Namespace, config: Mapping[str, Any], num_classes: int) -> Batches:
    """Open the images that ``--dataset`` and ``--data-dir`` name.

    Args:
        args: The options of ``timm-epfs train``.
        config: The model's data config, from ``timm.data.resolve_data_config``.
        num_classes: Number of the model's classes.

    Raises:
        PruningError: There are no images, less than one batch of them, or more classes than the model has.
    """
    train, validation = _datasets(args, config['input_size'][0], num_classes)
    return Batches(
        _train_loader(args, train, config, num_classes),
        _eval_loader(args, validation, config, args.distributed),
        _eval_loader(args, validation, config, False),
    )


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. A fifth of each class is for validation.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.

    Args:
        split: ``'train'``; any other name gives the validation images.
        transform: Applied to each PIL image.
        mode: PIL mode of the images, ``'L'`` or ``'RGB'``.

    Raises:
        PruningError: scikit-learn isn't installed.
    """
    classes = tuple('0123456789')

    def __init__(self, split: str = 'train', transform: Optional[Callable] = None, mode: str = 'RGB'):
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise PruningError(
                '--dataset digits needs scikit-learn, which is not installed; pip install timm-epfs[train]') from None
        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(images, targets, test_size=0.2, stratify=targets, random_state=0)
        pixels, self.targets = parts[0::2] if split == 'train' else parts[1::2]
        self.pixels = (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.mode)
        return (self.transform(image) if self.transform else image), int(self.targets[index])


def image_mode(in_chans: int) -> str:
    """PIL mode of images with this number of channels.

    Raises:
        PruningError: There is no mode with this number of channels.
    """
    if in_chans not in (1, 3):
        raise PruningError(f'train reads images of 1 or 3 channels, the model takes {in_chans}; give --in-chans')
    return 'L' if in_chans == 1 else 'RGB'


def describe(model: nn.Module, args: argparse.Namespace) -> Dict[str, Any]:
    """Choose how images are read for a model, and write it into the model's ``pretrained_cfg``.

    The saved model then has the same ``pretrained_cfg``, so that it is given images of the size it was trained on.

    Returns:
        The data config, as ``timm.data.resolve_data_config`` returns it.
    """
    (example,), _ = example_for(model)
    channels, *own_size = example.shape[1:]
    input_size = (channels, *(_asked_size(model, args) or own_size))
    config = resolve_data_config({'input_size': input_size}, model=model)
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            config[name] = (float(np.mean(config[name])),) * channels
    cfg = getattr(model, 'pretrained_cfg', None)
    if cfg is not None:
        stale = ('pool_size', 'test_input_size', 'test_crop_pct') if input_size[1:] != tuple(own_size) else ()
        model.pretrained_cfg = model.default_cfg = {
            **{name: value for name, value in cfg.items() if name not in stale},
            **{name: config[name] for name in ('input_size', 'mean', 'std')},
        }
    return config


def _asked_size(model: nn.Module, args: argparse.Namespace) -> Optional[Tuple[int, int]]:
    """Height and width that the options ask for; None for the model's own."""
    if args.img_size:
        return args.img_size, args.img_size
    has_config = getattr(model, 'pretrained_cfg', None) is not None
    size_is_fixed = has_config and get_model_input_config(model)['fixed_input_size']
    return (DIGITS_SIZE, DIGITS_SIZE) if args.dataset == DIGITS and not size_is_fixed else None


@torch.no_grad()
def count_classes(model: nn.Module, input_size: Sequence[int]) -> int:
    """Number of a model's classes.

    Raises:
        PruningError: The model can't be run at this size, or its output isn't a matrix of logits.
    """
    with eval_mode(model), one_line(f'{type(model).__name__} can\'t be run at {tuple(input_size)}'):
        output = model(torch.zeros(1, *input_size))
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or getattr(model, 'num_classes', None) == 0:
        found = f'shape {tuple(output.shape)}' if isinstance(output, torch.Tensor) else f'a {type(output).__name__}'
        raise PruningError(
            f'train needs a classifier, {type(model).__name__} has none and returns {found}; give --num-classes')
    return output.shape[1]


def _datasets(args: argparse.Namespace, in_chans: int, num_classes: int) -> Tuple[Dataset, Dataset]:
    """The training and the validation split.

    Raises:
        PruningError: There are no images, or more classes than the model has.
    """
    mode = image_mode(in_chans)
    splits = (args.train_split, args.val_split)
    if args.dataset == DIGITS:
        datasets = tuple(Digits(split, mode=mode) for split in ('train', 'validation'))
    elif not args.dataset:
        datasets = image_splits(args.data_dir, splits)
        for dataset in datasets:
            dataset.input_img_mode = mode
    else:
        datasets = (
            _named_dataset(args, args.train_split, True, mode), _named_dataset(args, args.val_split, False, mode))
    for dataset, split in zip(datasets, splits):
        _check_dataset(dataset, split, num_classes, args.data_dir or args.dataset)
    return datasets


def _named_dataset(args: argparse.Namespace, split: str, training: bool, mode: str) -> Dataset:
    # torchvision's datasets have no such option.
    options: Dict[str, Any] = {} if args.dataset.lower().startswith('torch/') else {'input_img_mode': mode}
    with one_line(f'data: no images of split {split!r} of {args.dataset} in {args.data_dir}'):
        return create_dataset(
            args.dataset, root=str(args.data_dir), split=split, is_training=training, batch_size=args.batch_size,
            seed=args.seed, download=args.dataset_download, **options,
        )


def _check_dataset(dataset: Dataset, split: str, num_classes: int, where: Any) -> None:
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise PruningError(f'data: split {split!r} of {where} is empty; give at least one image')
    check_classes(dataset, num_classes, f'split {split!r} of {where}')


def _train_loader(args: argparse.Namespace, dataset: Dataset, config: Mapping[str, Any], num_classes: int) -> Any:
    given = {name: getattr(args, name) for name in _AUGMENTATION if getattr(args, name) is not None}
    augmentation = {**(_DIGITS_AUGMENTATION if args.dataset == DIGITS else {}), **given}
    collate = None
    if args.mixup > 0 or args.cutmix > 0:
        collate = FastCollateMixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
    with one_line('data: the augmentation can\'t be set up'):
        loader = _loader(
            args, dataset, config, args.batch_size, args.distributed,
            is_training=True, auto_augment=args.aa, re_prob=args.reprob or 0.0, collate_fn=collate, **augmentation,
        )
    if not len(loader):
        images = len(dataset) // args.world_size
        raise PruningError(
            f'data: each process has {images} training images, less than one batch of {args.batch_size}; give a '
            'smaller --batch-size')
    return loader


def _eval_loader(args: argparse.Namespace, dataset: Dataset, config: Mapping[str, Any], distributed: bool) -> Any:
    return _loader(args, dataset, config, args.validation_batch_size or args.batch_size, distributed)


def _loader(
        args: argparse.Namespace,
        dataset: Dataset,
        config: Mapping[str, Any],
        batch_size: int,
        distributed: bool,
        **options: Any,
) -> Any:
    device = torch.device(args.device)
    return create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=args.workers,
        distributed=distributed,
        pin_memory=device.type == 'cuda',
        device=device,
        # Workers that outlive an epoch keep their own random states, which a resumed run could not restore.
        persistent_workers=False,
        **options,
    )
