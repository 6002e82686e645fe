"""Images to measure on: timm's datasets, and random ones."""
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..core import PruningError, one_line
from ..pruner import example_for

__all__ = ['check_classes', 'image_loader', 'image_splits', 'random_images']


def image_splits(
        root: Union[str, Path],
        splits: Sequence[str],
        name: str = '',
        num_classes: Optional[int] = None,
) -> Tuple[Dataset, ...]:
    """timm's datasets of labelled images, one a split.

    Args:
        root: Folder with a subfolder or a ``.tar`` for each split, as timm finds them, or a folder or ``.tar`` of
            images without splits, which is then every split.
        splits: Names of the splits, such as ``('train', 'validation')``.
        name: Kind of dataset, as in ``timm.data.create_dataset``; a folder or tar by default.
        num_classes: How many classes the model tells apart; more in the data is an error.

    Raises:
        PruningError: No images are found.
    """
    root = Path(root)
    if not name and not root.exists():
        raise PruningError(f'data: {root} does not exist; give a folder or a .tar of images')
    datasets = []
    for split in splits:
        tar = root / f'{split}.tar'
        with one_line(f'data: no images of split {split!r} in {root}'):
            datasets.append(create_dataset(name, root=str(tar if tar.is_file() else root), split=split))

    places = [Path(getattr(getattr(dataset, 'reader', None), 'root', root)) for dataset in datasets]
    if not name and root in places and set(places) != {root}:
        absent = splits[places.index(root)]
        raise PruningError(f'data: no folder or .tar of split {absent!r} in {root}; name the split that is there')
    for dataset, split in zip(datasets, splits):
        check_classes(dataset, num_classes, f'split {split!r} of {root}')
    return tuple(datasets)


def check_classes(dataset: Dataset, num_classes: Optional[int], what: str) -> None:
    """Raise ``PruningError`` where a dataset says that it has more classes than a model tells apart.

    Args:
        dataset: One of timm's, or any with ``classes``.
        num_classes: How many classes the model tells apart; None or 0 where it has no classifier.
        what: What a message calls the dataset.
    """
    reader = getattr(dataset, 'reader', None)
    names = ('class_to_idx', 'class_name_to_idx')
    classes = next(filter(None, (getattr(reader, name, None) for name in names)), getattr(dataset, 'classes', ()))
    if num_classes and len(classes) > num_classes:
        raise PruningError(
            f'data: {what} has {len(classes)} classes, the model tells {num_classes} apart; give --num-classes '
            f'{len(classes)}')


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
        dataset: One of ``image_splits``.
        config: What ``timm.data.resolve_data_config`` says of the model.
        batch_size: Images a batch.
        workers: Processes that decode.
        images: Take so many at random, all in their order by default. A plain first few would be of one class.
        seed: For that choice.
    """
    dataset.transform = create_transform(**config)
    if images is not None and not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order[:images].tolist())
    return DataLoader(dataset, batch_size, num_workers=workers)


def random_images(model: nn.Module, img_size: Optional[int] = None, batch_size: int = 1, seed: int = 0) -> Tensor:
    """Images of random values, as large as the model's MACs are counted for, or of ``img_size`` pixels."""
    (example,), _ = example_for(model)
    _, channels, *size = example.shape
    size = size if img_size is None else [img_size, img_size]
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(seed))
