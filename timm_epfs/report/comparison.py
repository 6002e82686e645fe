"""The size, the speed and the accuracy of a dense and a pruned model, side by side."""
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..core import PruningError, eval_mode, format_count, kind_of, without_fused_attention

__all__ = ['Rows', 'compare', 'count_macs', 'size_on_disk', 'table', 'top1']

# By quantity: the dense and the pruned value, and the function that formats them.
Rows = Dict[str, Tuple[Tuple[float, float], Callable[[float], str]]]


def compare(
        dense: nn.Module,
        slim: nn.Module,
        accuracy: Mapping[str, Tuple[float, float]],
        latency_ms: Optional[Sequence[float]],
) -> Rows:
    """Compare a pruned model with the model that it was cut from.

    Args:
        dense: The model before the cut. It may have been pruned earlier; then its cost is that after the earlier cut.
        slim: The pruned model, with its plan.
        accuracy: Top-1 of both models in percent, by its label in the table.
        latency_ms: Milliseconds of a forward of both models. None: they aren't known.
    """
    earlier_plan = getattr(dense, 'pruning_plan', None)
    cost = {
        quantity: (earlier_plan.cost[quantity][1] if earlier_plan else before, after)
        for quantity, (before, after) in slim.pruning_plan.cost.items()
    }
    return {
        **{label: (pair, '{:.2f}'.format) for label, pair in accuracy.items()},
        'MACs': (cost['macs'], format_count),
        'parameters': (cost['params'], format_count),
        'size on disk, bytes': ((size_on_disk(dense), size_on_disk(slim)), format_count),
        **({} if latency_ms is None else {'latency, ms': (tuple(latency_ms), '{:.2f}'.format)}),
    }


@torch.no_grad()
def count_macs(model: nn.Module, args: Tuple, kwargs: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one forward, including those of attention: half of what torch's FLOP counter counts.

    Args:
        model: A model on the device of the inputs, which may be meta.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of it.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # otherwise the counter fails if a module is called with a view of a parameter
    try:
        with without_fused_attention(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        for p in trainable:
            p.requires_grad_(True)
    return counter.get_total_flops() / 2


def table(rows: Rows) -> List[Tuple[str, str, str, str]]:
    """The rows formatted for people, the table's head first."""
    return [('', 'dense', 'pruned', 'ratio')] + [
        (label, show(dense), show(pruned), f'{pruned / dense:.3f}' if dense else '-')
        for label, ((dense, pruned), show) in rows.items()
    ]


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the model's tensors in a safetensors file, in which tied tensors are written once per name."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


@torch.inference_mode()
def top1(models: Sequence[nn.Module], batches: Iterable[Tuple[Tensor, Tensor]]) -> List[float]:
    """Top-1 accuracy of each model in percent, in one pass over the data.

    Raises:
        PruningError: The data holds no image, or a model doesn't return one tensor of shape (images, classes).
    """
    correct, images_seen = [0] * len(models), 0
    for images, targets in batches:
        images_seen += len(targets)
        for i, model in enumerate(models):
            device = next(model.parameters()).device
            with eval_mode(model):
                classes = _logits(model, images.to(device)).argmax(1)
            correct[i] += (classes == targets.to(device)).sum().item()
    if not images_seen:
        raise PruningError('top-1: the data holds no image; give at least one')
    return [100 * count / images_seen for count in correct]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    raise PruningError(
        f'top-1 needs a classifier, and this {type(model).__name__} returns {kind_of(output)}; compare the models by a '
        f'metric of your own')
