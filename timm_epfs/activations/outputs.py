"""How far a network's output is from another one's."""
from typing import Any, List, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import PruningError, returned_tensors

__all__ = ['are_logits', 'divergence', 'has_classes', 'output_tensors']

_ADVICE = 'give criterion= and widths= that need no data'


def output_tensors(output: Any) -> List[Tensor]:
    """All tensors of numbers in what a model returned.

    Raises:
        PruningError: There are none.
    """
    tensors = [tensor for tensor in returned_tensors(output) if tensor.is_floating_point()]
    if not tensors:
        raise PruningError(f'the model\'s output holds no tensor of numbers; {_ADVICE}')
    return tensors


def has_classes(model: nn.Module) -> bool:
    """Whether a model's outputs may be logits: a timm model without classifier returns features."""
    return getattr(model, 'num_classes', None) != 0


def are_logits(outputs: Sequence[Tensor], may_be: bool = True) -> bool:
    """Whether they are one tensor of shape (images, two or more), and may be logits."""
    return may_be and len(outputs) == 1 and outputs[0].ndim == 2 and outputs[0].shape[1] > 1


def divergence(outputs: Sequence[Tensor], dense: Sequence[Tensor], may_be_logits: bool = True) -> Tensor:
    """How far outputs are from the dense model's.

    Args:
        outputs: Tensors of shape (images, …).
        dense: Tensors of the same shapes.
        may_be_logits: As ``has_classes`` says.

    Returns:
        Of logits, the mean Kullback-Leibler divergence of the classes' probabilities from the dense model's, in nats.
        Otherwise the mean squared error, as a share of the dense output's mean square: the mean over the tensors.

    Raises:
        PruningError: The shapes differ.
    """
    if [t.shape for t in outputs] != [t.shape for t in dense]:
        raise PruningError(f'the shapes of the model\'s outputs depend on what it sees; {_ADVICE}')
    if are_logits(outputs, may_be_logits):
        new, old = (F.log_softmax(side[0], 1) for side in (outputs, dense))
        return F.kl_div(new, old, log_target=True, reduction='batchmean')
    errors = [(new - old).square().mean() / old.square().mean().clamp_min(1e-30) for new, old in zip(outputs, dense)]
    return torch.stack(errors).mean()
