"""What EPFS and SSS share: masks moved by proximal steps, and λ, given or steered."""
import warnings
from typing import Any, Dict, Mapping, Optional, Union

import numpy as np
import torch

from ..core import Budget, PruningError
from ..importance import WITHOUT_DATA, score
from .controller import Controller
from .learner import Learner
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
        model: As in ``Learner``.
        macs: As in ``Learner``. It steers λ where ``l1`` is None.
        steps: As in ``Learner``.
        l1: λ₁, fixed.
        lr: η, the step size of the masks; may be set at any time (``learner.lr = …``). None: ``step_size``'s rule.
        keep_pace: Where λ is steered, whether what is alive follows the schedule closely: the smallest masks become
            zero as soon as more is alive than it wants, and those that would leave less stay. False: only in the end.
        refit: Whether the selection is made after 85 % of ``steps``, and the masks of what stays are one from then on.
            ℓ1 chooses, but what it did to the masks that stay isn't kept (the relaxed lasso: Meinshausen, CSDA 2007).
            Blocks keep theirs: what a block adds has learned the size of its shortcut, which no norm puts right.
            False: the selection is made in the end, and the masks go on into the weights.
        weigh: What λ₁ is multiplied by, with a mean of one. ``'macs'``: the unit's share of the model's MACs, or of its
            latency where that is the budget. ``'fisher'``: that over the root mean square of the mask's gradient so
            far. None: λ₁ for all.
        widths: Criterion of ``timm_epfs.prune`` that says, before training, how many units each structure keeps where
            there is a budget; the masks say which. Blocks are left to their masks. None: the masks say both.
        **options: As in ``Learner``.
    """

    solver: Union[Fista, Apg]

    def __init__(
            self,
            model: torch.nn.Module,
            macs: Optional[float] = None,
            steps: Optional[int] = None,
            *,
            l1: Optional[float] = None,
            lr: Optional[float] = None,
            weigh: Optional[str] = 'macs',
            keep_pace: bool = True,
            refit: bool = True,
            widths: Optional[str] = None,
            **options: Any,
    ):
        _check(macs if macs is not None else options.get('latency'), steps, l1, lr, weigh, widths)
        self.widths = widths
        super().__init__(model, macs, steps, **options)
        self.l1, self.lr, self.weigh, self.keep_pace, self.refit = l1, lr, weigh, keep_pace, refit
        self._recipe.update(l1=l1, weigh=weigh, keep_pace=keep_pace, refit=refit, widths=widths)
        if refit and steps is not None:
            self._selects_at = max(1, round(_SELECT * steps))
        self.costs = self._unit_costs() if weigh else torch.ones(self.masks.units, dtype=torch.float64)
        self._squares = torch.zeros_like(self.costs)
        self.controller = Controller(self.budget.target / self._dense, steps) if l1 is None else None
        self._rms, self._largest = 0.0, 1e-8

    def _prepare(self) -> None:
        super()._prepare()
        self._widths = self._widths_by(self.widths) if self.widths and self.budget is not None else {}

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
        """Share of the dense MACs of what is alive now. While λ is steered, masks that hover about zero don't count."""
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
        """MACs, or seconds where latency is the budget, of a unit in the dense model, over the mean, shape (units,)."""
        counts = self.traced.cost.counts({s.name: s.units for s in self.traced.structures})
        by_name = dict(zip(self.traced.cost.names, self.traced.cost.gradient(self.quantity, counts)))
        flat = np.concatenate([np.full(s.units, by_name[s.name]) for s in self.structures])
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
        if self.keep_pace and self.controller is not None:
            wanted = self.controller.wanted(step)
            self._hold_back(before, wanted)
            if self.controller.due(step):
                self._catch_up(wanted)
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

    def _catch_up(self, wanted: float) -> None:
        """Where λ leaves more alive than there should be by now, the smallest masks become zero, as in the end.

        Masks that a norm follows may all shrink together at no cost in the loss: then λ alone selects too late, and
        the last cut takes what the network relies on. A mask that is set to zero comes back where the loss asks for it.
        """
        if self._share((self.solver.x > 0).numpy()) <= wanted:
            return
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # how near the budget is counts in the end
            keep = self._allocate(self._scores(), budget=Budget(self.quantity, wanted * self._dense), round_to=1)
        self.solver.hold(~self._flags(keep), torch.zeros_like(self.solver.x))

    def _widths_by(self, criterion: str) -> Dict[str, int]:
        """Units that the structures keep by a criterion at the budget, blocks left out."""
        scores = score(self.model, self.structures, criterion)
        highest = max(float(values.max()) for values in scores.values())
        blocks = [s.name for s in self.structures if s.kind == 'blocks']
        scores.update({name: np.full(1, highest + 1) for name in blocks})  # the last to go
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # how near the budget is counts in the end
            keep = self._allocate(scores)
        return {s.name: len(keep[s.name]) for s in self.structures if s.name not in blocks}

    def _scores(self) -> Dict[str, np.ndarray]:
        """The masks, or by how much each one's place from the largest on is within the width that is given."""
        return {
            name: self._widths[name] / _places(masks) if name in self._widths else masks
            for name, masks in self.values().items()
        }

    def _clearly_alive(self, masks: torch.Tensor) -> np.ndarray:
        return (masks > _FAINT * self.solver.x.mean()).numpy()

    def _move(self, grad: torch.Tensor) -> None:
        raise NotImplementedError

    def _hold_floors(self, before: torch.Tensor) -> None:
        """In structures that λ would empty, the largest masks stay where they were."""
        alive = (self.solver.x > 0).numpy()
        held = np.zeros(len(alive), dtype=bool)
        for i in self._too_few(alive):
            at = self.masks.slices[self.structures[i].name]
            order = np.argsort(-before[at].numpy(), kind='stable')[:self._floors[i]]
            held[at.start + order] = True
        if held.any():
            self.solver.hold(torch.from_numpy(held & ~alive), before)

    def _selected(self) -> torch.Tensor:
        return self.solver.x

    def _settle(self, selected: torch.Tensor) -> None:
        if self.refit:
            for structure in self.structures:
                if structure.kind != 'blocks':
                    at = self.masks.slices[structure.name]
                    selected[at] = self._stays[at].to(selected)
        self.solver.x = selected
        self.masks.set(self.solver.x, self.solver.x)

    def _state(self) -> Dict[str, Any]:
        parts = {'solver': self.solver.state_dict()}
        if self.controller is not None:
            parts['controller'] = self.controller.state_dict()
        flat = {f'{part}.{key}': value for part, state in parts.items() for key, value in state.items()}
        held = ' '.join(str(i) for i in sorted(self._said))
        own = {'lr': self.lr, 'rms': self._rms, 'largest': self._largest, 'held': held}
        widths = {f'widths.{name}': width for name, width in self._widths.items()}
        return {**flat, **own, **widths, 'squares': self._squares.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        for part in ('solver', 'controller'):
            if getattr(self, part) is not None:
                at = len(part) + 1
                getattr(self, part).load_state_dict(
                    {key[at:]: value for key, value in state.items() if key.startswith(f'{part}.')})
        self.lr, self._rms, self._largest = state['lr'], float(state['rms']), float(state['largest'])
        self._squares = state['squares'].clone()
        self._widths = {name: int(state[f'widths.{name}']) for name in self._widths}
        self._said = {int(i) for i in state['held'].split()}
        self.masks.set(self.solver.x if self.finished else self.solver.y, self.solver.x)


def _per_gradient(costs: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Costs over root mean square gradients, with a mean of one and gradients that vanish bounded."""
    weights = costs / (squares / squares.mean().clamp(min=1e-30)).clamp(min=1e-4).sqrt()
    return weights / weights.mean()


def _places(values: np.ndarray) -> np.ndarray:
    """Places from the largest on, from 1, of equal ones the first first, shape (units,)."""
    places = np.empty(len(values))
    places[np.argsort(-values, kind='stable')] = np.arange(1, len(values) + 1)
    return places


def _check(
        macs: Optional[float],
        steps: Optional[int],
        l1: Optional[float],
        lr: Optional[float],
        weigh: Optional[str],
        widths: Optional[str],
) -> None:
    if macs is None and l1 is None:
        raise PruningError('neither macs= nor latency= nor l1= was given; give a budget, or a fixed λ')
    if l1 is None and steps is None:
        raise PruningError('a budget without steps= was given; say how many optimizer steps there are to reach it')
    for name, value in (('l1', l1), ('lr', lr)):
        if value is not None and not value >= 0:
            raise PruningError(f'{name}={value!r} was asked; give a number from 0 on')
    if weigh not in _WEIGHS:
        raise PruningError(f"weigh={weigh!r} was asked; choose 'fisher', 'macs' or None")
    if widths is not None and widths not in WITHOUT_DATA:
        raise PruningError(f'widths={widths!r} was asked; choose one of {", ".join(WITHOUT_DATA)}, or None')
