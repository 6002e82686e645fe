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

    The update is that of the authors' released code (``solvers.Apg``); γ is theirs. They use the network's
    learning rate for the factors: set ``learner.lr`` along with the schedule to do the same. A factor at zero can come
    back while |g| > γ. Our reading: attention heads count as groups; a budget may steer γ, and what stays
    is refitted (``refit``), neither of which the paper does.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``. A budget steers γ while training, unless ``gamma`` fixes it.
        steps: As in ``Learner``.
        gamma: γ, fixed; the authors' is 0.01.
        lr: η. None: 0.1 with a fixed γ, as the authors start, otherwise from ``steps`` and γ.
        momentum: μ.
        weigh: ``'fisher'``, ``'macs'``, or None as in the paper.
        follow_schedule: As in ``ProximalLearner``.
        refit: As in ``ProximalLearner``.
        **options: As in ``Learner``.
    """

    method = 'sss'
    default_kinds = KINDS
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
