"""Methods that learn no masks and rank units by their weights: the baselines for methods that learn."""
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
    """All masks stay one until the selection, which sets those of the lowest scores to zero.

    Args:
        setup: What ``Learner.setup`` returned.
    """

    learns_masks = False

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._mask = torch.ones(self.masks.units, dtype=torch.float64)

    def _update(self, grad: torch.Tensor) -> None:
        """The masks don't move."""

    def _eval_masks(self) -> torch.Tensor:
        return self._mask

    def _finalise(self, masks: torch.Tensor) -> None:
        self._mask = masks
        self.masks.set(masks, masks)

    def _state(self) -> Dict[str, Any]:
        return {'mask': self._mask.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._mask = state['mask'].clone()
        self.masks.set(self._mask, self._mask)


class OneShot(RankingLearner):
    """Train as usual and rank units once, after ``steps`` steps: ``timm_epfs.prune`` with the calls of a learner.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``. A budget is required: ``macs``, ``params`` or ``latency``.
        steps: Number of optimizer steps before the selection.
        criterion: A criterion of ``timm_epfs.prune`` that needs no data.
        seed: Seed of ``criterion='random'``.
        **options: As in ``Learner``.

    Raises:
        PruningError: As for ``Learner``; or there is no budget, or the criterion needs data.
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
                f'{type(self).__name__} needs a budget, and none was given; give one of macs=, params= and latency=')
        self._check(setup)
        super().__init__(setup)
        self.criterion, self.seed = criterion, seed

    def _check(self, setup: Setup) -> None:
        """Raise ``PruningError`` where the method can't work. Called before the model gets masks."""

    def _recipe(self) -> Dict[str, Any]:
        return {'criterion': self.criterion, 'seed': self.seed if self.criterion == 'random' else None}

    def _scores(self) -> Dict[str, np.ndarray]:
        return score(self._fold_masks(), self.structures, self.criterion, seed=self.seed)


class Scratch(OneShot):
    """The widths that ``OneShot`` chooses, with newly initialised weights: training then starts from scratch.

    This is the baseline of Liu et al., Rethinking the Value of Network Pruning, ICLR 2019. A pruning method is only
    worth its effort if it beats this at an equal budget. ``export()`` may be called at once, without any ``step()``.

    Args:
        model: As in ``OneShot``. Its name must be known, so that it can be built again: timm's own, or ``base=``.
        **options: As in ``OneShot``.

    Raises:
        PruningError: As for ``OneShot``; or the model's name isn't known.
    """

    method = 'scratch'

    def _check(self, setup: Setup) -> None:
        if setup.pruner.base[0] is None:
            raise PruningError(
                f'Scratch has to build the model again, and {setup.pruner.name} has no name to build it by; give base=')

    def export(self, model: Optional[nn.Module] = None) -> PrunedModel:
        """A copy that is cut as in ``OneShot`` and whose weights are initialised again."""
        slim = super().export(model)
        slim.load_state_dict(rebuild(slim.pruning_plan, device='cpu').state_dict())
        return slim
