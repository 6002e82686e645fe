"""What every method shares: four calls around the user's own loop."""
import copy
import warnings
from dataclasses import replace
from math import ceil
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Set, Union

import numpy as np
import timm
import torch
from timm.utils import unwrap_model
from torch import nn
from torch.utils._pytree import tree_map

from ..allocate import ALIGN, allocate, budget_from, top
from ..core import Budget, PruningError
from ..latency import Asked, Bench
from ..plan import Plan, make_plan
from ..pruner import example_for, left_alone, trace_model
from ..pruner.api import Example
from ..surgery import Masks, apply_plan, is_maskable, is_masked
from ..version import __version__
from ..zoo import base_of
from .center_loss import drop_hooks

__all__ = ['Learner', 'KINDS_BY_NAME']

_OVERFLOWS = 24     # in a row; a GradScaler has halved its scale down to nothing by then

# What the papers call the things that may be cut.
KINDS_BY_NAME: Dict[str, Sequence[str]] = {
    'filters': ('channels',),
    'neurons': ('channels',),
    'channels': ('channels',),
    'heads': ('heads', 'head_dims'),
    'groups': ('groups',),
    'blocks': ('blocks',),
}


class Learner:
    """Learns what to cut while a model is trained.

    ::

        learner = timm_epfs.EPFS(model, macs=0.5, steps=5000)
        for images, target in loader:
            loss = criterion(model(images), target) + learner.penalty(target)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            learner.step()
        slim = learner.export()

    The learner puts masks on the model and moves them itself; optimizers, clipping and DDP don't see them. In training
    mode the network runs with the masks as they are learned, in evaluation mode with exact zeros. After ``steps`` steps
    what is left is ranked, the budget is met, and the masks stay as they are.

    - The penalty is added to the loss as it is: by its gradient the learner knows the scale of the loss under a
      ``GradScaler`` or gradient accumulation. Call ``step()`` as often as ``optimizer.step()``, before or after it.
    - A step that overflows under a ``GradScaler`` is passed over, as the optimizer's is.
    - Optimizer, DDP wrapper and learner may be made in any order; ``ModelEmaV3`` and other copies after the learner.
      Copies have their own weights and share the masks.
    - Under DDP, gradients of the masks and centres are summed over the processes in ``step()``.
    - While the masks are on, masked tensors have longer names in ``model.state_dict()``.

    Args:
        model: A classifier on any device, DDP-wrapped or compiled or not. Changed in place until ``remove()``.
        macs: Budget of multiply-accumulates: a share of the dense model, or a count from 1 on. None: what the masks
            leave.
        steps: Length of the sparse phase in optimizer steps.
        latency: Budget of the time that a batch takes, in place of ``macs``, as in ``timm_epfs.prune``: measured where
            the model is. Cuts are priced by a table of layers, corrected by cuts measured whole: at the start of equal
            shares everywhere, when the selection is made of what was learned.
        latency_batch_size: Images a batch, where time is measured.
        structures: What may go: ``'filters'`` (or ``'neurons'``, ``'channels'``), ``'heads'``, ``'groups'``,
            ``'blocks'``.
        scope: As in ``timm_epfs.prune``, for what the method ranks units by.
        floor: Share of its units that each structure but a block keeps, at least one.
        round_to: As in ``timm_epfs.prune``.
        exclude: As in ``timm_epfs.prune``.
        only: As in ``timm_epfs.prune``.
        streams: Whether residual streams that are normalised over their channels may be cut. Masking and cutting differ
            there.
        example_input: As in ``timm_epfs.prune``.
        base: As in ``timm_epfs.prune``.

    Raises:
        PruningError: What was asked can't be done; one line says why and what to do.
    """

    method = ''
    learns_masks = True

    def __init__(
            self,
            model: nn.Module,
            macs: Optional[float] = None,
            steps: Optional[int] = None,
            *,
            latency: Optional[Union[float, str]] = None,
            latency_batch_size: int = 1,
            structures: Sequence[str] = ('filters', 'heads', 'groups'),
            scope: str = 'global',
            floor: float = 0.05,
            round_to: Optional[int] = None,
            exclude: Sequence[str] = (),
            only: Sequence[str] = (),
            streams: bool = False,
            example_input: Optional[Example] = None,
            base: Optional[str] = None,
    ):
        if not isinstance(model, nn.Module):
            raise PruningError(f'a model was asked for, {type(model).__name__} was given; give an nn.Module')
        if steps is not None and not (isinstance(steps, int) and steps >= 1):
            raise PruningError(f'steps={steps!r} was asked; give the number of optimizer steps, from 1 on')
        self.model = unwrap_model(model)
        if is_masked(self.model):
            raise PruningError('the model has a learner already; call remove() on that one first')
        self.steps, self.scope, self.floor, self.round_to, self.align = steps, scope, floor, round_to, ALIGN
        self._selects_at = steps
        self._base = (base, {}) if base is not None else base_of(self.model)
        self._earlier = getattr(self.model, 'pruning_plan', None)
        self._recipe = dict(macs=macs, steps=steps, structures=list(structures), scope=scope, floor=floor)
        self._example = tree_map(_meta, example_for(self.model, example_input))
        self.traced = trace_model(self.model, example_input)
        if self.traced.returns != 'Tensor':
            raise PruningError(
                f'the model\'s forward returns a {self.traced.returns}; wrap it in one that returns the logits alone')
        self.fixed = self._without_masks(_kinds(structures), exclude, only, streams)
        self.structures = [s for s in self.traced.structures if s.name not in self.fixed]
        if not self.structures:
            raise PruningError(
                f'nothing to learn: this model has none of {", ".join(structures)} that can be cut, or exclude= and '
                f'only= leave them out')
        self.budget, self.quantity = None, 'macs' if latency is None else 'latency'
        if latency is not None:
            self._budget_latency(latency, latency_batch_size)
        elif macs is not None:
            self._budget_macs(macs)
        self._dense = self._price({s.name: s.units for s in self.traced.structures})
        self._prepare()
        self.masks = Masks(self.model, self.structures, self.learns_masks)
        self._floors = np.array([0 if s.kind == 'blocks' else max(1, ceil(floor * s.units - 1e-9))
                                 for s in self.structures])
        self._starts = np.array([self.masks.slices[s.name].start for s in self.structures])
        self._count = 0
        self._skipped = self._overflows = 0
        self._stays: Optional[torch.Tensor] = None
        self._said: set = set()

    def _without_masks(
            self,
            kinds: Collection[str],
            exclude: Sequence[str],
            only: Sequence[str],
            streams: bool,
    ) -> Set[str]:
        """Names of the structures that get no masks."""
        structures = self.traced.structures
        fixed = left_alone(structures, exclude, only, kinds)
        fixed |= {s.name for s in structures if (s.stream and not streams) or not is_maskable(s)}
        return fixed | (self._earlier.uncomposable(structures) if isinstance(self._earlier, Plan) else set())

    def _budget_macs(self, macs: float) -> None:
        """What may be left, which equal shares show to be within reach."""
        self.budget = budget_from(self.traced.structures, self.traced.cost, macs=macs)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # how near it will be is said in the end
            self._allocate({s.name: np.ones(s.units) for s in self.structures})

    def _prepare(self) -> None:
        """Find out what may be refused while the model has no masks yet. What this needs is set before ``__init__``."""

    # The four calls.

    def penalty(self, target: Any = None) -> torch.Tensor:
        """What to add to the loss, a scalar. Terms that are solved by proximal steps are not in it."""
        return self.masks.probe()

    def step(self) -> None:
        """Move the masks. Call it once an optimizer step, before or after it.

        Raises:
            PruningError: There was no backward, or its gradients aren't finite (nothing is changed then).
        """
        grad = self.masks.take_gradient()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(grad)
        grad = grad.cpu().double()
        grad, scale = grad[:-1], float(grad[-1])
        if scale == 0:
            raise PruningError('the loss has no penalty in it; add learner.penalty(target)')
        finite = bool(grad.isfinite().all())
        self._overflows = 0 if finite else self._overflows + 1
        if not finite and (scale <= _processes() or self._overflows > _OVERFLOWS):
            raise PruningError(
                f'step {self._count + 1}: the loss or its gradients are not finite; the masks are as they were, go '
                f'back to an earlier checkpoint or lower the learning rate')
        self._skipped += not finite
        if finite and not self.finished:
            self._advance(grad / scale)
        self._count += 1
        if self._count == self._selects_at:
            self._finish()
        self._stepped()

    def export(self, model: Optional[nn.Module] = None) -> nn.Module:
        """Cut a copy, with the masks in its weights. The model itself goes on as it was.

        After ``steps`` steps the outputs are those of the masked model in evaluation mode (up to structures that can't
        be cut exactly). Before, what is left is ranked first, to meet the budget.

        Args:
            model: The model or a copy made since the learner was (``ema.module``). None: the model.

        Returns:
            A smaller model of the same class, with its ``pruning_plan``.
        """
        plan = self.plan()
        slim = self._unmasked(model)
        apply_plan(slim, plan)
        slim.pruning_plan = self._earlier.compose(plan) if isinstance(self._earlier, Plan) else plan
        return slim

    def state_dict(self) -> Dict[str, Any]:
        """Everything but the model's weights: tensors, numbers and text, by name."""
        state = {
            'method': self.method, 'structures': ' '.join(self.masks.slices),
            'count': self._count, 'skipped': self._skipped, 'overflows': self._overflows, **self._state(),
        }
        if self.quantity == 'latency':
            seconds = torch.from_numpy(self.traced.cost.seconds.copy())
            state.update({
                'latency.seconds': seconds, 'latency.target': self.budget.target, 'latency.align': self.align})
        return state if self._stays is None else {**state, 'stays': self._stays.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, exactly.

        Raises:
            PruningError: It's of another method or another model.
        """
        if state.get('method') != self.method or state.get('structures') != ' '.join(self.masks.slices):
            raise PruningError(
                f'this state is of method {state.get("method")!r} or of another model; resume with the learner that '
                f'made it ({self.method!r} here)')
        self._count, self._skipped = int(state['count']), int(state['skipped'])
        self._overflows = int(state['overflows'])
        self._stays = state['stays'].clone() if 'stays' in state else None
        if self.quantity == 'latency':
            self.traced.cost.seconds = state['latency.seconds'].numpy().copy()
            self.budget = Budget('latency', float(state['latency.target']))
            self.align = int(state['latency.align'])
            self._dense = self._price({s.name: s.units for s in self.traced.structures})
        self._load(state)

    # What can be asked.

    @property
    def finished(self) -> bool:
        """Whether the selection is made."""
        return self._selects_at is not None and self._count >= self._selects_at

    @property
    def alive(self) -> float:
        """Share of the dense MACs, or latency where that is the budget, of what is alive now."""
        return self._share(self._selected().numpy() > 0)

    def log(self) -> Dict[str, float]:
        """Numbers to watch."""
        return {'alive': self.alive, 'skipped': float(self._skipped)}

    def values(self) -> Dict[str, np.ndarray]:
        """The masks of evaluation mode by structure name, shape (units,)."""
        return self.masks.split(self._selected().numpy().copy())

    def plan(self) -> Plan:
        """The plan of what would be cut now."""
        return make_plan(self.traced, self._keep(), self._told(), *self._base)

    def remove(self) -> None:
        """Take the masks off the model: dense again, with the weights it has."""
        self.masks.remove()

    # What a method fills in.

    def _advance(self, grad: torch.Tensor) -> None:
        """Move the masks, given their gradient: mean over the processes, shape (units,), float64, on the CPU."""
        raise NotImplementedError

    def _selected(self) -> torch.Tensor:
        """Masks of evaluation mode, shape (units,), float64, on the CPU."""
        raise NotImplementedError

    def _settle(self, selected: torch.Tensor) -> None:
        """Put the masks at their last values."""
        raise NotImplementedError

    def _state(self) -> Dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _stepped(self) -> None:
        """What else a step does."""

    def _scores(self) -> Dict[str, np.ndarray]:
        """By what is ranked in the end."""
        return self.values()

    # How it's done.

    def _finish(self) -> None:
        if self.quantity == 'latency':
            self._meet(self._scores(), self._unmasked())
        self._stays = self._flags(self._rank())
        self._settle(self._selected() * self._stays)

    def _unmasked(self, model: Optional[nn.Module] = None) -> nn.Module:
        """A copy of the model, or of a copy of it, with the masks in its weights and its tensors' own names."""
        source = self.model if model is None else unwrap_model(model)
        if not is_masked(source):
            raise PruningError('export: this model has no masks; give the learner\'s model or a copy made after it')
        slim = self.masks.fold(copy.deepcopy(source))
        drop_hooks(slim)
        return slim

    def _flags(self, keep: Mapping[str, np.ndarray]) -> torch.Tensor:
        """Whether each unit is among those that stay, shape (units,), bool."""
        return torch.from_numpy(np.concatenate([np.isin(np.arange(s.units), keep[s.name]) for s in self.structures]))

    def _keep(self) -> Dict[str, np.ndarray]:
        """Units that stay: the selection, or what it would be now."""
        if self._stays is None:
            return self._rank()
        stays = {name: np.flatnonzero(units) for name, units in self.masks.split(self._stays.numpy()).items()}
        return {s.name: stays.get(s.name, np.arange(s.units)) for s in self.traced.structures}

    def _rank(self) -> Dict[str, np.ndarray]:
        scores = self._scores()
        if self.budget is not None:
            return self._allocate(scores)
        keep = {s.name: np.arange(s.units) for s in self.traced.structures}
        for s, floor in zip(self.structures, self._floors):
            keep[s.name] = top(scores[s.name], max(self._left(scores[s.name]), floor))
        return keep

    def _left(self, scores: np.ndarray) -> int:
        """How many units of a structure stay, where no budget says so."""
        return int((scores > 0).sum())

    def _allocate(self, scores: Dict[str, np.ndarray], **options: Any) -> Dict[str, np.ndarray]:
        """Units that stay; ``options`` differ from the learner's own where they are given."""
        given = {
            'budget': self.budget, 'scope': self.scope, 'round_to': self.round_to, 'align': self.align,
            'floor': self.floor, **options,
        }
        return allocate(self.traced.structures, scores, self.traced.cost, fixed=self.fixed, **given)

    def _budget_latency(self, latency: Union[float, str], batch_size: int) -> None:
        """Price by the table from now on. What a cut of equal shares needs of it is the budget until the end."""
        if self._recipe['macs'] is not None:
            raise PruningError('latency= was given with macs=; one budget is needed, leave the other out')
        self._asked = Asked(latency)
        self._bench = Bench(self.model, self.traced, *self._example, batch_size)
        self.traced = replace(self.traced, cost=self._bench.cost)
        if self.round_to is None:
            self.align = int(self._of_the_first(np.array(self._bench.alignment())))
        self._bench.cost.seconds = self._of_the_first(self._bench.cost.seconds)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # how near it will be is said in the end
            self._meet({s.name: np.ones(s.units) for s in self.structures}, self.model)
        self._recipe.update(latency=latency, latency_on=self._bench.place, align=self.align)

    def _meet(self, scores: Dict[str, np.ndarray], dense: nn.Module) -> None:
        """Take the budget of the table by which a cut by these scores meets the latency that was asked for."""
        def cut(budget: Budget) -> nn.Module:
            slim = copy.deepcopy(dense)
            apply_plan(slim, make_plan(self.traced, self._allocate(scores, budget=budget), {}))
            return slim

        _, share, _ = self._bench.meet(self._asked, cut, dense)
        self.budget = self._bench.budget(float(self._of_the_first(np.array(share))))

    def _of_the_first(self, values: np.ndarray) -> np.ndarray:
        """What the first process has: those that share a training must price alike, and its clock counts."""
        if _processes() == 1:
            return values
        shared = torch.from_numpy(values.astype(np.float64)).to(self._bench.device)
        torch.distributed.broadcast(shared, 0)
        return shared.cpu().numpy()

    def _price(self, left: Mapping[str, float]) -> float:
        """What the budget counts, of what is left."""
        counts = np.array([left[name] for name in self.traced.cost.names], dtype=np.float64)
        return self.traced.cost(self.quantity, counts)

    def _share(self, alive: np.ndarray) -> float:
        """Share of the dense MACs, or latency, if these units stay, shape (units,), bool."""
        left = {s.name: s.units for s in self.traced.structures}
        left.update(zip(self.masks.slices, np.add.reduceat(alive.astype(np.int64), self._starts)))
        return self._price(left) / self._dense

    def _told(self) -> Dict[str, Any]:
        versions = {'timm_epfs': __version__, 'timm': timm.__version__, 'torch': torch.__version__.split('+')[0]}
        told = {'method': self.method, **self._recipe, **versions}
        return {key: value for key, value in told.items() if value is not None}

    def _too_few(self, alive: np.ndarray) -> List[int]:
        """Numbers of the structures that are below their floor, said once each."""
        found = np.flatnonzero(np.add.reduceat(alive.astype(np.int64), self._starts) < self._floors)
        new = [i for i in found.tolist() if i not in self._said]
        if new and not self._said:
            warnings.warn(
                f'λ would take all but {self._floors[new[0]]} of the {self.structures[new[0]].units} units of '
                f'{self.structures[new[0]].name}: the floor holds them; a smaller λ, or floor=, changes that',
                stacklevel=5)
        self._said.update(new)
        return found.tolist()


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _meta(value: Any) -> Any:
    return value.to('meta') if isinstance(value, torch.Tensor) else value


def _kinds(structures: Sequence[str]) -> List[str]:
    if isinstance(structures, str) or not structures:
        raise PruningError(f'structures={structures!r} was asked; give a list, as in structures=(\'filters\',)')
    for name in structures:
        if name not in KINDS_BY_NAME:
            raise PruningError(f'structures: there is no {name!r}; choose among {", ".join(KINDS_BY_NAME)}')
    return [kind for name in structures for kind in KINDS_BY_NAME[name]]
