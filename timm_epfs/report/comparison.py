"""What a user wants to know of a dense and a pruned model side by side: size, speed and accuracy."""
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torch.utils.flop_counter import FlopCounterMode

from ..core import PruningError, eval_mode, format_count, one_line
from ..pruner import example_for

__all__ = [
    'Rows', 'compare', 'count_macs', 'image_loader', 'image_splits', 'random_images', 'size_on_disk', 'table', 'top1',
]

# By quantity: dense and pruned value, and how each is shown.
Rows = Dict[str, Tuple[Tuple[float, float], Callable[[float], str]]]


def compare(
        dense: nn.Module,
        slim: nn.Module,
        accuracy: Mapping[str, Tuple[float, float]],
        speed: Sequence[float],
) -> Rows:
    """Dense against pruned, by quantity.

    Args:
        dense: The model before the cut; one that was pruned earlier counts as what that left.
        slim: The cut one, with its plan.
        accuracy: Top-1 of both in percent, by what it's called.
        speed: Milliseconds of both.
    """
    earlier = getattr(dense, 'pruning_plan', None)
    cost = {
        quantity: (earlier.cost[quantity][1] if earlier else before, after)
        for quantity, (before, after) in slim.pruning_plan.cost.items()
    }
    return {
        **{label: (pair, '{:.2f}'.format) for label, pair in accuracy.items()},
        'MACs': (cost['macs'], format_count),
        'parameters': (cost['params'], format_count),
        'size on disk, bytes': ((size_on_disk(dense), size_on_disk(slim)), format_count),
        'latency, ms': (tuple(speed), '{:.2f}'.format),
    }


@torch.no_grad()
def count_macs(model: nn.Module, args: Tuple, kwargs: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one forward: half of what torch's own counter finds, which sees attention's too.

    Args:
        model: On the inputs' device; meta will do.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of it.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # else the counter fails where a module is called with a view of a parameter
    try:
        with FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        for p in learning:
            p.requires_grad_(True)
    return counter.get_total_flops() / 2


def table(rows: Rows) -> List[Tuple[str, str, str, str]]:
    """What is compared, for people to read, with its head."""
    return [('', 'dense', 'pruned', 'ratio')] + [
        (label, show(dense), show(pruned), f'{pruned / dense:.3f}' if dense else '-')
        for label, ((dense, pruned), show) in rows.items()
    ]


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the model's tensors in a safetensors file, where tied ones are written under each name."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def random_images(model: nn.Module, img_size: Optional[int] = None, batch_size: int = 1, seed: int = 0) -> Tensor:
    """Images of random values, as large as the model's MACs are counted for, or of ``img_size`` pixels."""
    (example,), _ = example_for(model)
    _, channels, *size = example.shape
    size = size if img_size is None else [img_size, img_size]
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def top1(models: Sequence[nn.Module], batches: Iterable[Tuple[Tensor, Tensor]]) -> List[float]:
    """Top-1 accuracy of each model in percent, in one pass over the data.

    Raises:
        PruningError: There is no image.
    """
    right, images_seen = [0] * len(models), 0
    for images, targets in batches:
        images_seen += len(targets)
        for i, model in enumerate(models):
            device = next(model.parameters()).device
            with eval_mode(model):
                right[i] += (model(images.to(device)).argmax(1) == targets.to(device)).sum().item()
    if not images_seen:
        raise PruningError('asked for top-1, found no image in the data: give at least one')
    return [100 * count / images_seen for count in right]


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
    for dataset in datasets:
        classes = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or \
            getattr(getattr(dataset, 'reader', None), 'class_name_to_idx', None)
        if num_classes and classes and len(classes) > num_classes:
            raise PruningError(
                f'data: {root} has {len(classes)} classes, the model tells {num_classes} apart; set num_classes')
    return tuple(datasets)


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
