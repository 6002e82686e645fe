"""``Controller``: steers λ while the masks are learned, so that the budget is met."""
from math import exp, log
from typing import Any, Dict

import torch

__all__ = ['Controller']

# All shares are shares of the steps of the sparse phase.
_UPDATES = 200              # number of times that λ is changed
_MEASURE = 0.02             # share at the start that only measures the gradients
_SCHEDULE = (0.15, 0.8)     # between these the share wanted falls from 1 to the target
_LOOKAHEAD = 0.05           # share by which masks are extrapolated
_INTEGRAL_GAIN = 0.2        # change of log λ per update, where the error is 1
_PROPORTIONAL_GAIN = 2.0    # added to log λ while the error is 1
_LARGEST_ERROR = 0.5        # errors are clipped to this
_RANGE = 1e4                # λ stays within this factor of where it started


class Controller:
    """A proportional-integral controller on log λ. It compares the share of the cost that is alive with a schedule.

    This is our own: the papers fix λ. The schedule, ``wanted``, falls geometrically from 1 to the target between 15 %
    and 80 % of the steps. It is compared with the share that will be alive a little later if the masks keep moving as
    they do now. Masks take many steps from one to zero, so a controller that waited for the zeros would overshoot.

    The first steps only measure the gradients of the masks. λ starts at their root mean square, so that it follows the
    scale of the loss.

    Half-way through the schedule of a target of 25 %, half of the cost should be alive:

    >>> controller = Controller(target=0.25, steps=1000)
    >>> [round(controller.wanted(step), 2) for step in (0, 150, 475, 800, 1000)]
    [1.0, 1.0, 0.5, 0.25, 0.25]

    Too much is alive, so λ rises:

    >>> controller.begin(1.0)
    >>> controller.update(step=475, alive=0.6) > 1
    True

    Args:
        target: Share of the dense model's cost to reach.
        steps: Length of the sparse phase in optimizer steps.

    Attributes:
        value: λ.
        measure_steps: Number of steps at the start that only measure the gradients.
        every: Number of steps between two updates.
    """

    def __init__(self, target: float, steps: int):
        self.target, self.steps = target, steps
        self.measure_steps = max(1, round(_MEASURE * steps))
        self.every = max(1, steps // _UPDATES)
        self.value = self.start = 0.0
        self._integral = 0.0  # λ without its proportional part
        self._last = self._speed = torch.zeros(0, dtype=torch.float64)

    @property
    def ready(self) -> bool:
        """Whether λ has a value."""
        return self.start > 0

    def begin(self, value: float) -> None:
        """Set the first λ."""
        self.start = self.value = self._integral = max(value, 1e-8)

    def wanted(self, step: float) -> float:
        """The share of the cost that should be alive at a step."""
        begin, end = _SCHEDULE
        progress = (step / self.steps - begin) / (end - begin)
        return self.target ** min(1.0, max(0.0, progress))

    def due(self, step: int) -> bool:
        """Whether λ is updated at this step."""
        return step % self.every == 0

    def lookahead(self, step: int) -> float:
        """How many steps ahead the masks are extrapolated, never beyond the last step."""
        return min(max(1.0, _LOOKAHEAD * self.steps), self.steps - step)

    def extrapolate(self, masks: torch.Tensor, step: int) -> torch.Tensor:
        """The masks ``lookahead`` steps later, if they keep moving at their average speed. Called once per update.

        Args:
            masks: The masks now, shape (units,).
            step: Number of the step, from 1.

        Returns:
            Extrapolated masks, shape (units,).
        """
        if not len(self._last):
            self._last, self._speed = masks.clone(), torch.zeros_like(masks)
        weight = min(1.0, self.every / max(1.0, _LOOKAHEAD * self.steps))
        speed_now = (masks - self._last) / self.every
        self._speed = self._speed + weight * (speed_now - self._speed)
        self._last = masks.clone()
        return masks + self.lookahead(step) * self._speed

    def update(self, step: int, alive: float) -> float:
        """Change λ, and return it.

        The error is the way that is left to the schedule, on a log scale, as a share of the whole way from the dense
        model to the target.

        Args:
            step: Number of the step, from 1.
            alive: Share of the cost that the extrapolated masks leave alive.
        """
        error = log(max(alive, 1e-6) / self.wanted(step + self.lookahead(step))) / -log(self.target)
        error = min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
        integral = self._integral * exp(_INTEGRAL_GAIN * error)
        self._integral = min(max(integral, self.start / _RANGE), self.start * _RANGE)
        self.value = self._integral * exp(_PROPORTIONAL_GAIN * error)
        return self.value

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next update depends on."""
        numbers = {'value': self.value, 'start': self.start, 'slow': self._integral}
        return {**numbers, 'last': self._last.clone(), 'speed': self._speed.clone()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Resume where ``state_dict`` was called."""
        self.value, self.start, self._integral = (float(state[key]) for key in ('value', 'start', 'slow'))
        self._last, self._speed = state['last'].clone(), state['speed'].clone()
