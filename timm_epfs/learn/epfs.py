"""EPFS: efficient structured pruning based on deep feature stabilization."""
from typing import Any, Dict, Mapping, Optional, Union

import torch
from torch import nn

from ..core import Budget, PruningError
from ..pruner import Pruner
from .center_loss import CenterLoss, FeatureHook, find_classifier
from .proximal_learner import ProximalLearner
from .solvers import Fista, prox_elastic, prox_norm

__all__ = ['EPFS']

_L2_RATIOS = {'norm': 20.0, 'elastic': 2.0, None: 0.0}


class EPFS(ProximalLearner):
    """EPFS (Xu et al., Neural Computing and Applications 33, 2021; blocks: DICTA 2019).

    ``min over W, m ≥ 0, c of CE + (λ_c/2)·‖φ(x) − c_y‖² + λ₁·Σ_k w_k·m_k + R₂(m)``: ℓ1 and ℓ2 on masks of filters, ℓ1
    on masks of blocks, Center Loss on the deep feature, FISTA for the masks. No code was released and the abstract says
    no more than this; what follows is our reading.

    - R₂ by name. ``'norm'``: per structure, (λ₂/2)·(‖m‖ − √C)², which keeps a norm behind the masks from letting all of
      them shrink at no cost. ``'elastic'``: (λ₂/2)·‖m‖². Both by their exact proximal maps; blocks have none.
    - λ₂ is ``l2_ratio`` times the structure's λ₁·w, so that it follows a λ₁ that is steered. Under ``'norm'`` and λ₁
      alone equal masks come to rest at 1 − 1/``l2_ratio``, from where those fall that the loss needs least.
    - In the end ℓ1 only selects (``refit``): masks that stay may be far from one by then, which is put right before
      the cut. Blocks' go into the weights as they are.
    - FISTA takes the gradient at the extrapolated point, which the network is trained with, restarts by O'Donoghue and
      Candès' gradient scheme, and its momentum is capped because gradients are noisy.
    - w is the unit's share of the MACs, over the root mean square of its mask's gradient (``weigh='fisher'``): an
      adaptive lasso (Zou, JASA 2006) by the diagonal of the Fisher information (Theis et al., 2018). The mean gradient
      tells units apart badly where weights are trained along: it vanishes wherever they have settled.
    - A unit that costs c times the mean has 1/c of the step (where c > 1), so that none falls faster than others.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``. A budget steers λ₁ while training, unless ``l1`` fixes it.
        steps: As in ``Learner``.
        l1: λ₁, fixed.
        l2: ``'norm'``, ``'elastic'`` or None.
        l2_ratio: λ₂/λ₁. None: 20 for ``'norm'``, 2 for ``'elastic'``.
        center: λ_c; 0 switches Center Loss off. Wen et al.'s value.
        center_alpha: α, the step of the centres.
        weigh: ``'fisher'``, ``'macs'`` or None.
        lr: η. None: from ``steps`` and λ₁.
        momentum: Cap on FISTA's momentum; 1 for none.
        restart: Whether FISTA restarts.
        follow_schedule: As in ``ProximalLearner``.
        refit: As in ``ProximalLearner``.
        **options: As in ``Learner``.
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
            center: float = 0.003,
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
        classifier = find_classifier(setup.pruner.model, *setup.pruner.example) if center else None
        super().__init__(setup, l1=l1, lr=lr, weigh=weigh, follow_schedule=follow_schedule, refit=refit)
        self.l2, self.l2_ratio, self.center = l2, _L2_RATIOS[l2] if l2_ratio is None else l2_ratio, center
        self._center_loss: Optional[CenterLoss] = None
        self._last_center = 0.0
        if classifier is not None:
            name, features, classes = classifier
            self._center_loss = CenterLoss(classes, features, center_alpha)
            self._feature = FeatureHook(self.model.get_submodule(name))
        units = torch.tensor([s.units for s in self.structures], dtype=torch.float64)
        self._radius = units.sqrt()
        self._firsts = torch.from_numpy(self._starts)  # λ₁ and the step are the same for all units of a structure
        self._has_l2 = torch.tensor([float(s.kind != 'blocks') for s in self.structures], dtype=torch.float64)
        self._scale = 1 / self.costs.clamp(min=1)
        self.solver = Fista(torch.ones(self.masks.units, dtype=torch.float64), restart, momentum)

    def _recipe(self) -> Dict[str, Any]:
        own = dict(
            l2=self.l2, l2_ratio=self.l2_ratio, center=self.center, momentum=self.solver.momentum,
            restart=self.solver.restart)
        return {**super()._recipe(), **own}

    def penalty(self, target: Any = None) -> torch.Tensor:
        """Center Loss times λ_c. ℓ1 and ℓ2 are in the proximal step, and not here a second time.

        Args:
            target: Class indices of the images of the last forward, shape (batch,).
        """
        loss = super().penalty()
        if self._center_loss is None or not self.model.training:
            return loss
        center = self._center_loss(self._feature.take(), target)
        self._last_center = center.detach()
        return loss + self.center * center

    def _stepped(self) -> None:
        if self._center_loss is not None:
            self._center_loss.update()

    def log(self) -> Dict[str, float]:
        """Center Loss before its weight, and how often FISTA's momentum was dropped."""
        return {**super().log(), 'center': float(self._last_center), 'restarts': float(self.solver.restarts)}

    def remove(self) -> None:
        super().remove()
        if self._center_loss is not None:
            self._feature.remove()

    def _move(self, grad: torch.Tensor) -> None:
        self.solver.step(grad, self.step_size * self._scale, self._prox)

    def _prox(self, v: torch.Tensor, step_size: torch.Tensor) -> torch.Tensor:
        owner, l1 = self.masks.owner, step_size * self.strength * self.weights
        l2 = self.l2_ratio * (step_size * self.strength * self.costs)[self._firsts] * self._has_l2
        if self.l2 == 'norm':
            held = prox_norm(v, l1, l2, owner, self._radius)
            return torch.where(self._has_l2[owner] > 0, held, prox_elastic(v, l1, 0.0))
        return prox_elastic(v, l1, l2[owner] if self.l2 == 'elastic' else 0.0)

    def _state(self) -> Dict[str, Any]:
        center = {} if self._center_loss is None else self._center_loss.state_dict()
        return {**super()._state(), **{f'center.{key}': value for key, value in center.items()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        if self._center_loss is not None:
            self._center_loss.load_state_dict({key: state[f'center.{key}'] for key in ('centers', 'sums')})
