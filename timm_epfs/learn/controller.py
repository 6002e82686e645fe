"""Steering λ so that a budget is met while the masks are learned."""
from math import exp, log
from typing import Any, Dict

import torch

__all__ = ['Controller']

_CALLS = 200        # times that λ is changed in a whole run
_LISTEN = 0.02      # share of the steps that only measures the gradients
_RAMP = (0.15, 0.8)  # between these shares of the steps the share wanted falls from 1 to the target
_LEAD = 0.05        # share of the steps by which masks are extrapolated
_GAIN = 0.2         # change of log λ a call, where all of the way to the target is missing
_PUSH = 2.0         # and what is added to log λ for as long as it is
_RANGE = 1e4        # how far λ may go from where it started


class Controller:
    """λ from the share of the MACs that is alive.

    Our own, proportional and integral on log λ; the papers fix it. The share wanted falls geometrically from 1 to the
    target between 15 % and 80 % of the steps. What is compared with it is the share that will be alive a little later
    if the masks keep moving as they do: masks take their time from one to zero, and a controller that waited for the
    zeros would overshoot.

    The first steps only measure the gradients of the masks. λ starts at their root mean square, so that it follows the
    scale of the loss.

    Args:
        target: Share of the MACs to reach.
        steps: Number of steps in all.
    """

    def __init__(self, target: float, steps: int):
        self.target, self.steps = target, steps
        self.listen = max(1, round(_LISTEN * steps))
        self.every = max(1, steps // _CALLS)
        self.value = self.start = self._slow = 0.0
        self._last = self._speed = torch.zeros(0, dtype=torch.float64)

    @property
    def ready(self) -> bool:
        """Whether λ is known."""
        return self.start > 0

    def begin(self, value: float) -> None:
        """Start at a λ."""
        self.start = self.value = self._slow = max(value, 1e-8)

    def wanted(self, step: float) -> float:
        """Share of the MACs that is to be alive at a step."""
        done = (step / self.steps - _RAMP[0]) / (_RAMP[1] - _RAMP[0])
        return self.target ** min(1.0, max(0.0, done))

    def due(self, step: int) -> bool:
        """Whether λ is changed after this step."""
        return step % self.every == 0

    def lead(self, step: int) -> float:
        """How many steps ahead to look: not past the end."""
        return min(max(1.0, _LEAD * self.steps), self.steps - step)

    def ahead(self, masks: torch.Tensor, step: int) -> torch.Tensor:
        """The masks as they will be if they keep moving as they do on average, shape (units,)."""
        if not len(self._last):
            self._last, self._speed = masks.clone(), torch.zeros_like(masks)
        share = min(1.0, self.every / max(1.0, _LEAD * self.steps))
        self._speed = self._speed + share * ((masks - self._last) / self.every - self._speed)
        self._last = masks.clone()
        return masks + self.lead(step) * self._speed

    def update(self, step: int, alive: float) -> float:
        """The new λ.

        Args:
            step: Number of the step, from 1.
            alive: Share of the MACs alive, as far ahead as ``lead`` says.
        """
        missing = log(max(alive, 1e-6) / self.wanted(step + self.lead(step))) / -log(self.target)
        missing = min(max(missing, -0.5), 0.5)
        slow = self._slow * exp(_GAIN * missing)
        self._slow = min(max(slow, self.start / _RANGE), self.start * _RANGE)
        self.value = self._slow * exp(_PUSH * missing)
        return self.value

    def state_dict(self) -> Dict[str, Any]:
        """All that the next update depends on."""
        numbers = {'value': self.value, 'start': self.start, 'slow': self._slow}
        return {**numbers, 'last': self._last.clone(), 'speed': self._speed.clone()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.value, self.start, self._slow = (float(state[key]) for key in ('value', 'start', 'slow'))
        self._last, self._speed = state['last'].clone(), state['speed'].clone()
