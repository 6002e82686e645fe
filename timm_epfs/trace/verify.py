"""Propose, then verify: a copy with everything cut must repeat the forward with every length as predicted.

What doesn't is found by the operation at which the cut model leaves the road, and the dims it touches are pinned
wherever that line of code runs. A wrong proposal costs coverage of a few layers, never a broken model.
"""
import traceback
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .copies import quiet
from .labels import Label
from .recorder import TRANSPARENT, Operation, operation_name, same_name

__all__ = ['Mismatch', 'replay']

_VIEWS = frozenset({'view', 't', 'transpose', 'permute', 'expand', 'unsqueeze', 'squeeze'})


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
    """Compares lengths, operation by operation.

    Which views and transposes a product needs depends on strides, which a cut may change: they may come and go. One
    that isn't as predicted is only remembered, as the place to blame if what follows fails.
    """

    def __init__(self, operations: Sequence[Operation], length: Callable[[int, Label], int]):
        super().__init__()
        self._operations = operations
        self._length = length
        self._suspect: Optional[int] = None
        self.index = 0

    @property
    def blame(self) -> int:
        return min(self.index if self._suspect is None else self._suspect, len(self._operations) - 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = same_name(operation_name(func))
        if name in TRANSPARENT:
            return func(*args, **(kwargs or {}))
        at = self._find(name)
        if name in _VIEWS:
            if at is not None and self._suspect is None:
                self.index = at  # for the message, should the call fail
            out = func(*args, **(kwargs or {}))
            if at is not None and not self._difference(self._operations[at], out):
                self.index = at + 1
            elif at is not None and self._suspect is None:
                self._suspect = at
            return out
        if at is None:
            here = self._operations[self.blame].name
            raise Mismatch(self.blame, f'{name} where the dense model runs {here}')
        self.index = at
        out = func(*args, **(kwargs or {}))
        difference = self._difference(self._operations[at], out) or self._start_difference(self._operations[at], args)
        if difference:
            raise Mismatch(self.blame, f'{name} {difference}')
        self.index, self._suspect = at + 1, None
        return out

    def _find(self, name: str) -> Optional[int]:
        """The next operation of this name, past views only."""
        for at in range(self.index, len(self._operations)):
            if self._operations[at].name == name:
                return at
            if self._operations[at].name not in _VIEWS:
                return None
        return None

    def _difference(self, op: Operation, out: Any) -> str:
        tensors = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        for tensor, (shape, labels) in zip(tensors, op.outputs):
            expected = tuple(self._length(n, label) for n, label in zip(shape, labels))
            if tuple(tensor.shape) != expected:
                return f'gives {tuple(tensor.shape)} where {expected} was expected'
        return ''

    def _start_difference(self, op: Operation, args: Tuple) -> str:
        if op.start is None:
            return ''
        start = (args[2] if len(args) > 2 else 0) or 0
        if start < 0 or start == self._length(len(op.start), op.start):
            return ''
        return f'starts at {start}'


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
        with quiet(), mode:
            cut(*args, **kwargs)
    except Mismatch:
        raise
    except Exception as e:
        if traceback.extract_tb(e.__traceback__)[-1].filename == __file__:
            raise  # a mistake of ours, not the cut model's
        message = (str(e).splitlines() or [''])[0]
        raise Mismatch(mode.blame, f'{type(e).__name__}: {message}') from e
    if any(op.name not in _VIEWS for op in operations[mode.index:]):
        raise Mismatch(mode.blame, 'the cut model runs fewer operations than the dense one')
