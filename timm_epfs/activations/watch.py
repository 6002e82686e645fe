"""Watches a forward for the calls that read the model's own weights and BatchNorm statistics.

Functions are watched, not modules. So a layer counts however its module calls it (with padding of its own, through a
subclass, straight from a parameter). A weight that is changed on its way (weight standardisation, spectral norm) isn't
taken for the parameter.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Union

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core import named_tensors
from .linear_calls import LINEAR_FUNCTIONS, LinearCall

__all__ = ['Call', 'NormCall', 'Watch']

_BATCH_NORM = ('input', 'running_mean', 'running_var', 'weight', 'bias', 'training', 'momentum', 'eps')


@dataclass(frozen=True, eq=False)
class NormCall:
    """One call of ``batch_norm``.

    Attributes:
        input: Its input, shape (images, channels, …).
        running_mean, running_var: The statistics that it reads, shape (channels,).
    """
    input: Tensor
    running_mean: Tensor
    running_var: Tensor


Call = Union[LinearCall, NormCall]


class Watch(TorchFunctionMode):
    """Shows each linear call and each call of ``batch_norm`` to a handler, if the model owns what the call reads.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> def handler(name, call, run):
    ...     print(name, tuple(call.input.shape))
    ...     return run()
    >>> with Watch(layer, images=4, handler=handler):
    ...     outputs = layer(torch.ones(4, 2))
    weight (4, 2)

    Args:
        model: The model.
        images: Number of images in the batch.
        handler: ``handler(name, call, run)``. It gets the name of the weight or of the running mean, the call, and a
            function that runs the call; it returns what the call is to return.
    """

    def __init__(self, model: nn.Module, images: int, handler: Callable[[str, Call, Callable], Any]):
        super().__init__()
        self._names = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self._images = images
        self._handler = handler

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Optional[Dict] = None) -> Any:
        kwargs = kwargs or {}
        named = {}
        if func in LINEAR_FUNCTIONS:
            named = {**dict(zip(LINEAR_FUNCTIONS[func], args)), **kwargs}
        elif func is F.batch_norm:
            named = {**dict(zip(_BATCH_NORM, args)), **kwargs}
        name = self._names.get(id(named.get('weight' if func in LINEAR_FUNCTIONS else 'running_mean')))
        if name is None:
            return func(*args, **kwargs)
        call: Call
        if func in LINEAR_FUNCTIONS:
            call = LinearCall(func, named, self._images)
        else:
            call = NormCall(named['input'], named['running_mean'], named['running_var'])
        return self._handler(name, call, lambda: func(*args, **kwargs))
