"""``ProximalLearner``: what EPFS and SSS share. Proximal steps move the masks; λ is given, or steered to the budget."""
from typing import Any, Dict, List, Mapping, Optional, Set, Union

import numpy as np
import torch

from ..core import PruningError, warn
from .controller import Controller
from .learner import Learner
from .setup import Setup
from .solvers import Apg, Fista

__all__ = ['ProximalLearner']

_WEIGHINGS = ('fisher', 'macs', None)
_STEPS = 1000           # length of the phase that is assumed where steps= isn't given
_RMS_WINDOW = 0.02      # the size of the gradients is averaged over this share of the steps
_SQUARES_WINDOW = 0.5   # and their squares over this one
_NEAR_ZERO = 0.05       # masks below this share of the mean count as zero while λ is steered
_SELECT_AT = 0.85       # share of the steps after which the selection is made, with refit
_GROWTH = 2             # factor by which gradients are expected to grow once masks have left one


class ProximalLearner(Learner):
    """Masks that are moved by proximal steps.

    Each ``step()`` runs through ``_update``:

    1. Average the size of the gradients, which sets the step size and the units' weights.
    2. Let the controller update λ, unless λ is fixed.
    3. Take the method's proximal step, ``_move``.
    4. Restore masks where the step would leave a structure fewer units than its floor.
    5. Where λ is steered, keep the share that is alive on the controller's schedule.

    Args:
        setup: What ``Learner.setup`` returned.
        l1: λ₁, fixed. None: it is steered so that the budget is met.
        lr: η, the step size of the masks, which may be changed at any time (``learner.lr = …``). None: the rule of
            ``step_size``.
        follow_schedule: Where λ is steered, whether the share that is alive follows the controller's schedule closely.
            Where more is alive than it wants, the smallest masks are set to zero. Where a step leaves less alive than
            it wants, masks that just became zero are restored. False: λ alone decides until the selection.
        refit: Whether the selection is made after 85 % of ``steps`` and, after the selection, masks of the units that
            stay are set to one. ℓ1 then only selects: how far it shrank the masks that stay is undone (the relaxed
            lasso: Meinshausen, CSDA 2007). Blocks keep their masks: a block has learned its size relative to its
            shortcut, and no normalisation corrects that. False: the selection is made after the last step, and the
            masks go into the weights.
        weigh: What multiplies λ₁ for each unit; it has a mean of one. ``'macs'``: what the unit costs, in the budget's
            quantity. ``'fisher'``: that cost, divided by the root mean square of the gradient of the unit's mask so
            far. None: one.

    Attributes:
        solver: Holds the masks: ``solver.x`` is the solution, ``solver.y`` the point where the gradient is taken.
        controller: Steers λ. None where λ is fixed.
        costs: What a unit costs in the dense model, divided by the mean, shape (units,). Ones where ``weigh`` is None.

    Raises:
        PruningError: Neither a budget nor ``l1`` is given, there are no ``steps`` for the budget, or an argument is
            invalid.
    """

    l1_name = 'l1'  # the method's name of the argument l1
    solver: Union[Fista, Apg]

    def __init__(
            self,
            setup: Setup,
            *,
            l1: Optional[float] = None,
            lr: Optional[float] = None,
            weigh: Optional[str] = 'macs',
            follow_schedule: bool = True,
            refit: bool = True,
    ):
        _check(setup, self.l1_name, l1, lr, weigh)
        super().__init__(setup)
        self.l1, self.lr, self.weigh, self.follow_schedule, self.refit = l1, lr, weigh, follow_schedule, refit
        if refit and setup.steps is not None:
            self._selection_step = max(1, round(_SELECT_AT * setup.steps))
        self.costs = self._unit_costs() if weigh else torch.ones(self.masks.units, dtype=torch.float64)
        self.controller = Controller(self.selector.budget.value, setup.steps) if l1 is None else None
        self._rms, self._largest_rms = 0.0, 1e-8
        self._mean_squares = torch.zeros_like(self.costs)  # of each mask's gradient, where weigh='fisher'
        self._at_floor: Set[int] = set()  # positions of structures whose floor was reached so far

    def _unit_costs(self) -> torch.Tensor:
        per_unit = np.repeat(self.selector.unit_costs(), [s.units for s in self.structures])
        return torch.from_numpy(np.maximum(per_unit / per_unit.mean(), 1e-3))

    def _recipe(self) -> Dict[str, Any]:
        return dict(l1=self.l1, weigh=self.weigh, follow_schedule=self.follow_schedule, refit=self.refit)

    # λ, its weights and the step size.

    @property
    def strength(self) -> float:
        """λ₁ now."""
        return self.l1 if self.controller is None else self.controller.value

    @property
    def weights(self) -> torch.Tensor:
        """What λ₁ is multiplied by for each unit now, shape (units,)."""
        if self.weigh == 'fisher' and self._mean_squares.any():
            return _cost_per_gradient(self.costs, self._mean_squares)
        return self.costs

    @property
    def step_size(self) -> float:
        """η: ``lr``, or ``1 / (steps · largest gradient so far)``.

        With a momentum of 0.9, a gradient as large as the largest so far then takes a mask from one to zero within a
        tenth of the steps. Like the estimate of the Lipschitz constant in FISTA's backtracking, the largest gradient
        never falls, so η never grows.
        """
        return self.lr if self.lr is not None else 1 / ((self.steps or _STEPS) * self._largest_rms)

    @property
    def alive(self) -> float:
        """As for every learner. While λ is steered, masks near zero count as zero."""
        if self.controller is None or self.finished:
            return super().alive
        return self._cost_share(self._clearly_alive(self.solver.x))

    def log(self) -> Dict[str, float]:
        """λ, the weighted ℓ1 penalty on the masks, the share of the units whose mask isn't zero, and η."""
        masks = self._eval_masks()
        return {
            **super().log(), 'lambda': float(self.strength), 'l1': float(self.strength * (self.weights * masks).sum()),
            'units': float((masks > 0).double().mean()), 'lr': float(self.step_size),
        }

    # One step.

    def _update(self, grad: torch.Tensor) -> None:
        step = self._steps_done + 1
        self._measure(grad, step)
        if self.controller is not None:
            if not self.controller.ready and step < self.controller.measure_steps:
                return
            self._steer(step)

        before = self.solver.x
        self._move(grad)
        self._hold_floors(before)
        if self.controller is not None and self.follow_schedule:
            wanted = self.controller.wanted(step)
            self._restore_early_zeros(before, wanted)
            if self.controller.due(step):
                self._zero_smallest(wanted)
        self.masks.set(self.solver.y, self.solver.x)

    def _measure(self, grad: torch.Tensor, step: int) -> None:
        """Update the running averages of the gradients' size, and the largest so far."""
        rms = float((grad / self.costs).square().mean().sqrt())
        self._rms += self._weight_of_step(step, _RMS_WINDOW) * (rms - self._rms)
        self._largest_rms = max(self._largest_rms, self._rms)
        if self.weigh == 'fisher':
            self._mean_squares += self._weight_of_step(step, _SQUARES_WINDOW) * (grad.square() - self._mean_squares)

    def _weight_of_step(self, step: int, window: float) -> float:
        """The weight of a step in a running average over a window, which is a share of all steps."""
        return max(1 / step, 1 / max(1.0, window * (self.steps or _STEPS)))

    def _steer(self, step: int) -> None:
        """Start λ at the size of the gradients, or update it where an update is due."""
        if not self.controller.ready:
            self.controller.begin(self._largest_rms)
            self._largest_rms *= _GROWTH
        if self.controller.due(step):
            expected = self.controller.extrapolate(self.solver.x, step)
            self.controller.update(step, self._cost_share(self._clearly_alive(expected)))

    def _clearly_alive(self, masks: torch.Tensor) -> np.ndarray:
        return (masks > _NEAR_ZERO * self.solver.x.mean()).numpy()

    def _move(self, grad: torch.Tensor) -> None:
        """Take the method's proximal step.

        Args:
            grad: Gradient of the loss at ``solver.y``, shape (units,).
        """
        raise NotImplementedError

    # What is changed after the proximal step.

    def _hold_floors(self, before: torch.Tensor) -> None:
        """Restore the largest masks of structures that keep fewer units than their floor.

        Args:
            before: The masks before the step, shape (units,).
        """
        alive = (self.solver.x > 0).numpy()
        counts = np.add.reduceat(alive.astype(np.int64), self._first_units)
        too_few = np.flatnonzero(counts < self._min_units).tolist()
        held = np.zeros(len(alive), dtype=bool)
        for i in too_few:
            at = self.masks.slices[self.structures[i].name]
            largest = np.argsort(-before[at].numpy(), kind='stable')[:self._min_units[i]]
            held[at.start + largest] = True
        if held.any():
            self._warn_of_the_floor(too_few)
            self.solver.reset(torch.from_numpy(held & ~alive), before)

    def _warn_of_the_floor(self, at_floor: List[int]) -> None:
        """Warn, once in a run, that λ is too large for some structure."""
        if not self._at_floor:
            structure, minimum = self.structures[at_floor[0]], self._min_units[at_floor[0]]
            remedy = f'a smaller {self.l1_name}=' if self.controller is None else 'a larger budget'
            warn(
                f'{structure.name}: ℓ1 would leave fewer than {minimum} of {structure.units} units, the floor keeps '
                f'{minimum}; change floor=, or give {remedy}')
        self._at_floor.update(at_floor)

    def _restore_early_zeros(self, before: torch.Tensor, wanted: float) -> None:
        """Where less is alive than the schedule wants, undo zeros of this step, those of the largest masks first.

        Args:
            before: The masks before the step, shape (units,).
            wanted: Share of the cost that should be alive.
        """
        alive = (self.solver.x > 0).numpy()
        new_zeros = np.flatnonzero((before > 0).numpy() & ~alive)
        restored = np.zeros_like(alive)
        for unit in new_zeros[np.argsort(-before[new_zeros].numpy(), kind='stable')]:
            if self._cost_share(alive | restored) >= wanted:
                break
            restored[unit] = True
        if restored.any():
            self.solver.reset(torch.from_numpy(restored), before)

    def _zero_smallest(self, wanted: float) -> None:
        """Where more is alive than the schedule wants, set the smallest masks to zero, as the selection would.

        Where a normalisation follows the masks, they can all shrink together without changing the loss. λ alone then
        selects too late, and the selection would remove units that the network relies on. A mask that is set to zero
        here grows again where the loss asks for it.

        Args:
            wanted: Share of the cost that should be alive.
        """
        if self._cost_share((self.solver.x > 0).numpy()) <= wanted:
            return
        keep = self.selector.allocate(self._scores(), wanted, round_to=1).keep
        self.solver.reset(~self._as_vector(keep), torch.zeros_like(self.solver.x))

    # The selection and the state.

    def _eval_masks(self) -> torch.Tensor:
        return self.solver.x

    def _finalise(self, masks: torch.Tensor) -> None:
        if self.refit:
            for structure in self.structures:
                if structure.kind != 'blocks':
                    at = self.masks.slices[structure.name]
                    masks[at] = self._kept[at].to(masks)
        self.solver.reset(torch.ones_like(masks, dtype=torch.bool), masks)
        self.masks.set(masks, masks)

    def _state(self) -> Dict[str, Any]:
        parts = {'solver': self.solver.state_dict()}
        if self.controller is not None:
            parts['controller'] = self.controller.state_dict()
        flat = {f'{part}.{key}': value for part, state in parts.items() for key, value in state.items()}
        at_floor = ' '.join(str(i) for i in sorted(self._at_floor))
        own = {'lr': self.lr, 'rms': self._rms, 'largest': self._largest_rms, 'held': at_floor}
        return {**flat, **own, 'squares': self._mean_squares.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.solver.load_state_dict(_part(state, 'solver'))
        if self.controller is not None:
            self.controller.load_state_dict(_part(state, 'controller'))
        self.lr, self._rms, self._largest_rms = state['lr'], float(state['rms']), float(state['largest'])
        self._mean_squares = state['squares'].clone()
        self._at_floor = {int(i) for i in state['held'].split()}
        self.masks.set(self.solver.x if self.finished else self.solver.y, self.solver.x)


def _part(state: Mapping[str, Any], name: str) -> Dict[str, Any]:
    """The entries of a state whose keys start with ``name.``, without that prefix."""
    prefix = f'{name}.'
    return {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}


def _cost_per_gradient(costs: torch.Tensor, mean_squares: torch.Tensor) -> torch.Tensor:
    """Costs divided by root mean square gradients, with a mean of one. Gradients near zero are bounded from below."""
    relative = mean_squares / mean_squares.mean().clamp(min=1e-30)
    weights = costs / relative.clamp(min=1e-4).sqrt()
    return weights / weights.mean()


def _check(setup: Setup, l1_name: str, l1: Optional[float], lr: Optional[float], weigh: Optional[str]) -> None:
    if setup.budget is None and l1 is None:
        raise PruningError(f'neither a budget (macs=, params=, latency=) nor {l1_name}= was given; give one of them')
    if l1 is None and setup.steps is None:
        raise PruningError('a budget was given without steps=; give the number of optimizer steps in which to reach it')
    for name, value in ((l1_name, l1), ('lr', lr)):
        if value is not None and not value >= 0:
            raise PruningError(f'{name}={value!r} was given; give a number that is 0 or more')
    if weigh not in _WEIGHINGS:
        raise PruningError(f"weigh={weigh!r} was given; choose 'fisher', 'macs' or None")
