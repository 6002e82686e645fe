"""Watches the calls that read a model's weights and BatchNorm statistics, in the order in which a forward makes them.

Functions are watched, not modules. So a layer counts however its module calls it (with padding of its own, through a
subclass, straight from a parameter), and a weight that is changed before it is used (weight standardisation, spectral
norm) isn't taken for the parameter.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .linear_calls import LINEAR_FUNCTIONS, LinearCall

__all__ = ['NormCall', 'Watch', 'calls_of']


@dataclass(frozen=True, eq=False)
class NormCall:
    """One call of ``batch_norm``.

    Args:
        args: Its arguments by name.
    """
    args: Dict[str, Any]


_BATCH_NORM = ('input', 'running_mean', 'running_var', 'weight', 'bias', 'training', 'momentum', 'eps')


class Watch(TorchFunctionMode):
    """Passes each call of a linear function or of ``batch_norm`` on to a handler, where the model owns its tensor.

    Args:
        model: The model.
        images: Number of images in the batch.
        handler: ``handler(name, call, run)``: gets the name of the weight or of the running mean, and the call; returns
            what the call is to return, which ``run()`` computes.
    """

    def __init__(self, model: nn.Module, images: int, handler: Callable):
        super().__init__()
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self._images = images
        self._handler = handler

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call: Any = None
        if func in LINEAR_FUNCTIONS:
            call = LinearCall.of(func, args, kwargs, self._images)
            name = self._names.get(id(call.weight))
        elif func is F.batch_norm:
            call = NormCall({**dict(zip(_BATCH_NORM, args)), **kwargs})
            name = self._names.get(id(call.args['running_mean']))
        if call is None or name is None:
            return func(*args, **kwargs)
        return self._handler(name, call, lambda: func(*args, **kwargs))
