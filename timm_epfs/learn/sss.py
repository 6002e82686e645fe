"""SSS: data-driven sparse structure selection."""
from typing import Any, Dict, Optional, Union

import torch
from torch import nn

from ..core import KINDS, Budget
from ..pruner import Pruner
from .proximal_learner import ProximalLearner
from .solvers import Apg

__all__ = ['SSS']


class SSS(ProximalLearner):
    """SSS (Huang and Wang, ECCV 2018): ℓ1 on scaling factors of neurons, groups and blocks, solved by a modified APG.

    The scaling factors are the masks. The update is that of the authors' released code (``solvers.Apg``), and γ means
    what it does there: the weight of ℓ1, which ``ProximalLearner`` calls λ₁. A factor at zero comes back where its
    gradient exceeds γ in magnitude. The authors move the factors with the network's learning rate; to do the same, set
    ``learner.lr`` whenever the schedule changes it.

    Three things are not in the paper: attention heads are groups; a budget may steer γ; and the masks of the units that
    stay are set to one after the selection (``refit``).

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``. The budget steers γ during training, unless ``gamma`` fixes it.
        steps: As in ``Learner``.
        gamma: γ, fixed; the authors use 0.01. None: it is steered so that the budget is met.
        lr: η, the step size of the masks. None: with a fixed γ 0.1, as the authors start; otherwise from ``steps`` and
            the size of the gradients.
        momentum: μ.
        weigh: ``'fisher'``, ``'macs'`` or None, as in ``ProximalLearner``. The paper has None.
        follow_schedule: As in ``ProximalLearner``.
        refit: As in ``ProximalLearner``.
        **options: As in ``Learner``. All ``kinds`` are cut by default, blocks included.

    Raises:
        PruningError: As for ``Learner``.
    """

    method = 'sss'
    default_kinds = KINDS
    l1_name = 'gamma'
    solver: Apg

    def __init__(
            self,
            model: Union[nn.Module, Pruner],
            macs: Optional[Union[float, Budget]] = None,
            steps: Optional[int] = None,
            *,
            gamma: Optional[float] = None,
            lr: Optional[float] = None,
            momentum: float = 0.9,
            weigh: Optional[str] = None,
            follow_schedule: bool = True,
            refit: bool = True,
            **options: Any,
    ):
        lr = 0.1 if lr is None and gamma is not None else lr
        setup = self.setup(model, macs, steps, **options)
        super().__init__(setup, l1=gamma, lr=lr, weigh=weigh, follow_schedule=follow_schedule, refit=refit)
        self.solver = Apg(torch.ones(self.masks.units, dtype=torch.float64), momentum)

    def _recipe(self) -> Dict[str, Any]:
        return {**super()._recipe(), 'momentum': self.solver.momentum}

    def _move(self, grad: torch.Tensor) -> None:
        self.solver.step(grad, self.step_size, self.strength * self.weights)
