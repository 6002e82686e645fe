"""``Scorer``: all that is known about how much the units of one model matter, computed once."""
from dataclasses import replace
from functools import cached_property
from typing import Callable, Dict, Iterable, Iterator, Optional, Sequence, Tuple

import numpy as np
from torch import nn

from ..core import PruningError, Structure
from ..importance import (
    CRITERIA,
    Sensitivity,
    Statistics,
    check_criterion,
    gather_statistics,
    measure_sensitivity,
    score,
)

__all__ = ['Scorer', 'Scores']

Scores = Dict[str, np.ndarray]


class Scorer:
    """Scores the units of one model. What was computed once is kept.

    Args:
        model: The model.
        structures: The structures whose readers are watched on the data.
        data: As in ``Pruner``.
        loss_fn: As in ``Pruner``.

    Attributes:
        has_data: Whether there is data.
    """

    def __init__(
            self,
            model: nn.Module,
            structures: Sequence[Structure],
            data: Optional[Iterable] = None,
            loss_fn: Optional[Callable] = None,
    ):
        self._model, self._structures, self._given_data, self._loss_fn = model, structures, data, loss_fn
        self.has_data = data is not None
        self._scores: Dict[Tuple[str, int], Scores] = {}  # by criterion and seed
        self._sensitivities: Dict[Tuple[str, int], Sensitivity] = {}  # by criterion and seed, of all that was measured

    @cached_property
    def data(self) -> Optional[Iterable]:
        """The data. A stream can be read only once, so it is kept for further criteria and cuts."""
        data = self._given_data
        return list(data) or data if isinstance(data, Iterator) else data

    @cached_property
    def _statistics(self) -> Statistics:
        """What the layers see of the data."""
        return gather_statistics(self._model, self._structures, self.data)

    def scores(self, structures: Sequence[Structure], criterion: str, seed: int) -> Scores:
        """As ``Pruner.scores``, of these structures."""
        check_criterion(criterion)
        known = self._scores.setdefault((criterion, seed), {})
        missing = [s for s in structures if s.name not in known]
        if missing:
            known.update(score(
                self._model, missing, criterion, data=self.data, loss_fn=self._loss_fn, seed=seed,
                statistics=self._statistics if CRITERIA[criterion].needs == 'images' and self.has_data else None))
        return {s.name: known[s.name] for s in structures}

    def sensitivity(self, structures: Sequence[Structure], criterion: str, seed: int) -> Sensitivity:
        """As ``Pruner.sensitivity``, of these structures."""
        if not self.has_data:
            raise PruningError('sensitivity needs images, found none; give data=, batches of images')
        if not structures:
            raise PruningError('nothing is left to measure; check exclude=, only= and kinds=')
        known = self._sensitivities.get((criterion, seed))
        missing = [s for s in structures if known is None or s.name not in known.curves]
        if missing:
            scores = self.scores(missing, criterion, seed)
            measured = measure_sensitivity(self._model, missing, scores, self._statistics)
            known = replace(measured, curves={**(known.curves if known else {}), **measured.curves})
            self._sensitivities[criterion, seed] = known
        return replace(known, curves={s.name: known.curves[s.name] for s in structures})
