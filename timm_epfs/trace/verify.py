"""Propose, then verify: a cut of everything, run on the meta copy, must repeat the forward with every length as predicted.

What doesn't is found by the operation at which the cut model leaves the road, and the dims it touches are pinned
wherever that line of code runs. A wrong proposal costs coverage of a few layers, never a broken model.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..structure import Size
from .labels import Label
from .recorder import TRANSPARENT, Operation, quiet, same_name

__all__ = ['Mismatch', 'replay']


class Mismatch(Exception):
    """The cut model left the road here.

    Attributes:
        index: Number of the operation.
        why: What was predicted and what happened.
    """

    def __init__(self, index: int, why: str):
        super().__init__(why)
        self.index = index
        self.why = why


class _Replay(TorchDispatchMode):
    def __init__(self, operations: Sequence[Operation], length: Callable[[int, Label], int]):
        super().__init__()
        self._operations = operations
        self._length = length
        self.index = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split('::')[1]
        if name in TRANSPARENT:
            return func(*args, **(kwargs or {}))
        if self.index >= len(self._operations):
            raise Mismatch(len(self._operations) - 1, 'the cut model runs more operations than the dense one')
        op = self._operations[self.index]
        if same_name(name) != op.name:
            raise Mismatch(self.index, f'{name} where the dense model runs {op.name}')
        out = func(*args, **(kwargs or {}))
        tensors = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        for tensor, (shape, labels) in zip(tensors, op.outputs):
            expected = tuple(self._length(n, label) for n, label in zip(shape, labels))
            if tuple(tensor.shape) != expected:
                raise Mismatch(self.index, f'{name} gives {tuple(tensor.shape)} where {expected} was expected')
        if op.start is not None:
            start = args[2] if len(args) > 2 else 0
            if (start or 0) >= 0 and (start or 0) != self._length(len(op.start), op.start):
                raise Mismatch(self.index, f'slice starts at {start}')
        self.index += 1
        return out


def replay(
        cut: nn.Module,
        operations: Sequence[Operation],
        length: Callable[[int, Label], int],
        args: Tuple,
        kwargs: Dict[str, Any],
) -> None:
    """Run the cut model beside the dense one's record.

    Args:
        cut: The cut model, on the meta device.
        operations: What the dense model ran.
        length: Predicted length of a dim: (dense length, label) → length.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.

    Raises:
        Mismatch: The first operation that differs or fails.
    """
    mode = _Replay(operations, length)
    try:
        with quiet(cut), mode:
            cut(*args, **kwargs)
    except Mismatch:
        raise
    except Exception as e:
        raise Mismatch(min(mode.index, len(operations) - 1), f'{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ""}')
    if mode.index != len(operations):
        raise Mismatch(mode.index, 'the cut model runs fewer operations than the dense one')
