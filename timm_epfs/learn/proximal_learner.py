"""What EPFS and SSS share: masks moved by proximal steps, and λ, given or steered."""
from typing import Any, Dict, List, Mapping, Optional, Set, Union

import numpy as np
import torch

from ..core import PruningError, warn
from .controller import Controller
from .learner import Learner
from .setup import Setup
from .solvers import Apg, Fista

__all__ = ['ProximalLearner']

_WEIGHS = ('fisher', 'macs', None)
_LISTEN = 0.02  # share of the steps that gradients' size is averaged over
_REMEMBER = 0.5  # and that their squares are
_FAINT = 0.05   # masks below this share of the mean hover about zero, and count as gone when λ is steered
_SELECT = 0.85  # share of the steps after which what stays is refitted
_GROWTH = 2     # how much larger gradients are bound to get, once masks leave one


class ProximalLearner(Learner):
    """Masks that move by proximal steps.

    Args:
        setup: What all methods share.
        l1: λ₁, fixed; None: steered, so that the budget is met.
        lr: η, the step size of the masks; may be set at any time (``learner.lr = …``). None: ``step_size``'s rule.
        follow_schedule: Where λ is steered, whether what is alive follows the schedule closely: the smallest masks
            become zero as soon as more is alive than it wants, and those that would leave less stay. False: only in the
            end.
        refit: Whether the selection is made after 85 % of ``steps``, and the masks of what stays are one from then on.
            ℓ1 chooses, but what it did to the masks that stay isn't kept (the relaxed lasso: Meinshausen, CSDA 2007).
            Blocks keep theirs: what a block adds has learned the size of its shortcut, which no norm puts right.
            False: the selection is made in the end, and the masks go on into the weights.
        weigh: What λ₁ is multiplied by, with a mean of one. ``'macs'``: what the unit costs of the budget's quantity.
            ``'fisher'``: that over the root mean square of the mask's gradient so far. None: λ₁ for all.
    """

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
        _check(setup, l1, lr, weigh)
        super().__init__(setup)
        self.l1, self.lr, self.weigh, self.follow_schedule, self.refit = l1, lr, weigh, follow_schedule, refit
        if refit and setup.steps is not None:
            self._selects_at = max(1, round(_SELECT * setup.steps))
        self.costs = self._unit_costs() if weigh else torch.ones(self.masks.units, dtype=torch.float64)
        self._squares = torch.zeros_like(self.costs)
        self.controller = Controller(self.selector.budget.value, setup.steps) if l1 is None else None
        self._rms, self._largest = 0.0, 1e-8
        self._held_at_floor: Set[int] = set()

    def _recipe(self) -> Dict[str, Any]:
        return dict(l1=self.l1, weigh=self.weigh, follow_schedule=self.follow_schedule, refit=self.refit)

    @property
    def strength(self) -> float:
        """λ₁ as it is now."""
        return self.l1 if self.controller is None else self.controller.value

    @property
    def weights(self) -> torch.Tensor:
        """What λ₁ is multiplied by now, shape (units,)."""
        if self.weigh == 'fisher' and self._squares.any():
            return _per_gradient(self.costs, self._squares)
        return self.costs

    @property
    def alive(self) -> float:
        """As of every learner; while λ is steered, masks that hover about zero don't count."""
        if self.controller is None or self.finished:
            return super().alive
        return self._share(self._clearly_alive(self.solver.x))

    def log(self) -> Dict[str, float]:
        """λ, the penalty that it puts on the masks, the share of the units that are not zero, and η."""
        x = self._selected()
        return {
            **super().log(), 'lambda': float(self.strength), 'l1': float(self.strength * (self.weights * x).sum()),
            'units': float((x > 0).double().mean()), 'lr': float(self.step_size),
        }

    def _measure(self, grad: torch.Tensor, step: int) -> None:
        """Keep the largest gradient so far, root mean square over the units, on average over a few steps."""
        rms = float((grad / self.costs).square().mean().sqrt())
        self._rms += self._share_of_new(step, _LISTEN) * (rms - self._rms)
        self._largest = max(self._largest, self._rms)
        if self.weigh == 'fisher':
            self._squares += self._share_of_new(step, _REMEMBER) * (grad.square() - self._squares)

    def _share_of_new(self, step: int, window: float) -> float:
        """What a step counts in an average over a window, a share of all steps."""
        return max(1 / step, 1 / max(1.0, window * (self.steps or 1000)))

    @property
    def step_size(self) -> float:
        """η: ``lr``, or such that steps are as long as the phase can bear.

        A gradient as large as the largest so far takes a mask from one to zero in a tenth of the steps under a
        momentum of 0.9. Like the estimate of the Lipschitz constant in FISTA's backtracking, it never grows.
        """
        return self.lr if self.lr is not None else 1 / ((self.steps or 1000) * self._largest)

    def _unit_costs(self) -> torch.Tensor:
        """What a unit costs in the dense model, over the mean, shape (units,)."""
        flat = np.repeat(self.selector.unit_costs(), [s.units for s in self.structures])
        return torch.from_numpy(np.maximum(flat / flat.mean(), 1e-3))

    def _advance(self, grad: torch.Tensor) -> None:
        step = self._count + 1
        self._measure(grad, step)
        if self.controller is not None:
            if not self.controller.ready:
                if step < self.controller.listen:
                    return
                self.controller.begin(self._largest)
                self._largest *= _GROWTH
            if self.controller.due(step):
                ahead = self.controller.ahead(self.solver.x, step)
                self.controller.update(step, self._share(self._clearly_alive(ahead)))
        before = self.solver.x
        self._move(grad)
        self._hold_floors(before)
        if self.follow_schedule and self.controller is not None:
            wanted = self.controller.wanted(step)
            self._hold_back(before, wanted)
            if self.controller.due(step):
                self._zero_smallest(wanted)
        self.masks.set(self.solver.y, self.solver.x)

    def _hold_back(self, before: torch.Tensor, wanted: float) -> None:
        """Where λ leaves less alive than there should be yet, the largest of the masks that fell stay as they were."""
        alive = (self.solver.x > 0).numpy()
        fell = np.flatnonzero((before > 0).numpy() & ~alive)
        held = np.zeros_like(alive)
        for unit in fell[np.argsort(-before[fell].numpy(), kind='stable')]:
            if self._share(alive | held) >= wanted:
                break
            held[unit] = True
        if held.any():
            self.solver.hold(torch.from_numpy(held), before)

    def _zero_smallest(self, wanted: float) -> None:
        """Where λ leaves more alive than there should be by now, the smallest masks become zero, as in the end.

        Masks that a norm follows may all shrink together at no cost in the loss: then λ alone selects too late, and
        the last cut takes what the network relies on. A mask that is set to zero comes back where the loss asks for it.
        """
        if self._share((self.solver.x > 0).numpy()) <= wanted:
            return
        keep = self.selector.allocate(self._scores(), wanted, round_to=1).keep
        self.solver.hold(~self._flags(keep), torch.zeros_like(self.solver.x))

    def _clearly_alive(self, masks: torch.Tensor) -> np.ndarray:
        return (masks > _FAINT * self.solver.x.mean()).numpy()

    def _move(self, grad: torch.Tensor) -> None:
        raise NotImplementedError

    def _hold_floors(self, before: torch.Tensor) -> None:
        """In structures that λ would empty, the largest masks stay where they were."""
        alive = (self.solver.x > 0).numpy()
        too_few = np.flatnonzero(np.add.reduceat(alive.astype(np.int64), self._starts) < self._floors)
        held = np.zeros(len(alive), dtype=bool)
        for i in too_few.tolist():
            at = self.masks.slices[self.structures[i].name]
            order = np.argsort(-before[at].numpy(), kind='stable')[:self._floors[i]]
            held[at.start + order] = True
        if held.any():
            self._warn_of_the_floor(too_few.tolist())
            self.solver.hold(torch.from_numpy(held & ~alive), before)

    def _warn_of_the_floor(self, held: List[int]) -> None:
        """Say once that λ is too large for some structure."""
        if not self._held_at_floor:
            structure, floor = self.structures[held[0]], self._floors[held[0]]
            warn(
                f'λ would take all but {floor} of the {structure.units} units of {structure.name}: the floor holds '
                f'them; a smaller λ, or floor=, changes that')
        self._held_at_floor.update(held)

    def _selected(self) -> torch.Tensor:
        return self.solver.x

    def _settle(self, selected: torch.Tensor) -> None:
        if self.refit:
            for structure in self.structures:
                if structure.kind != 'blocks':
                    at = self.masks.slices[structure.name]
                    selected[at] = self._stays[at].to(selected)
        self.solver.hold(torch.ones_like(selected, dtype=torch.bool), selected)
        self.masks.set(selected, selected)

    def _state(self) -> Dict[str, Any]:
        parts = {'solver': self.solver.state_dict()}
        if self.controller is not None:
            parts['controller'] = self.controller.state_dict()
        flat = {f'{part}.{key}': value for part, state in parts.items() for key, value in state.items()}
        held = ' '.join(str(i) for i in sorted(self._held_at_floor))
        own = {'lr': self.lr, 'rms': self._rms, 'largest': self._largest, 'held': held}
        return {**flat, **own, 'squares': self._squares.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        for part in ('solver', 'controller'):
            if getattr(self, part) is not None:
                at = len(part) + 1
                getattr(self, part).load_state_dict(
                    {key[at:]: value for key, value in state.items() if key.startswith(f'{part}.')})
        self.lr, self._rms, self._largest = state['lr'], float(state['rms']), float(state['largest'])
        self._squares = state['squares'].clone()
        self._held_at_floor = {int(i) for i in state['held'].split()}
        self.masks.set(self.solver.x if self.finished else self.solver.y, self.solver.x)


def _per_gradient(costs: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Costs over root mean square gradients, with a mean of one and gradients that vanish bounded."""
    weights = costs / (squares / squares.mean().clamp(min=1e-30)).clamp(min=1e-4).sqrt()
    return weights / weights.mean()


def _check(setup: Setup, l1: Optional[float], lr: Optional[float], weigh: Optional[str]) -> None:
    if setup.budget is None and l1 is None:
        raise PruningError('neither a budget (macs=, params=, latency=) nor l1= was given; give one of them')
    if l1 is None and setup.steps is None:
        raise PruningError('a budget without steps= was given; say how many optimizer steps there are to reach it')
    for name, value in (('l1', l1), ('lr', lr)):
        if value is not None and not value >= 0:
            raise PruningError(f'{name}={value!r} was given; give a number from 0 on')
    if weigh not in _WEIGHS:
        raise PruningError(f"weigh={weigh!r} was given; choose 'fisher', 'macs' or None")
