"""``Learner``: what all methods share. Four calls in the user's training loop, from masks to a smaller model."""
from inspect import signature
from math import ceil
from typing import Any, Dict, Mapping, Optional, Tuple, Union, cast

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn

from ..allocate import top
from ..core import DEFAULT_KINDS, PruningError, clone_tensor, deep_copy, refuse_unknown, warn
from ..plan import Plan, PrunedModel, make_plan, make_recipe
from ..pruner import Pruner
from ..surgery import Masks, apply_plan, is_masked
from .center_loss import drop_hooks
from .mask_gradient import MaskGradient
from .selector import Selector
from .setup import Setup, make_setup, structures_to_learn

__all__ = ['Learner']


class Learner:
    """Learns which units to cut while a model is trained.

    ::

        learner = timm_epfs.EPFS(model, macs=0.5, steps=5000)
        for images, target in loader:
            loss = criterion(model(images), target) + learner.penalty(target)
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            learner.step()
        slim = learner.export()

    What happens, in order:

    1. The constructor puts masks on the model's weights, one entry per unit, all ones.
    2. ``penalty()`` adds the method's terms to the loss. The backward then gives the masks a gradient.
    3. ``step()`` moves the masks by that gradient. Optimizers, gradient clipping and DDP don't see the masks.
    4. After ``steps`` steps (EPFS and SSS: after 85 % of them, unless ``refit=False``), ``step()`` makes the
       *selection*: it ranks the units, keeps those that meet the budget, and sets the masks of all others to zero. The
       selection is final.
    5. ``export()`` cuts the units that were not selected out of a copy of the model.

    In training mode the model runs with the masks as they are learned, in evaluation mode with exact zeros.

    How it fits into a training loop:

    - Add the penalty to the loss without a factor of your own: the learner reads from its gradient by how much a
      ``GradScaler`` or gradient accumulation scaled the loss.
    - Call ``step()`` as often as ``optimizer.step()``, before or after it. A step that overflows under a ``GradScaler``
      is skipped, as the optimizer's is.
    - Optimizer, DDP wrapper and learner may be made in any order. Make ``ModelEmaV3`` and other copies after the
      learner. Copies have their own weights and share the masks.
    - Under DDP, ``step()`` sums the gradients of masks and centres over the processes.
    - While the masks are on, masked tensors have longer names in ``model.state_dict()``.

    Every method takes these arguments besides its own:

    Args:
        model: A model on any device, DDP-wrapped or compiled or not, whatever its forward returns; it is changed in
            place until ``remove()``. Or a ``Pruner`` of one: then the model isn't traced again, and the pruner's
            options say what may be cut.
        macs: Budget of multiply-accumulates: a share of the dense model's (``0.5``), a count above 1 (``2e9``), or a
            whole ``Budget``. Without any budget, the units whose masks are zero are cut.
        steps: Length of the sparse phase in optimizer steps.
        params: Budget of parameters, in place of ``macs``: a share or a count.
        latency: Budget of the time that a batch takes, in place of ``macs``, as in ``timm_epfs.prune``. It is measured
            on the model's device. A table of layer timings prices the cuts. Measurements of whole cut models correct
            it: one at the start, with equal shares cut everywhere, and one when the selection is made.
        latency_batch_size: Number of images in a batch when latency is measured.
        kinds: As in ``timm_epfs.prune``. SSS cuts blocks, too, by default.
        scope: As in ``timm_epfs.prune``, for the scores by which the method ranks units.
        widths: As in ``timm_epfs.prune``: where there is a budget, this decides before training how many units each
            structure keeps, and the method decides which. Blocks have no width, so the method alone decides on them.
        floor: Share of its units that each structure keeps, and at least one unit. Blocks have no floor.
        round_to: As in ``timm_epfs.prune``.
        exclude: As in ``timm_epfs.prune``.
        only: As in ``timm_epfs.prune``.
        streams: Whether to cut residual streams that are normalised over their channels. Masking and cutting give
            different outputs there.
        example_input: As in ``timm_epfs.prune``.
        base: As in ``timm_epfs.prune``.

    Attributes:
        model: The model, with masks on it.
        structures: The structures that have masks.
        masks: The masks.
        selector: Chooses the units that stay, given scores.

    Raises:
        PruningError: An argument is invalid, the model can't be traced or masked, or the budget is out of reach.
    """

    method = ''
    learns_masks = True
    default_kinds: Tuple[str, ...] = DEFAULT_KINDS

    @classmethod
    def setup(cls, model: Union[nn.Module, Pruner], *args: Any, **options: Any) -> Setup:
        """Check the arguments that all methods share. A method calls this first and passes the result to ``__init__``.

        Raises:
            PruningError: An argument is invalid. The model is unchanged.
        """
        known = signature(make_setup).parameters
        refuse_unknown({name: value for name, value in options.items() if name not in known}, cls.__init__, make_setup)
        if options.get('kinds') is None and not isinstance(model, Pruner):
            options['kinds'] = cls.default_kinds
        return make_setup(model, *args, **options)

    def __init__(self, setup: Setup):
        self.structures, not_learned = structures_to_learn(setup.pruner)
        self.pruner, self.model, self.steps = setup.pruner, setup.pruner.model, setup.steps
        self.selector = Selector(setup, self.structures, not_learned)
        self.masks = Masks(self.model, self.structures, self.learns_masks)
        self._choice = setup.choice
        self._gradient = MaskGradient()
        self._steps_done = 0
        self._selection_step = setup.steps  # None: never
        self._kept: Optional[torch.Tensor] = None  # shape (units,), bool, once the selection is made
        self._first_units = np.array([self.masks.slices[s.name].start for s in self.structures])
        self._min_units = np.array([
            0 if s.kind == 'blocks' else max(1, ceil(setup.choice.floor * s.units - 1e-9)) for s in self.structures])

    # The calls in a training loop.

    def penalty(self, target: Any = None) -> torch.Tensor:
        """The term to add to the loss, a scalar.

        Here it is only the probe, a zero from whose gradient the scale of the loss is read. Methods add their own
        terms.
        """
        return self.masks.probe()

    def step(self) -> None:
        """Move the masks by the gradient of the last backward, and make the selection when it is due.

        Call it once for each optimizer step, before or after it.

        Raises:
            PruningError: There was no backward, or its gradients aren't finite. Nothing is changed then.

        Warns:
            UserWarning: The selection misses its budget.
        """
        gradient = self._gradient.read(self.masks, self._steps_done + 1)
        if gradient is not None and not self.finished:
            self._update(gradient)
        self._steps_done += 1
        if self._steps_done == self._selection_step:
            self._make_selection()
        self._after_step()

    def export(self, model: Optional[nn.Module] = None) -> PrunedModel:
        """Cut a copy of the model, with the masks multiplied into its weights. The model itself is unchanged.

        Once the selection is made, the copy gives the same outputs as the masked model in evaluation mode, except for
        structures that can't be cut exactly. Before that, units are ranked and cut to the budget as the masks are now.

        Args:
            model: The model, or a copy that was made after the learner (``ema.module``). None: the model.

        Returns:
            A smaller model of the same class, with its ``pruning_plan``.

        Raises:
            PruningError: ``model`` has no masks.
        """
        plan = self.plan()
        slim = cast(PrunedModel, apply_plan(self._fold_masks(model), plan))
        slim.pruning_plan = self.pruner.composed(plan)
        return slim

    def state_dict(self) -> Dict[str, Any]:
        """The learner's state without the model's weights: tensors, numbers and text by name."""
        state = {
            'method': self.method, 'structures': ' '.join(self.masks.slices), 'count': self._steps_done,
            **self._gradient.state_dict(), **self.selector.state_dict(), **self._state(),
        }
        return state if self._kept is None else {**state, 'stays': self._kept.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume exactly where ``state_dict`` was called.

        Raises:
            PruningError: The state was saved by another method or for another model.
        """
        if state.get('method') != self.method or state.get('structures') != ' '.join(self.masks.slices):
            raise PruningError(
                f'this state was saved by method {state.get("method")!r} or for another model; resume with the learner '
                f'that saved it (this one is {self.method!r})')
        self._steps_done = int(state['count'])
        self._gradient.load_state_dict(state)
        self.selector.load_state_dict(state)
        self._kept = state['stays'].clone() if 'stays' in state else None
        self._load(state)

    # What can be read at any time.

    @property
    def finished(self) -> bool:
        """Whether the selection is made."""
        return self._selection_step is not None and self._steps_done >= self._selection_step

    @property
    def alive(self) -> float:
        """Share of the dense model's cost that units with a non-zero mask have now; MACs, or the budget's quantity."""
        return self._cost_share(self._eval_masks().numpy() > 0)

    def log(self) -> Dict[str, float]:
        """Numbers to log: the share that is alive, and how many steps were skipped for gradients that overflowed."""
        return {'alive': self.alive, 'skipped': float(self._gradient.skipped)}

    def values(self) -> Dict[str, np.ndarray]:
        """The masks of evaluation mode by structure name, shape (units,)."""
        return self.masks.split(self._eval_masks().numpy().copy())

    def plan(self) -> Plan:
        """The plan that ``export`` cuts by."""
        recipe = make_recipe(
            method=self.method, steps=self.steps, kinds=list(self.pruner.kinds), scope=self._choice.scope,
            widths=self._choice.widths, floor=self._choice.floor, **self.selector.recipe(), **self._recipe())
        return make_plan(self.pruner.trace, self._units_to_keep(), recipe, *self.pruner.base)

    def remove(self) -> None:
        """Take the masks off the model. It is dense again and keeps the weights that it has now."""
        self.masks.remove()

    # What a method implements.

    def _update(self, grad: torch.Tensor) -> None:
        """Move the masks.

        Args:
            grad: Gradient of the masks, averaged over the processes, shape (units,), float64, on the CPU.
        """
        raise NotImplementedError

    def _eval_masks(self) -> torch.Tensor:
        """Masks of evaluation mode, shape (units,), float64, on the CPU."""
        raise NotImplementedError

    def _finalise(self, masks: torch.Tensor) -> None:
        """Set the masks to their final values. Called once, when the selection is made.

        Args:
            masks: Masks of evaluation mode, zero for every unit that was not selected, shape (units,).
        """
        raise NotImplementedError

    def _state(self) -> Dict[str, Any]:
        """What the method's next step depends on: tensors, numbers and text by name."""
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        """Resume where ``_state`` was called."""
        raise NotImplementedError

    def _after_step(self) -> None:
        """Runs at the end of every step; for anything else to update."""

    def _scores(self) -> Dict[str, np.ndarray]:
        """Scores that the selection ranks units by, by structure name, shape (units,), higher = keep."""
        return self.values()

    def _recipe(self) -> Dict[str, Any]:
        """The method's own arguments, for the recipe of the plan."""
        return {}

    def _keep_count(self, scores: np.ndarray) -> int:
        """How many units a structure keeps where there is no budget, given its scores, shape (units,)."""
        return int((scores > 0).sum())

    # How the selection is made.

    def _make_selection(self) -> None:
        """Make the selection, and set the masks to it."""
        latency_problem = ''
        if self.selector.quantity == 'latency':
            latency_problem = self.selector.match_latency(self._scores(), self._fold_masks())
        keep, problem = self._choose()
        self._kept = self._as_vector(keep)
        self._finalise(self._eval_masks() * self._kept)
        if latency_problem or problem:
            warn(latency_problem or problem)

    def _units_to_keep(self) -> Dict[str, np.ndarray]:
        """Units that stay by structure name: the selection, or what it would be if it were made now."""
        if self._kept is None:
            return self._choose()[0]
        by_name = self.masks.split(self._kept.numpy())
        keep = {name: np.flatnonzero(kept) for name, kept in by_name.items()}
        return {s.name: keep.get(s.name, np.arange(s.units)) for s in self.pruner.trace.structures}

    def _choose(self) -> Tuple[Dict[str, np.ndarray], str]:
        """Choose the units that stay by their scores; and say, in a line, how the budget is missed, if it is."""
        scores = self._scores()
        if self.selector.budget is not None:
            allocation = self.selector.allocate(scores)
            # The table's latency is only an estimate: ``match_latency`` measures, and reports what it finds.
            return allocation.keep, '' if self.selector.quantity == 'latency' else allocation.problem
        keep = {s.name: np.arange(s.units) for s in self.pruner.trace.structures}
        for s, minimum in zip(self.structures, self._min_units):
            keep[s.name] = top(scores[s.name], max(self._keep_count(scores[s.name]), minimum))
        return keep, ''

    def _fold_masks(self, model: Optional[nn.Module] = None) -> nn.Module:
        """A copy of the model without masks, whose weights are multiplied by those of evaluation mode."""
        source = self.model if model is None else unwrap_model(model)
        if not is_masked(source):
            raise PruningError(
                'export: this model has no masks; give the learner\'s model, or a copy that was made after the learner')
        slim = self.masks.fold(deep_copy(source, clone_tensor))
        drop_hooks(slim)
        return slim

    def _as_vector(self, keep: Mapping[str, np.ndarray]) -> torch.Tensor:
        """Whether each unit is among those that stay, shape (units,), bool."""
        return torch.from_numpy(np.concatenate([np.isin(np.arange(s.units), keep[s.name]) for s in self.structures]))

    def _cost_share(self, alive: np.ndarray) -> float:
        """Share of the dense model's cost if only these units stay; ``alive`` is a bool per unit, shape (units,)."""
        counts = np.add.reduceat(alive.astype(np.int64), self._first_units)
        return self.selector.share(dict(zip(self.masks.slices, counts)))
