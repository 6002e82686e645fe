"""Methods that learn no masks: units are ranked by what the weights are. The yardsticks of those that learn."""
from typing import Any, Dict, Mapping, Optional

import numpy as np
import torch
from torch import nn

from ..core import PruningError
from ..importance import WITHOUT_DATA, score
from ..surgery import rebuild
from .learner import Learner

__all__ = ['OneShot', 'RankingLearner', 'Scratch']


class RankingLearner(Learner):
    """Masks are ones until the last step, which cuts the weakest.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``.
        steps: As in ``Learner``.
        **options: As in ``Learner``.
    """

    learns_masks = False

    def __init__(
            self,
            model: nn.Module,
            macs: Optional[float] = None,
            steps: Optional[int] = None,
            **options: Any,
    ):
        super().__init__(model, macs, steps, **options)
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
        macs: Budget of MACs.
        steps: Length of the phase before the cut in optimizer steps.
        criterion: One of ``timm_epfs.prune``'s that needs no data.
        seed: For ``'random'``.
        **options: As in ``RankingLearner``.
    """

    method = 'one-shot'

    def __init__(
            self,
            model: nn.Module,
            macs: Optional[float] = None,
            steps: Optional[int] = None,
            *,
            criterion: str = 'l2',
            seed: int = 0,
            **options: Any,
    ):
        if macs is None and options.get('latency') is None:
            raise PruningError(f'{type(self).__name__} needs macs= or latency=, the budget that its ranking is cut at')
        if criterion not in WITHOUT_DATA:
            raise PruningError(
                f'criterion={criterion!r} was asked; choose one that needs no data: {", ".join(WITHOUT_DATA)}')
        super().__init__(model, macs, steps, **options)
        self.criterion, self.seed = criterion, seed
        self._recipe.update(criterion=criterion, seed=seed if criterion == 'random' else None)

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

    def _prepare(self) -> None:
        super()._prepare()
        if self._base[0] is None:
            raise PruningError(f'Scratch: {type(self.model).__name__} has no name to be built from again; give base=')

    def export(self, model: Optional[nn.Module] = None) -> nn.Module:
        """A copy cut as in ``OneShot``, its weights initialised again."""
        slim = super().export(model)
        slim.load_state_dict(rebuild(slim.pruning_plan, device='cpu').state_dict())
        return slim
