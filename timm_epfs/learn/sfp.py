"""Soft filter pruning: set filters to zero after every epoch, let them train on, cut at the end."""
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _WeightNorm

from ..core import Budget, Member, PruningError, Structure
from ..pruner import Pruner
from .ranking import RankingLearner

__all__ = ['SFP', 'BNSFP']


class SFP(RankingLearner):
    """SFP (He et al., IJCAI 2018): after every epoch the filters with the smallest ‖F‖₂ are set to zero and train on.

    As in the paper, every layer loses the same share of its filters: ``ratio=``, or the share that meets the budget.
    The paper prunes each convolution on its own. A model that is really cut can't do that, so filters that can only be
    cut together (those of a residual stream) are ranked together, by the norm of all their weights.

    A filter at zero still passes on the bias β of the normalisation after it, which lets it come back during training.
    So β is kept, as in the authors' code. At the selection, masks at the layers that read the filter silence it
    completely, so that the cut model gives the same outputs as the masked one.

    Args:
        model: As in ``Learner``.
        macs: As in ``Learner``.
        steps: As in ``Learner``, and required.
        ratio: Share of the filters to remove in every layer, in place of a budget. The paper's is 0.3.
        steps_per_epoch: Number of steps between two times that filters are set to zero. None: a hundredth of ``steps``.
        **options: As in ``Learner``, except ``scope``.

    Raises:
        PruningError: As for ``Learner``; or ``steps`` is missing; or both a budget and ``ratio`` are given, or neither.
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
            raise PruningError('steps= is missing; give the number of optimizer steps until the cut')
        if ratio is not None and not 0 < ratio < 1:
            raise PruningError(f'ratio={ratio!r} was given; give a share between 0 and 1')
        if options.pop('scope', 'local') != 'local':
            raise PruningError(
                f'scope= was given, but {type(self).__name__} removes the same share of every layer; leave scope= out')
        setup = self.setup(model, macs, steps, scope='local', **options)
        if (setup.budget is None) == (ratio is None):
            given = 'neither a budget nor ratio= was' if ratio is None else 'both a budget and ratio= were'
            raise PruningError(f'{given} given; give either a budget (macs=, params=, latency=) or ratio=')
        parameters = dict(setup.pruner.model.named_parameters(remove_duplicate=False))  # by their names without masks
        super().__init__(setup)
        self.ratio = ratio
        self.steps_per_epoch = steps_per_epoch or max(1, steps // 100)
        self._soft_alive = 1.0  # share of the cost in filters that were not set to zero last time
        self._parameters = parameters

    def _recipe(self) -> Dict[str, Any]:
        return {'ratio': self.ratio, 'steps_per_epoch': self.steps_per_epoch}

    @property
    def alive(self) -> float:
        """As for every learner. Before the selection: the share in filters that were not set to zero last time."""
        return super().alive if self.finished else self._soft_alive

    def _update(self, grad: torch.Tensor) -> None:
        if (self._steps_done + 1) % self.steps_per_epoch == 0:
            keep, _ = self._choose()
            for s in self.structures:
                self._set_to_zero(s, np.setdiff1d(np.arange(s.units), keep[s.name]))
            self._soft_alive = self.selector.share({name: len(units) for name, units in keep.items()})

    @torch.no_grad()
    def _set_to_zero(self, structure: Structure, units: np.ndarray) -> None:
        if not len(units):
            return
        for member in self._zeroed(structure):
            tensor = self._parameters[member.tensor]
            entries = torch.from_numpy(member.index[units].ravel()).to(tensor.device)
            tensor.index_fill_(member.dim, entries, 0)

    def _zeroed(self, structure: Structure) -> List[Member]:
        """The weights of filters: they are set to zero, and their norm ranks the filters."""
        weights = [m for m in structure.members
                   if m.role == 'out' and m.tensor in self._parameters and self._parameters[m.tensor].ndim > 1]
        return [m for m in weights if not self._is_direction(m.tensor)]

    def _is_direction(self, name: str) -> bool:
        """Whether it is v of a weight g·v/‖v‖ (weight norm), which isn't defined at v = 0: its g is set to zero."""
        owner, _, leaf = name.rpartition('.')
        if leaf == 'original1':
            return any(isinstance(step, _WeightNorm) for step in self.model.get_submodule(owner))
        return leaf.endswith('_v') and f'{name[:-1]}g' in self._parameters

    def _scores(self) -> Dict[str, np.ndarray]:
        return {s.name: self._norms(self._zeroed(s), s.units) for s in self.structures}

    @torch.no_grad()
    def _norms(self, members: Sequence[Member], units: int) -> np.ndarray:
        """ℓ2 norm of all entries of each unit, shape (units,)."""
        total = torch.zeros(units, dtype=torch.float64)
        for member in members:
            tensor = self._parameters[member.tensor].movedim(member.dim, 0)
            squares = tensor.reshape(len(tensor), -1).double().square().sum(1).cpu()
            total += squares[torch.from_numpy(member.index)].sum(1)
        return total.sqrt().numpy()

    def _keep_count(self, scores: np.ndarray) -> int:
        return len(scores) - int(round(self.ratio * len(scores)))

    def _state(self) -> Dict[str, Any]:
        return {**super()._state(), 'soft': self._soft_alive}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._soft_alive = float(state['soft'])


class BNSFP(SFP):
    """BN-SFP (ICARCV 2020): as SFP, but BatchNorm's γ ranks the filters, and only γ is set to zero.

    The convolutions keep their weights. We chose the rest: every layer loses the same share, as in SFP, so the
    threshold is a quantile of each layer. Where several BatchNorm layers scale the same channels, the ℓ2 norm of their
    γ ranks them. Layers without BatchNorm are treated as in SFP.
    """

    method = 'bn_sfp'

    def _zeroed(self, structure: Structure) -> List[Member]:
        """The γ of the BatchNorm layers; where there are none, the weights of filters."""
        scales = [m for m in structure.members if self._is_scale(m.tensor)]
        return scales or super()._zeroed(structure)

    def _is_scale(self, name: str) -> bool:
        owner, _, leaf = name.rpartition('.')
        return leaf == 'weight' and isinstance(self.model.get_submodule(owner), _BatchNorm)
