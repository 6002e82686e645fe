"""Soft filter pruning: zero the weakest after every epoch, train all of them on, cut in the end."""
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core import Budget, Member, PruningError, Structure
from ..pruner import Pruner
from .ranking import RankingLearner

__all__ = ['SFP', 'BNSFP']


class SFP(RankingLearner):
    """SFP (He et al., IJCAI 2018): after every epoch the filters with the smallest ‖F‖₂ become zero, and train on.

    The same share goes in every layer, as in the paper: ``ratio=``, or the one that meets ``macs=``. Our reading, since
    the paper cuts each convolution on its own and a cut model can't: filters that only go together (those of a residual
    stream) are ranked together, by the norm of all of them.

    A filter at zero still emits what its norm adds (β). While training that is what lets it come back, so it stays, as
    in the authors' code; the last cut silences it by masks where it is read, so that the cut model and the soft one
    give the same outputs.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``.
        steps: As in ``Learner``.
        ratio: Share of the filters to remove in every layer, in place of a budget; the paper's is 0.3.
        steps_per_epoch: Number of steps after which filters are set to zero. None: a hundredth of ``steps``.
        **options: As in ``Learner``, less ``scope``.
    """

    method = 'sfp'

    def __init__(
            self,
            model: Union[nn.Module, Pruner],
            macs: Optional[Union[float, Budget]] = None,
            steps: Optional[int] = None,
            *,
            ratio: Optional[float] = None,
            steps_per_epoch: Optional[int] = None,
            **options: Any,
    ):
        if steps is None:
            raise PruningError('steps= is needed: the number of optimizer steps until the cut')
        if ratio is not None and not 0 < ratio < 1:
            raise PruningError(f'ratio={ratio!r} was given; give a share between 0 and 1')
        if options.pop('scope', 'local') != 'local':
            raise PruningError(
                f'scope= was given; {type(self).__name__} removes the same share of every layer, leave it out')
        setup = self.setup(model, macs, steps, scope='local', **options)
        if (setup.budget is None) == (ratio is None):
            raise PruningError('give either a budget (macs=, params=, latency=) or ratio=, the share of the filters')
        super().__init__(setup)
        self.ratio = ratio
        self.steps_per_epoch = steps_per_epoch or max(1, steps // 100)
        self._soft = 1.0
        self._parameters = _parameters(self.model)

    def _recipe(self) -> Dict[str, Any]:
        return {'ratio': self.ratio, 'steps_per_epoch': self.steps_per_epoch}

    @property
    def alive(self) -> float:
        """As of every learner, of what the last cut left, soft or not."""
        return super().alive if self.finished else self._soft

    def _advance(self, grad: torch.Tensor) -> None:
        if (self._count + 1) % self.steps_per_epoch == 0:
            keep, _ = self._rank()
            for s in self.structures:
                self._silence(s, np.setdiff1d(np.arange(s.units), keep[s.name]))
            self._soft = self.selector.share({name: len(units) for name, units in keep.items()})

    @torch.no_grad()
    def _silence(self, structure: Structure, gone: np.ndarray) -> None:
        for member in self._zeroed(structure) if len(gone) else ():
            tensor = self._parameters[member.tensor]
            tensor.index_fill_(member.dim, torch.from_numpy(member.index[gone].ravel()).to(tensor.device), 0)

    def _zeroed(self, structure: Structure) -> List[Member]:
        """What a soft cut sets to zero, and ranks by."""
        return [m for m in structure.members
                if m.role == 'out' and m.tensor in self._parameters and self._parameters[m.tensor].ndim > 1]

    def _scores(self) -> Dict[str, np.ndarray]:
        return {s.name: self._norms(self._zeroed(s), s.units) for s in self.structures}

    @torch.no_grad()
    def _norms(self, members: Sequence[Member], units: int) -> np.ndarray:
        total = torch.zeros(units, dtype=torch.float64)
        for member in members:
            tensor = self._parameters[member.tensor].movedim(member.dim, 0)
            rows = tensor.reshape(len(tensor), -1).double().square().sum(1).cpu()
            total += rows[torch.from_numpy(member.index)].sum(1)
        return total.sqrt().numpy()

    def _left(self, scores: np.ndarray) -> int:
        return len(scores) - int(round(self.ratio * len(scores)))

    def _state(self) -> Dict[str, Any]:
        return {**super()._state(), 'soft': self._soft}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._soft = float(state['soft'])


class BNSFP(SFP):
    """BN-SFP (ICARCV 2020): as SFP, but by the norm's γ, and only γ is set to zero; the convolutions stay as they are.

    Our reading: the threshold is each layer's quantile, so that the same share goes as in SFP; where several norms
    scale the same channels, the norm of their γ ranks; layers without BatchNorm are treated as in SFP.
    """

    method = 'bn_sfp'

    def _zeroed(self, structure: Structure) -> List[Member]:
        scales = [m for m in structure.members if self._is_scale(m.tensor)]
        return scales or super()._zeroed(structure)

    def _is_scale(self, name: str) -> bool:
        owner, _, leaf = name.rpartition('.')
        return leaf == 'weight' and isinstance(self.model.get_submodule(owner), _BatchNorm)


def _parameters(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Parameters by the names that they have without masks."""
    return {
        name.replace('.parametrizations.', '.').removesuffix('.original') if '.parametrizations.' in name else name: p
        for name, p in model.named_parameters(remove_duplicate=False)
    }
