"""How a model is run while it is traced: on the meta device, without data, or where that fails on real numbers.

A detector picks boxes by their scores, and a graph network its edges: which operations run, and on tensors of which
lengths, depends on numbers that the meta device doesn't have. The recorder then keeps what those operations gave, and a
cut copy is given the same, so that it takes the same way.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Tuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..core import PrunedMultiheadAttention
from .copies import cpu_copy, meta_copy, meta_tensor
from .rules.lookups import is_mask

__all__ = ['Forward', 'decided', 'decided_by_numbers']

_WITHOUT_TAG = frozenset({'torchvision::nms'})  # operations that torch doesn't know to depend on numbers


class _TracedAttention(PrunedMultiheadAttention):
    """Attention in copies, dense or cut: all run the same operations, and a cut leaves their class alone."""


@dataclass(frozen=True)
class Forward:
    """A model's forward with one input.

    Attributes:
        model: The model. It is never run itself, nor are its tensors changed.
        args: Positional arguments.
        kwargs: Keyword arguments.
        has_numbers: Whether copies run on numbers, on the CPU, and not without data, on the meta device.
    """
    model: nn.Module
    args: Tuple
    kwargs: Dict[str, Any]
    has_numbers: bool

    @classmethod
    def without_data(cls, model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> 'Forward':
        """On the meta device."""
        args, kwargs = tree_map(lambda x: meta_tensor(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))
        return cls(model, args, kwargs, has_numbers=False)

    @classmethod
    def on_numbers(cls, model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> 'Forward':
        """On the CPU. Inputs without data get random numbers from 0 to 1, integers zeros and masks ones."""
        return cls(model, *tree_map(_with_numbers, (args, kwargs)), has_numbers=True)

    def copy(self) -> nn.Module:
        """A copy of the model on the device, in evaluation mode."""
        copied = (cpu_copy if self.has_numbers else meta_copy)(self.model).eval()
        for module in copied.modules():
            if type(module) in (nn.MultiheadAttention, PrunedMultiheadAttention):
                module.__class__ = _TracedAttention
        return copied

    def inputs(self) -> Tuple[Tuple, Dict[str, Any]]:
        """Arguments that a forward may change."""
        return _cloned((self.args, self.kwargs))

    def __str__(self) -> str:
        tensors = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, torch.Tensor)]
        return ', '.join(str(tuple(x.shape)) for x in tensors) or 'no input'


def _with_numbers(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_meta:
        return value.detach().cpu()
    if value.is_floating_point():
        return torch.rand(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0))
    return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)


def decided_by_numbers(func: Callable, name: str, args: Tuple, out: Any) -> Any:
    """What ``decided`` needs to repeat an operation: its output, or its masks. None where no number decides.

    Args:
        func: The operation. It may return a number, or a tensor whose shape depends on numbers.
        name: Its name.
        args: Its arguments.
        out: What it returned.
    """
    if name == 'index':
        return args[1] if any(index is not None and is_mask(index) for index in args[1]) else None
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return out if name in _WITHOUT_TAG or tags & set(func.tags) else None


def decided(func: Callable, name: str, args: Tuple, outcome: Any) -> Any:
    """What an operation gives in a cut model, if numbers are to decide as they did in the dense one.

    Args:
        func: The operation.
        name: Its name.
        args: Its arguments in the cut model.
        outcome: What ``decided_by_numbers`` returned in the dense one.
    """
    if name == 'index':
        return func(args[0], outcome)
    return _cloned(outcome)


def _cloned(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)
