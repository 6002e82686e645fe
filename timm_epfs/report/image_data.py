"""Images to measure on: timm's datasets, and random images."""
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..core import PruningError, one_line
from ..pruner import example_for

__all__ = ['check_classes', 'class_count', 'image_loader', 'image_splits', 'random_images']


def image_splits(
        root: Union[str, Path],
        splits: Sequence[str],
        name: str = '',
        num_classes: Optional[int] = None,
) -> Tuple[Dataset, ...]:
    """timm's datasets of labelled images, one for each split.

    Args:
        root: A folder that holds a subfolder or a ``.tar`` for each split, as timm finds them; or a folder or ``.tar``
            of images without splits, which is then used for every split.
        splits: Names of the splits, such as ``('train', 'validation')``.
        name: Type of dataset, as in ``timm.data.create_dataset``. Empty: a folder or ``.tar``.
        num_classes: Number of the model's classes. A dataset with more classes is an error.

    Raises:
        PruningError: There are no images, a split is missing, or a dataset has too many classes.
    """
    root = Path(root)
    if not name and not root.exists():
        raise PruningError(f'data: {root} does not exist; give a folder or a .tar of images')
    datasets = []
    for split in splits:
        tar = root / f'{split}.tar'
        with one_line(f'data: no images of split {split!r} in {root}'):
            datasets.append(create_dataset(name, root=str(tar if tar.is_file() else root), split=split))

    # timm reads the root itself for a split that it doesn't find, which would mix all splits.
    read_from = [Path(getattr(getattr(dataset, 'reader', None), 'root', root)) for dataset in datasets]
    if not name and root in read_from and set(read_from) != {root}:
        missing = splits[read_from.index(root)]
        raise PruningError(f'data: no folder or .tar of split {missing!r} in {root}; name a split that is there')
    for dataset, split in zip(datasets, splits):
        check_classes(dataset, num_classes, f'split {split!r} of {root}')
    return tuple(datasets)


def class_count(dataset: Dataset) -> int:
    """Number of classes that a dataset names: one of timm's, or any other with ``classes``. 0: it names none."""
    reader = getattr(dataset, 'reader', None)
    attributes = ('class_to_idx', 'class_name_to_idx')
    of_reader = next(filter(None, (getattr(reader, name, None) for name in attributes)), None)
    return len(of_reader or getattr(dataset, 'classes', ()))


def check_classes(dataset: Dataset, num_classes: Optional[int], what: str) -> None:
    """Raise ``PruningError`` if a dataset names more classes than a model has.

    Args:
        dataset: A dataset, as in ``class_count``.
        num_classes: Number of the model's classes. None or 0: the model has no classifier, and nothing is checked.
        what: What the message calls the dataset.
    """
    classes = class_count(dataset)
    if num_classes and classes > num_classes:
        raise PruningError(
            f'data: {what} has {classes} classes, the model has {num_classes}; give --num-classes {classes}')


def image_loader(
        dataset: Dataset,
        config: Mapping[str, Any],
        batch_size: int,
        workers: int = 0,
        images: Optional[int] = None,
        seed: int = 0,
) -> DataLoader:
    """Batches as a model expects them for evaluation.

    Args:
        dataset: A dataset that ``image_splits`` returned.
        config: The model's data config, from ``timm.data.resolve_data_config``.
        batch_size: Images per batch.
        workers: Processes that load images.
        images: Number of images to draw at random; the first images of a folder would all be of one class. None: all
            images, in order.
        seed: Seed of the draw.
    """
    dataset.transform = create_transform(**config)
    if images is not None and not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order[:images].tolist())
    return DataLoader(dataset, batch_size, num_workers=workers)


def random_images(model: nn.Module, img_size: Optional[int] = None, batch_size: int = 1, seed: int = 0) -> Tensor:
    """A batch of images of random values.

    Args:
        model: The model that takes them.
        img_size: Height and width in pixels. None: the size at which the model's MACs are counted.
        batch_size: Images in the batch.
        seed: Seed of the values.
    """
    (example,), _ = example_for(model)
    _, channels, *size = example.shape
    size = size if img_size is None else [img_size, img_size]
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(seed))
