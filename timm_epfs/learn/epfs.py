"""EPFS: efficient structured pruning based on deep feature stabilization."""
from typing import Any, Dict, Mapping, Optional, Tuple, Union

import torch
from torch import nn

from ..core import Budget, PruningError, kind_of, warn
from ..pruner import Pruner
from .center_loss import CenterLoss, FeatureHook, find_classifier, names_no_class
from .proximal_learner import ProximalLearner
from .setup import Setup
from .solvers import Fista, prox_elastic, prox_norm

__all__ = ['EPFS']

_CENTER = 0.003  # λ_c of Wen et al.
_L2_RATIOS = {'norm': 20.0, 'elastic': 2.0, None: 0.0}


class EPFS(ProximalLearner):
    """EPFS (Xu et al., Neural Computing and Applications 33, 2021; blocks: DICTA 2019).

    The problem is ``min over W, m ≥ 0, c of CE + (λ_c/2)·‖φ(x) − c_y‖² + λ₁·Σ_k w_k·m_k + R₂(m)``: ℓ1 and ℓ2 on the
    masks of filters, ℓ1 on the masks of blocks, Center Loss on the deep feature φ, and FISTA to solve for the masks.

    The authors released no code, and the abstract says no more than this. We chose the rest:

    - R₂ is ``'norm'``, (λ₂/2)·(‖m‖ − √C)² for each structure of C units, or ``'elastic'``, (λ₂/2)·‖m‖². Where a
      normalisation follows the masks, they could all shrink together without changing the loss; ``'norm'`` prevents
      that. Both are solved by their exact proximal maps. Masks of blocks have no R₂.
    - λ₂ is ``l2_ratio`` times the λ₁·w of the structure, so that it follows a λ₁ that is steered. If only λ₁ and
      ``'norm'`` act, equal masks come to rest at 1 − 1/``l2_ratio``. Those that the loss needs least fall from there.
    - ℓ1 only selects (``refit``): the masks of the units that stay may be far from one by then, so they are set to one
      when the selection is made. The masks of blocks go into the weights as they are.
    - FISTA takes the gradient at the extrapolated point, so the network is trained with the masks there. It restarts by
      the gradient scheme of O'Donoghue and Candès, and its momentum is capped because the gradients are noisy.
    - w is the unit's share of the MACs, divided by the root mean square of the gradient of its mask
      (``weigh='fisher'``). This is an adaptive lasso (Zou, JASA 2006) with the diagonal of the Fisher information
      (Theis et al., 2018). The mean gradient would be a poor weight: the model's weights are trained along with the
      masks, and wherever they have converged it vanishes.
    - A unit that costs c times the mean takes 1/c of the step where c > 1, so that costly units don't fall faster than
      others.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``. The budget steers λ₁ during training, unless ``l1`` fixes it.
        steps: As in ``Learner``.
        l1: λ₁, fixed. None: it is steered so that the budget is met.
        l2: R₂: ``'norm'``, ``'elastic'`` or None.
        l2_ratio: λ₂/λ₁. None: 20 for ``'norm'``, 2 for ``'elastic'``.
        center: λ_c. 0 switches Center Loss off. None: 0.003, as in Wen et al., where a layer of the model computes the
            scores of classes (``center_loss.find_classifier``) and ``penalty`` is given classes; otherwise 0, with a
            warning.
        center_alpha: α, the step size of the centres.
        weigh: ``'fisher'``, ``'macs'`` or None, as in ``ProximalLearner``.
        lr: η, the step size of the masks. None: from ``steps`` and the size of the gradients.
        momentum: Upper bound on FISTA's momentum; 1 for no bound.
        restart: Whether FISTA restarts.
        follow_schedule: As in ``ProximalLearner``.
        refit: As in ``ProximalLearner``.
        **options: As in ``Learner``.

    Raises:
        PruningError: As for ``Learner``; or ``center`` was given, and no layer or several compute scores of classes.

    Warns:
        UserWarning: ``center`` was not given, and Center Loss is off because the model or the targets have no classes.
    """

    method = 'epfs'
    solver: Fista

    def __init__(
            self,
            model: Union[nn.Module, Pruner],
            macs: Optional[Union[float, Budget]] = None,
            steps: Optional[int] = None,
            *,
            l1: Optional[float] = None,
            l2: Optional[str] = 'norm',
            l2_ratio: Optional[float] = None,
            center: Optional[float] = None,
            center_alpha: float = 0.5,
            weigh: Optional[str] = 'fisher',
            lr: Optional[float] = None,
            momentum: float = 0.9,
            restart: bool = True,
            follow_schedule: bool = True,
            refit: bool = True,
            **options: Any,
    ):
        if l2 not in _L2_RATIOS:
            raise PruningError(f"l2={l2!r} was given; choose 'norm', 'elastic' or None")
        setup = self.setup(model, macs, steps, **options)
        if center is not None and not center >= 0:
            raise PruningError(f'center={center!r} was given; give a number that is 0 or more')
        classifier = _classifier(setup, center)
        super().__init__(setup, l1=l1, lr=lr, weigh=weigh, follow_schedule=follow_schedule, refit=refit)
        self.l2, self._center_given = l2, center is not None
        self.l2_ratio = _L2_RATIOS[l2] if l2_ratio is None else l2_ratio
        self._center_loss: Optional[CenterLoss] = None
        self._last_center = 0.0
        self.center = 0.0
        if classifier is not None:
            self.center = _CENTER if center is None else center
            name, features, classes = classifier
            self._center_loss = CenterLoss(classes, features, center_alpha)
            self._feature = FeatureHook(self.model.get_submodule(name))
        units = torch.tensor([s.units for s in self.structures], dtype=torch.float64)
        self._radius = units.sqrt()  # √C
        self._has_l2 = torch.tensor([float(s.kind != 'blocks') for s in self.structures], dtype=torch.float64)
        self._step_scale = 1 / self.costs.clamp(min=1)
        self.solver = Fista(torch.ones(self.masks.units, dtype=torch.float64), restart, momentum)

    def _recipe(self) -> Dict[str, Any]:
        own = dict(
            l2=self.l2, l2_ratio=self.l2_ratio, center=self.center, momentum=self.solver.momentum,
            restart=self.solver.restart)
        return {**super()._recipe(), **own}

    def penalty(self, target: Any = None) -> torch.Tensor:
        """Center Loss times λ_c, a scalar. ℓ1 and ℓ2 are not part of it: the proximal step takes care of them.

        Args:
            target: Class indices of the images of the last forward, shape (batch,), int64. Anything where Center Loss
                is off.

        Raises:
            PruningError: The targets aren't class indices, or there was no forward in training mode.

        Warns:
            UserWarning: ``center`` was not given, and there are no classes: no target, or one of real numbers. Center
                Loss is off from now on.
        """
        loss = super().penalty()
        if self._center_loss is None or not self.model.training:
            return loss
        if not self._center_given and names_no_class(target):
            warn(
                f'EPFS goes on without Center Loss: it needs class indices, and penalty() got {kind_of(target)}; '
                f'center=0 switches it off')
            self._switch_center_off()
            return loss
        center = self._center_loss(self._feature.take(), target)
        self._last_center = center.detach()
        return loss + self.center * center

    def _switch_center_off(self) -> None:
        self._feature.remove()
        self._center_loss, self.center, self._last_center = None, 0.0, 0.0

    def _after_step(self) -> None:
        if self._center_loss is not None:
            self._center_loss.update()

    def log(self) -> Dict[str, float]:
        """Also Center Loss without its factor λ_c, and how often FISTA restarted."""
        return {**super().log(), 'center': float(self._last_center), 'restarts': float(self.solver.restarts)}

    def remove(self) -> None:
        """Take the masks, and Center Loss's hook, off the model."""
        super().remove()
        if self._center_loss is not None:
            self._feature.remove()

    def _move(self, grad: torch.Tensor) -> None:
        self.solver.step(grad, self.step_size * self._step_scale, self._prox)

    def _prox(self, v: torch.Tensor, step_size: torch.Tensor) -> torch.Tensor:
        """Proximal map of ``λ₁·Σ w·m + R₂(m)`` over ``m ≥ 0``.

        Args:
            v: Where the gradient step has led, shape (units,).
            step_size: η of each unit, shape (units,).
        """
        owner = self.masks.owner
        l1 = step_size * self.strength * self.weights
        # Units of one structure cost the same, so the first one stands for all.
        per_structure = (step_size * self.strength * self.costs)[torch.from_numpy(self._first_units)]
        l2 = self.l2_ratio * per_structure * self._has_l2
        if self.l2 == 'norm':
            filters = prox_norm(v, l1, l2, owner, self._radius)
            blocks = prox_elastic(v, l1, 0.0)
            return torch.where(self._has_l2[owner] > 0, filters, blocks)
        return prox_elastic(v, l1, l2[owner] if self.l2 == 'elastic' else 0.0)

    def _state(self) -> Dict[str, Any]:
        state = super()._state()
        if self._center_loss is not None:
            state.update({f'center.{key}': value for key, value in self._center_loss.state_dict().items()})
        return state

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self._center_loss is not None and 'center.centers' not in state:  # it was switched off while learning
            self._switch_center_off()
        elif self._center_loss is not None:
            self._center_loss.load_state_dict({key: state[f'center.{key}'] for key in ('centers', 'sums')})


def _classifier(setup: Setup, center: Optional[float]) -> Optional[Tuple[str, int, int]]:
    """What ``find_classifier`` finds, if Center Loss is to be on. Without ``center``, it is off if there is none."""
    if center == 0:
        return None
    try:
        return find_classifier(setup.pruner.model, *setup.pruner.example)
    except PruningError as e:
        if center is not None:
            raise
        warn(f'EPFS learns without Center Loss: {e}')
        return None
