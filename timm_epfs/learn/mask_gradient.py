"""The gradient of the masks, whatever the loss was scaled by."""
from typing import Any, Dict, Mapping, Optional

import torch

from ..core import PruningError
from ..surgery import Masks
from .processes import summed, world_size

__all__ = ['MaskGradient']

_OVERFLOWS = 24     # in a row; a GradScaler has halved its scale down to nothing by then


class MaskGradient:
    """Reads the gradient of the masks after a backward: mean over the processes, without the loss's scale.

    The scale is the gradient of the probe that every penalty holds: what a ``GradScaler`` multiplied the loss by, or
    accumulation divided it by, times the number of processes.

    Attributes:
        skipped: How many gradients so far weren't finite.
    """

    def __init__(self) -> None:
        self.skipped = self._in_a_row = 0

    def read(self, masks: Masks, step: int) -> Optional[torch.Tensor]:
        """The gradient, shape (units,), float64, on the CPU; None where the loss overflowed under a ``GradScaler``.

        Args:
            masks: The masks; their gradient is taken off them.
            step: Number of the step, for messages.

        Raises:
            PruningError: There was no backward, its loss lacked the penalty, or it isn't finite for good.
        """
        flat = summed(masks.take_gradient()).cpu().double()
        gradient, scale = flat[:-1], float(flat[-1])
        if scale == 0:
            raise PruningError('the loss has no penalty in it; add learner.penalty(target)')
        finite = bool(gradient.isfinite().all())
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if not finite and (scale <= world_size() or self._in_a_row > _OVERFLOWS):
            raise PruningError(
                f'step {step}: the loss or its gradients are not finite; the masks are as they were, go back to an '
                f'earlier checkpoint or lower the learning rate')
        self.skipped += not finite
        return gradient / scale if finite else None

    def state_dict(self) -> Dict[str, Any]:
        """How many gradients weren't finite, in all and in a row."""
        return {'skipped': self.skipped, 'overflows': self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.skipped, self._in_a_row = int(state['skipped']), int(state['overflows'])
