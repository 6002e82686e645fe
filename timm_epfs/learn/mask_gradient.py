"""``MaskGradient``: the gradient of the masks, with the scale of the loss divided out."""
from typing import Any, Dict, Mapping, Optional

import torch

from ..core import PruningError, summed, world_size
from ..surgery import Masks

__all__ = ['MaskGradient']

_MAX_OVERFLOWS = 24  # in a row; by then a GradScaler has divided its scale by 2²⁴


class MaskGradient:
    """Reads the gradient of the masks after a backward: averaged over the processes, without the loss's scale.

    A ``GradScaler`` multiplies the loss, gradient accumulation divides it. Every penalty contains a *probe*: a zero
    whose gradient is one. After the backward its gradient, summed over the processes, is the scale of the loss times
    the number of processes. Dividing by it gives the mean gradient of the unscaled loss.

    Attributes:
        skipped: Number of steps so far whose gradient wasn't finite.
    """

    def __init__(self) -> None:
        self.skipped = self._in_a_row = 0

    def read(self, masks: Masks, step: int) -> Optional[torch.Tensor]:
        """The gradient, shape (units,), float64, on the CPU. None where the loss overflowed under a ``GradScaler``.

        Args:
            masks: The masks. Their gradient is cleared.
            step: Number of the step, for messages.

        Raises:
            PruningError: There was no backward, or the loss lacked the penalty. Or the gradient isn't finite, either
                without a ``GradScaler`` or more than 24 times in a row.
        """
        gradient_and_probe = summed(masks.take_gradient()).cpu().double()
        gradient, scale = gradient_and_probe[:-1], float(gradient_and_probe[-1])
        if scale == 0:
            raise PruningError('the loss has no penalty in it; add learner.penalty(target) to the loss')
        finite = bool(gradient.isfinite().all())
        self._in_a_row = 0 if finite else self._in_a_row + 1
        unscaled = scale <= world_size()
        if not finite and (unscaled or self._in_a_row > _MAX_OVERFLOWS):
            raise PruningError(
                f'step {step}: the loss or its gradients are not finite, and the masks were not changed; resume from '
                f'an earlier checkpoint, or lower the learning rate')
        self.skipped += not finite
        return gradient / scale if finite else None

    def state_dict(self) -> Dict[str, Any]:
        """How many gradients weren't finite: in total, and in a row until now."""
        return {'skipped': self.skipped, 'overflows': self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state_dict`` was called."""
        self.skipped, self._in_a_row = int(state['skipped']), int(state['overflows'])
