"""Methods that learn no masks: units are ranked by what the weights are. The yardsticks of those that learn."""
from typing import Any, Dict, Mapping, Optional, Union

import numpy as np
import torch
from torch import nn

from ..core import Budget, PruningError
from ..importance import WITHOUT_DATA, score
from ..plan import PrunedModel
from ..pruner import Pruner
from ..surgery import rebuild
from .learner import Learner
from .setup import Setup

__all__ = ['OneShot', 'RankingLearner', 'Scratch']


class RankingLearner(Learner):
    """Masks are ones until the last step, which cuts the weakest.

    Args:
        setup: What all methods share.
    """

    learns_masks = False

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._mask = torch.ones(self.masks.units, dtype=torch.float64)

    def _advance(self, grad: torch.Tensor) -> None:
        """Nothing moves."""

    def _selected(self) -> torch.Tensor:
        return self._mask

    def _settle(self, selected: torch.Tensor) -> None:
        self._mask = selected
        self.masks.set(selected, selected)

    def _state(self) -> Dict[str, Any]:
        return {'mask': self._mask.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._mask = state['mask'].clone()
        self.masks.set(self._mask, self._mask)


class OneShot(RankingLearner):
    """Train as usual, rank once after ``steps`` steps: ``timm_epfs.prune`` with the calls of a learner.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``; one of the budgets is needed.
        steps: Length of the phase before the cut in optimizer steps.
        criterion: One of ``timm_epfs.prune``'s that needs no data.
        seed: For ``'random'``.
        **options: As in ``Learner``.
    """

    method = 'one-shot'

    def __init__(
            self,
            model: Union[nn.Module, Pruner],
            macs: Optional[Union[float, Budget]] = None,
            steps: Optional[int] = None,
            *,
            criterion: str = 'l2',
            seed: int = 0,
            **options: Any,
    ):
        if criterion not in WITHOUT_DATA:
            raise PruningError(
                f'criterion={criterion!r} was given; choose one that needs no data: {", ".join(WITHOUT_DATA)}')
        setup = self.setup(model, macs, steps, **options)
        if setup.budget is None:
            raise PruningError(
                f'{type(self).__name__} needs a budget to cut its ranking at; give one of macs=, params= and latency=')
        self._check(setup)
        super().__init__(setup)
        self.criterion, self.seed = criterion, seed

    def _check(self, setup: Setup) -> None:
        """Refuse what can't be done, while the model has no masks yet."""

    def _recipe(self) -> Dict[str, Any]:
        return {'criterion': self.criterion, 'seed': self.seed if self.criterion == 'random' else None}

    def _scores(self) -> Dict[str, np.ndarray]:
        return score(self._unmasked(), self.structures, self.criterion, seed=self.seed)


class Scratch(OneShot):
    """The shape that ``OneShot`` finds, with fresh weights: what is learned there owes nothing to the dense model.

    Liu et al., Rethinking the Value of Network Pruning, ICLR 2019: the baseline that every method of pruning has to
    beat at equal budgets. ``export()`` may be called at once; ``step()`` is not needed.

    Args:
        model: As in ``OneShot``; its name (``base=``, or timm's own) must be known, to build it again.
        **options: As in ``OneShot``.
    """

    method = 'scratch'

    def _check(self, setup: Setup) -> None:
        if setup.pruner.base[0] is None:
            raise PruningError(
                f'Scratch: {setup.pruner.name} has no name from which it can be built again; give base=')

    def export(self, model: Optional[nn.Module] = None) -> PrunedModel:
        """A copy cut as in ``OneShot``, its weights initialised again."""
        slim = super().export(model)
        slim.load_state_dict(rebuild(slim.pruning_plan, device='cpu').state_dict())
        return slim
