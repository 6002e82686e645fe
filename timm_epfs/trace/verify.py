"""Verification: a copy with everything cut must repeat the forward, with every length as predicted.

A wrong guess shows as an operation that fails or gives another shape. It costs what could have been cut around that
operation, and never gives a model that doesn't run.
"""
import traceback
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .build import Proposal
from .copies import quiet
from .forwards import Forward, decided
from .isolation import Isolation
from .labels import Label
from .recorder import TRANSPARENT, operation_name, same_name
from .records import Operation

__all__ = ['Cut', 'Mismatch', 'Verifier']

_VIEWS = frozenset({'view', 't', 'transpose', 'permute', 'expand', 'unsqueeze', 'squeeze'})

Cut = Callable[..., None]  # cut(copy, structures, units to keep by structure, values of attributes by path)


class Mismatch(Exception):
    """The cut model differs from what was predicted.

    Attributes:
        index: Number of the operation to blame.
        why: What was predicted and what happened.
    """

    def __init__(self, index: int, why: str):
        super().__init__(why)
        self.index = index
        self.why = why


@dataclass(frozen=True)
class Verifier:
    """Verifies proposals on cut copies.

    Attributes:
        forward: The dense model's forward.
        cut: Cuts a copy of the model.
        operations: What the dense model ran in its forward.
        isolation: Isolates the runs from what earlier ones left in the process.
    """
    forward: Forward
    cut: Cut
    operations: Sequence[Operation]
    isolation: Isolation

    def verify(self, proposal: Proposal) -> nn.Module:
        """Cut a copy and compare its forward with the recorded one. Returns the copy.

        About half of everything but residual blocks is cut, by amounts that differ from structure to structure.

        Raises:
            Mismatch: An operation fails, differs or is missing: the first one.
        """
        keep = {}
        for i, s in enumerate(proposal.structures):
            count = 1 if s.kind == 'blocks' else min(max(s.units // 2 + i % 3 - 1, 2), s.units - 1)
            keep[s.name] = np.sort(np.random.default_rng(i).permutation(s.units)[:count])
        left = {name: len(units) for name, units in keep.items()}
        copy = self.forward.copy()
        self.cut(copy, proposal.structures, keep, {path: size(left) for path, size in proposal.attributes.items()})
        self._replay(copy, proposal.sizer.lengths(left))
        return copy

    def runs_without_blocks(self, copy: nn.Module, proposal: Proposal) -> bool:
        """Whether a copy that was cut still runs once all residual blocks are cut down to their shortcuts."""
        blocks = [replace(s, members=()) for s in proposal.structures if s.kind == 'blocks']  # their tensors are cut
        if not blocks:
            return True
        self.cut(copy, blocks, {s.name: np.arange(0) for s in blocks}, {})
        args, kwargs = self.forward.inputs()
        try:
            with self.isolation.fresh(), quiet():
                copy(*args, **kwargs)
        except Exception:
            return False
        return True

    def _replay(self, copy: nn.Module, length: Callable[[int, Label], int]) -> None:
        mode = _Replay(self.operations, length)
        args, kwargs = self.forward.inputs()
        try:
            with self.isolation.fresh(), quiet(), mode:
                copy(*args, **kwargs)
        except Mismatch:
            raise
        except Exception as e:
            if traceback.extract_tb(e.__traceback__)[-1].filename == __file__:
                raise  # a mistake of this file, not of the cut model
            message = (str(e).splitlines() or [''])[0]
            raise Mismatch(mode.blame, f'{type(e).__name__}: {message}') from e
        if any(op.name not in _VIEWS for op in self.operations[mode.index:]):
            raise Mismatch(mode.blame, 'the cut model runs fewer operations than the dense one')


class _Replay(TorchDispatchMode):
    """Compares the operations inside it with recorded ones.

    A cut may change strides, and with them which views a product needs: views may come and go. A view that isn't as
    predicted is therefore no mismatch; but if a later operation is one, that view is to blame.

    Args:
        operations: The recorded operations.
        length: Predicted length of a dim: (dense length, label) → length.
    """

    def __init__(self, operations: Sequence[Operation], length: Callable[[int, Label], int]):
        super().__init__()
        self._operations = operations
        self._length = length
        self._suspect: Optional[int] = None  # the first view that wasn't as predicted
        self.index = 0                       # of the recorded operation that comes next

    @property
    def blame(self) -> int:
        """Number of the operation to blame if something fails now."""
        return min(self.index if self._suspect is None else self._suspect, len(self._operations) - 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = same_name(operation_name(func))
        if name in TRANSPARENT:
            return func(*args, **kwargs)
        at = self._find(name)
        if name in _VIEWS:
            return self._view(at, func, args, kwargs)
        if at is None:
            here = self._operations[self.blame].name
            raise Mismatch(self.blame, f'{name} where the dense model runs {here}')
        self.index = at
        recorded = self._operations[at]
        if recorded.outcome is None:
            out = func(*args, **kwargs)
        else:
            out = decided(func, name, args, recorded.outcome)
        difference = self._difference(recorded, out) or self._start_difference(recorded, args)
        if difference:
            raise Mismatch(self.blame, f'{name} {difference}')
        self.index, self._suspect = at + 1, None
        return out

    def _view(self, at: Optional[int], func: Callable, args: Tuple, kwargs: Dict[str, Any]) -> Any:
        if at is None:
            return func(*args, **kwargs)
        if self._suspect is None:
            self.index = at  # the one to blame if the call fails
        out = func(*args, **kwargs)
        if not self._difference(self._operations[at], out):
            self.index = at + 1
        elif self._suspect is None:
            self._suspect = at
        return out

    def _find(self, name: str) -> Optional[int]:
        """Number of the next operation of this name, with nothing but views before it."""
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
