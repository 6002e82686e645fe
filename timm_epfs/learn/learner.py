"""What every method shares: four calls around the user's own loop."""
import copy
from inspect import signature
from math import ceil
from typing import Any, Dict, FrozenSet, Mapping, Optional, Tuple, Union, cast

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn

from ..allocate import top
from ..core import DEFAULT_KINDS, PruningError, refuse_unknown, warn
from ..plan import Plan, PrunedModel, make_plan, make_recipe
from ..pruner import Pruner
from ..surgery import Masks, apply_plan, is_maskable, is_masked
from .center_loss import drop_hooks
from .mask_gradient import MaskGradient
from .selector import Selector
from .setup import Setup, make_setup

__all__ = ['Learner']


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

    Every method takes these arguments, beside its own:

    Args:
        model: A classifier on any device, DDP-wrapped or compiled or not, changed in place until ``remove()``; or a
            ``Pruner`` of one, which is then not traced again and says what may be cut.
        macs: Budget of multiply-accumulates: a share of the dense model, or a count of more than 1; or a whole
            ``Budget``. Without any budget, what the masks leave is cut.
        steps: Length of the sparse phase in optimizer steps.
        params: Budget of parameters, likewise, in place of ``macs``.
        latency: Budget of the time that a batch takes, in place of ``macs``, as in ``timm_epfs.prune``: measured where
            the model is. Cuts are priced by a table of layers, corrected by cuts measured whole: at the start of equal
            shares everywhere, when the selection is made of what was learned.
        latency_batch_size: Images in a batch, where time is measured.
        kinds: As in ``timm_epfs.prune``; SSS cuts blocks, too, if it isn't told.
        scope: As in ``timm_epfs.prune``, for what the method ranks units by.
        widths: As in ``timm_epfs.prune``: what says, before training, how many units each structure keeps where there
            is a budget; the method says which. Blocks have no width, and are left to the method.
        floor: Share of its units that each structure but a block keeps, at least one.
        round_to: As in ``timm_epfs.prune``.
        exclude: As in ``timm_epfs.prune``.
        only: As in ``timm_epfs.prune``.
        streams: Whether residual streams that are normalised over their channels may be cut. Masking and cutting differ
            there.
        example_input: As in ``timm_epfs.prune``.
        base: As in ``timm_epfs.prune``.

    Attributes:
        model: The model, with masks on it.
        structures: The structures that are learned.
        masks: Their masks.
        selector: What chooses units by scores.

    Raises:
        PruningError: What was asked for can't be done; one line says why and what to do.
    """

    method = ''
    learns_masks = True
    default_kinds: Tuple[str, ...] = DEFAULT_KINDS

    @classmethod
    def setup(cls, model: Union[nn.Module, Pruner], *args: Any, **options: Any) -> Setup:
        """What the arguments that all methods share amount to; a method makes it first and starts itself with it.

        Raises:
            PruningError: What was asked for can't be done. The model is as it was.
        """
        known = signature(make_setup).parameters
        refuse_unknown({name: value for name, value in options.items() if name not in known}, cls.__init__, make_setup)
        if options.get('kinds') is None and not isinstance(model, Pruner):
            options['kinds'] = cls.default_kinds
        return make_setup(model, *args, **options)

    def __init__(self, setup: Setup):
        pruner = setup.pruner
        if pruner.trace.returns != 'Tensor':
            raise PruningError(
                f'the model\'s forward returns a {pruner.trace.returns}; wrap it in one that returns the logits alone')
        unmasked = _without_masks(pruner)
        self.structures = [s for s in pruner.structures if s.name not in unmasked]
        if not self.structures:
            raise PruningError(
                f'nothing to learn: this model has none of {", ".join(pruner.kinds)} that can be masked, or exclude= '
                f'and only= leave them out')
        self.pruner, self.model, self.steps = pruner, pruner.model, setup.steps
        self.selector = Selector(setup, self.structures, unmasked)
        self.masks = Masks(self.model, self.structures, self.learns_masks)
        self._choice = setup.choice
        self._selects_at = setup.steps
        self._gradient = MaskGradient()
        self._count = 0
        self._stays: Optional[torch.Tensor] = None
        self._starts = np.array([self.masks.slices[s.name].start for s in self.structures])
        self._floors = np.array([
            0 if s.kind == 'blocks' else max(1, ceil(setup.choice.floor * s.units - 1e-9)) for s in self.structures])

    # The four calls.

    def penalty(self, target: Any = None) -> torch.Tensor:
        """What to add to the loss, a scalar. Terms that are solved by proximal steps are not in it."""
        return self.masks.probe()

    def step(self) -> None:
        """Move the masks. Call it once an optimizer step, before or after it.

        Raises:
            PruningError: There was no backward, or its gradients aren't finite (nothing is changed then).

        Warns:
            UserWarning: The selection was made, and its budget is missed.
        """
        gradient = self._gradient.read(self.masks, self._count + 1)
        if gradient is not None and not self.finished:
            self._advance(gradient)
        self._count += 1
        if self._count == self._selects_at:
            self._finish()
        self._stepped()

    def export(self, model: Optional[nn.Module] = None) -> PrunedModel:
        """Cut a copy, with the masks in its weights. The model itself goes on as it was.

        After ``steps`` steps the outputs are those of the masked model in evaluation mode (up to structures that can't
        be cut exactly). Before, what is left is ranked first, to meet the budget.

        Args:
            model: The model or a copy made since the learner was (``ema.module``). None: the model.

        Returns:
            A smaller model of the same class, with its ``pruning_plan``.
        """
        plan = self.plan()
        slim = cast(PrunedModel, apply_plan(self._unmasked(model), plan))
        slim.pruning_plan = self.pruner.composed(plan)
        return slim

    def state_dict(self) -> Dict[str, Any]:
        """Everything but the model's weights: tensors, numbers and text, by name."""
        state = {
            'method': self.method, 'structures': ' '.join(self.masks.slices), 'count': self._count,
            **self._gradient.state_dict(), **self.selector.state_dict(), **self._state(),
        }
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
        self._count = int(state['count'])
        self._gradient.load_state_dict(state)
        self.selector.load_state_dict(state)
        self._stays = state['stays'].clone() if 'stays' in state else None
        self._load(state)

    # What can be asked.

    @property
    def finished(self) -> bool:
        """Whether the selection is made."""
        return self._selects_at is not None and self._count >= self._selects_at

    @property
    def alive(self) -> float:
        """Share of the dense model's MACs, or of what the budget is of, that is alive now."""
        return self._share(self._selected().numpy() > 0)

    def log(self) -> Dict[str, float]:
        """Numbers to watch."""
        return {'alive': self.alive, 'skipped': float(self._gradient.skipped)}

    def values(self) -> Dict[str, np.ndarray]:
        """The masks of evaluation mode by structure name, shape (units,)."""
        return self.masks.split(self._selected().numpy().copy())

    def plan(self) -> Plan:
        """The plan of what would be cut now."""
        recipe = make_recipe(
            method=self.method, steps=self.steps, kinds=list(self.pruner.kinds), scope=self._choice.scope,
            widths=self._choice.widths, floor=self._choice.floor, **self.selector.recipe(), **self._recipe())
        return make_plan(self.pruner.trace, self._keep(), recipe, *self.pruner.base)

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
        """What the method's next step depends on: tensors, numbers and text, by name."""
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        """Go on where ``_state`` was taken."""
        raise NotImplementedError

    def _stepped(self) -> None:
        """What else a step does."""

    def _scores(self) -> Dict[str, np.ndarray]:
        """By what is ranked in the end."""
        return self.values()

    def _recipe(self) -> Dict[str, Any]:
        """What a plan's recipe says of the method's own arguments."""
        return {}

    # How it's done.

    def _finish(self) -> None:
        """Make the selection."""
        problem = ''
        if self.selector.quantity == 'latency':
            problem = self.selector.match_latency(self._scores(), self._unmasked())
        keep, missed = self._rank()
        self._stays = self._flags(keep)
        self._settle(self._selected() * self._stays)
        if problem or missed:
            warn(problem or missed)

    def _keep(self) -> Dict[str, np.ndarray]:
        """Units that stay: the selection, or what it would be now."""
        if self._stays is None:
            return self._rank()[0]
        stays = {name: np.flatnonzero(units) for name, units in self.masks.split(self._stays.numpy()).items()}
        return {s.name: stays.get(s.name, np.arange(s.units)) for s in self.pruner.trace.structures}

    def _rank(self) -> Tuple[Dict[str, np.ndarray], str]:
        """Units that stay by what is ranked, and what is wrong with how near that comes to the budget."""
        scores = self._scores()
        if self.selector.budget is not None:
            allocation = self.selector.allocate(scores)
            return allocation.keep, '' if self.selector.quantity == 'latency' else allocation.problem
        keep = {s.name: np.arange(s.units) for s in self.pruner.trace.structures}
        for s, floor in zip(self.structures, self._floors):
            keep[s.name] = top(scores[s.name], max(self._left(scores[s.name]), floor))
        return keep, ''

    def _left(self, scores: np.ndarray) -> int:
        """How many units of a structure stay, where no budget says so."""
        return int((scores > 0).sum())

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

    def _share(self, alive: np.ndarray) -> float:
        """Share of the dense model's cost if these units stay, shape (units,), bool."""
        counts = np.add.reduceat(alive.astype(np.int64), self._starts)
        return self.selector.share(dict(zip(self.masks.slices, counts)))


def _without_masks(pruner: Pruner) -> FrozenSet[str]:
    """Names of the structures that a pruner may cut and that get no masks."""
    return frozenset(
        s.name for s in pruner.structures if (s.stream and not pruner.streams) or not is_maskable(s))
