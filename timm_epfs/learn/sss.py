"""SSS: data-driven sparse structure selection."""
from typing import Any, Optional, Sequence

import torch
from torch import nn

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
        macs: Budget of MACs. It steers γ while training, unless ``gamma`` fixes it.
        steps: Length of the sparse phase in optimizer steps.
        gamma: γ, fixed; the authors' is 0.01.
        structures: As in ``Learner``.
        lr: η. None: 0.1 with a fixed γ, as the authors start, otherwise from ``steps`` and γ.
        momentum: μ.
        weigh: ``'fisher'``, ``'macs'``, or None as in the paper.
        **options: As in ``Learner``.
    """

    method = 'sss'
    solver: Apg

    def __init__(
            self,
            model: nn.Module,
            macs: Optional[float] = None,
            steps: Optional[int] = None,
            *,
            gamma: Optional[float] = None,
            structures: Sequence[str] = ('neurons', 'heads', 'groups', 'blocks'),
            lr: Optional[float] = None,
            momentum: float = 0.9,
            weigh: Optional[str] = None,
            **options: Any,
    ):
        lr = 0.1 if lr is None and gamma is not None else lr
        super().__init__(model, macs, steps, l1=gamma, lr=lr, weigh=weigh, structures=structures, **options)
        self._recipe['momentum'] = momentum
        self.solver = Apg(torch.ones(self.masks.units, dtype=torch.float64), momentum)

    def _move(self, grad: torch.Tensor) -> None:
        self.solver.step(grad, self.step_size, self.strength * self.weights)
