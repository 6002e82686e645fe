"""The input of a model's forward, and a trace with it."""
from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.models import get_model_input_config
from torch import nn
from torch.utils._pytree import tree_leaves

from ..core import PruningError, shorten
from ..plan import Cut, Plan
from ..surgery import apply_plan
from ..trace import Trace, trace

__all__ = ['Example', 'example_for', 'trace_model']

Example = Union[torch.Tensor, Tuple, Dict[str, Any]]


def trace_model(model: nn.Module, example_input: Optional[Example] = None, whole_heads: bool = True) -> Trace:
    """Trace a module, and verify the trace on a cut copy.

    Args:
        model: The module.
        example_input: As in ``Pruner``.
        whole_heads: As in ``trace``.

    Raises:
        PruningError: The model's input isn't known, or its forward fails.
    """
    args, kwargs = example_for(model, example_input)
    return trace(model, args, kwargs, cut=_cut, whole_heads=whole_heads)


def _cut(copy_: nn.Module, structures, keep, attributes) -> None:
    apply_plan(copy_, Plan(None, {}, tuple(Cut(s, keep[s.name]) for s in structures), attributes))


def example_for(model: nn.Module, example_input: Optional[Example] = None) -> Tuple[Tuple, Dict[str, Any]]:
    """Positional and keyword arguments of one forward: the example, or a tensor on the meta device.

    Args:
        model: The module.
        example_input: As in ``Pruner``.

    Raises:
        PruningError: The model doesn't declare its input, and no example was given; or the example has no tensors.
    """
    if example_input is not None:
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example_input)):
            raise PruningError(
                f'example_input={shorten(repr(example_input), 60)} holds no tensor; give a tensor, such as '
                f'torch.empty(1, 3, 224, 224), or a tuple or dict of tensors')
        if isinstance(example_input, dict):
            return (), example_input
        return (example_input if isinstance(example_input, tuple) else (example_input,)), {}
    size = _input_size(model)
    if size is None:
        raise PruningError(
            f'the input of this {type(model).__name__} is not known; give example_input=, such as '
            f'torch.empty(1, 3, 224, 224)'
        )
    return (torch.empty(1, *size, device='meta', dtype=_dtype(model)),), {}


def _dtype(model: nn.Module) -> torch.dtype:
    """The type of a model's first parameter of real numbers, which is what its first layer takes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _input_size(model: nn.Module) -> Optional[Tuple[int, ...]]:
    """Channels, height and width that a model of timm or torchvision takes; None for any other."""
    if getattr(model, 'pretrained_cfg', None):
        return tuple(get_model_input_config(model)['input_size'])
    if type(model).__module__.startswith('torchvision.models'):
        size = getattr(model, 'image_size', 299 if type(model).__name__ == 'Inception3' else 224)
        return (3, size, size)
    return None
