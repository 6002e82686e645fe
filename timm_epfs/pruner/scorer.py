"""``Scorer``: all that is known about how much the units of one model matter, computed once."""
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
        structures: The structures that may be cut.
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
        self._sensitivities: Dict[Tuple[str, int], Sensitivity] = {}  # by criterion and seed

    @cached_property
    def data(self) -> Optional[Iterable]:
        """The data. A stream can be read only once, so it is kept for further criteria and cuts."""
        data = self._given_data
        return list(data) or data if isinstance(data, Iterator) else data

    @cached_property
    def _statistics(self) -> Statistics:
        """What the layers see of the data."""
        return gather_statistics(self._model, self._structures, self.data)

    def scores(self, criterion: str, seed: int) -> Scores:
        """As ``Pruner.scores``."""
        key = (criterion, seed)
        if key not in self._scores:
            check_criterion(criterion)
            self._scores[key] = score(
                self._model, self._structures, criterion, data=self.data, loss_fn=self._loss_fn, seed=seed,
                statistics=self._statistics if CRITERIA[criterion].needs == 'images' and self.has_data else None)
        return self._scores[key]

    def sensitivity(self, criterion: str, seed: int) -> Sensitivity:
        """As ``Pruner.sensitivity``."""
        if not self.has_data:
            raise PruningError('sensitivity needs images, found none; give data=, batches of images')
        if not self._structures:
            raise PruningError('nothing is left to measure; check exclude=, only= and kinds=')
        key = (criterion, seed)
        if key not in self._sensitivities:
            self._sensitivities[key] = measure_sensitivity(
                self._model, self._structures, self.scores(criterion, seed), self._statistics)
        return self._sensitivities[key]
