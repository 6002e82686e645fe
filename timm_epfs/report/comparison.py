"""What a user wants to know of a dense and a pruned model side by side: size, speed and accuracy."""
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core import PruningError, eval_mode, format_count

__all__ = ['Rows', 'compare', 'count_macs', 'size_on_disk', 'table', 'top1']

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
