"""The latency of a model on its device: predicted for any cut from a table of measured calls, or measured whole."""
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from torch import nn

from ..core import Budget, OutOfReach, PruningError, device_of, measured_by_first, percent, progress
from ..trace import Trace
from .call_grids import points
from .clock import time_models
from .interpolation import LatencyModel
from .kernels import Kernel, inputs_of, kernels
from .timings import Table

__all__ = ['DeviceLatency', 'Match', 'least_seconds']

# Search for a cut that meets a budget.
_MAX_CUTS = 8               # cuts that are made and measured at most
_CLOSE_ENOUGH = 0.02        # relative distance to the budget that ends the search
_PROBLEM = 0.05             # relative distance to the budget that is reported as a problem
_MIN_SAVED = 0.05           # smallest ratio of measured to predicted savings that is believed

# Measurement of whole models.
_MAX_ROUNDS = 8             # rounds of a measurement at most
_SECONDS = 0.35             # seconds that a round spends on each model
_AGREEING_ROUNDS = 3        # rounds that must agree to end a measurement
_AGREEMENT = 1.03           # largest ratio between their times

# Measurement of the alignment.
_MAX_ALIGNMENT = 32         # no device is known to prefer multiples of more channels
_ALIGNED = 2 * _MAX_ALIGNMENT  # multiples of this suit every device
_AS_GOOD = 0.9              # share of a coarser step's savings per channel at which a finer step counts as equally good


@dataclass(frozen=True)
class Match:
    """A cut whose latency was measured, and the budget that it was made for.

    Here a cut to half of the predicted latency was measured at 0.6 of the dense latency, so it saved 0.8 times as much
    as predicted. To save half, the prediction must be cut by 0.5 / 0.8:

    >>> Match(share=0.5, target=0.5, dense=1.0, pruned=0.6).next_share
    0.375

    Attributes:
        share: Share of the predicted dense latency to which the model was cut.
        target: Share of the dense model's latency that the budget allows.
        dense: Measured seconds of the dense model.
        pruned: Measured seconds of the cut model.
    """
    share: float
    target: float
    dense: float
    pruned: float

    @property
    def achieved(self) -> float:
        """Measured share of the dense model's latency."""
        return self.pruned / self.dense

    @property
    def miss(self) -> float:
        """Relative distance of ``achieved`` from ``target``."""
        return abs(self.achieved / self.target - 1)

    @property
    def next_share(self) -> float:
        """The share to try next, by linear extrapolation from the dense model through this cut."""
        saved = (1 - self.achieved) / (1 - self.share)  # measured savings for one unit of predicted savings
        return float(np.clip(1 - (1 - self.target) / max(saved, _MIN_SAVED), 0.5 * self.share, 0.99))

    @property
    def milliseconds(self) -> List[float]:
        """Measured milliseconds of the dense and of the cut model."""
        return [1000 * self.dense, 1000 * self.pruned]

    @property
    def problem(self) -> str:
        """A warning in one line if the budget was missed by more than 5 %, empty otherwise."""
        if self.miss <= _PROBLEM:
            return ''
        return (
            f'latency: the nearest cut has {percent(self.achieved)} of the dense latency where {percent(self.target)} '
            f'were asked for; a smaller round_to= or floor=, or a machine that runs nothing else, may come nearer')


class DeviceLatency:
    """Predicts the latency of a model's cuts from a table of measured calls, and measures whole cuts.

    Args:
        model: The dense model. It is run in evaluation mode, and not changed.
        traced: The model's trace.
        args: Positional arguments of the forward that was traced, at batch size 1. Only their shapes are used.
        kwargs: Keyword arguments of that forward. Only their shapes are used.
        batch_size: Images per batch.
        together: Whether all processes that train together make this object and the same cuts: then the first one
            measures for all of them.

    Attributes:
        cost: The cost model that predicts latency.
        units: Units of the dense model, by structure name.

    Raises:
        PruningError: The weights are on the meta device, or the calls of the forward can't be timed one by one.
    """

    def __init__(
            self,
            model: nn.Module,
            traced: Trace,
            args: Tuple,
            kwargs: Dict[str, Any],
            batch_size: int = 1,
            together: bool = False,
    ):
        self.model, self.batch_size, self._together = model, batch_size, together
        self.device = device_of(model)
        if self.device.type == 'meta':
            raise PruningError(
                'latency: the model\'s weights are on the meta device, where nothing can be timed; build the model on '
                'the device that it will run on')
        self._inputs = inputs_of(model, (args, kwargs), batch_size, self.device)
        self._table = Table(self.device, together=together)
        self._kernels = kernels(model, traced, args, kwargs, batch_size)
        self.units = {s.name: s.units for s in traced.structures}
        self._channels = {s.name for s in traced.structures if s.kind == 'channels'}
        self._table.learn((k, left) for k in self._kernels for row in points(k, self.units) for left in row)
        self.cost = LatencyModel(traced.cost, traced.structures, self._kernels, self._table)

    @property
    def dense(self) -> float:
        """Predicted seconds of the dense model."""
        return self.cost('latency', self.cost.counts(self.units))

    @property
    def conditions(self) -> str:
        """The device, threads and batch size at which latencies are measured, as a plan's recipe notes them."""
        machine = self._table.machine
        return f'{machine["device"]}, threads: {machine["threads"]}, batch {self.batch_size}'

    def calls(self, left: Mapping[str, int]) -> List[Tuple[Kernel, float]]:
        """Every call of the forward and its predicted seconds.

        Args:
            left: Units that are left, by structure name.
        """
        return list(zip(self._kernels, self.cost.seconds_of_calls(self.cost.counts(left)).tolist()))

    def match(
            self,
            budget: Budget,
            cut: Callable[[float], nn.Module],
            dense: Optional[nn.Module] = None,
    ) -> Match:
        """Make cuts until the measured latency of one meets a budget.

        The prediction ignores how calls affect each other and what runs between them, so a cut to a predicted share of
        the latency is measured at another share. The next cut corrects for that (``Match.next_share``). Only the last
        measurement counts for the correction, so that a disturbed one does no lasting harm.

        Args:
            budget: A budget of latency.
            cut: Returns a copy of the model, cut to a share of the predicted latency. It raises ``OutOfReach`` if no
                cut is as fast as that.
            dense: The dense model with its present weights and masks. None: the model that was given.

        Returns:
            The cut that came nearest to the budget.

        Raises:
            PruningError: The budget is out of reach, or the dense model meets it already.
        """
        dense = self.model if dense is None else dense
        share = budget.share(self._least_seconds([dense])[0] if budget.in_milliseconds else self.dense)
        nearest: Optional[Match] = None
        last_share = 1.0  # the last that could be cut
        for _ in progress(range(_MAX_CUTS), 'measuring the latency of cuts'):
            try:
                slim = cut(share)
            except OutOfReach:
                if nearest is None:
                    raise
                share = (share + last_share) / 2
                continue
            last_share = share
            match = self._measure(budget, share, dense, slim)
            if match.miss <= _CLOSE_ENOUGH:
                match = self._measure(budget, share, dense, slim, match)
            if nearest is None or match.miss < nearest.miss:
                nearest = match
            if match.miss <= _CLOSE_ENOUGH:
                break
            share = match.next_share
        return nearest

    def _measure(
            self,
            budget: Budget,
            share: float,
            dense: nn.Module,
            slim: nn.Module,
            earlier: Optional[Match] = None,
    ) -> Match:
        """Measure a cut; combined with an earlier measurement of the same cut, the shorter times count."""
        seconds = self._least_seconds([dense, slim])
        if earlier is not None:
            seconds = [min(seconds[0], earlier.dense), min(seconds[1], earlier.pruned)]
        return Match(share, budget.share(seconds[0]), *seconds)

    def _least_seconds(self, models: Sequence[nn.Module]) -> List[float]:
        measure = partial(least_seconds, models, *self._inputs)
        if not self._together:
            return measure()
        return measured_by_first(lambda: np.array(measure()), (len(models),), self.device).tolist()

    def favour_slow_layers(self, scores: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Lower the scores of layers that cost more latency than MACs, so that their units are removed first.

        For each structure, ``slowness`` is the logarithm of a unit's share of the latency over a unit's share of the
        MACs, limited to ±1. The structure's scores are lowered by ``slowness`` times their standard deviation, so that
        slow layers are cut more, but not regardless of importance. This rule is our own; HALP (Shen et al., NeurIPS
        2022) weighs importance against latency with a knapsack solver.

        Args:
            scores: Importance by structure name, shape (units,).
        """
        dense = self.cost.counts(self.units)
        latency, macs = (self.cost.gradient(q, dense) / self.cost(q, dense) for q in ('latency', 'macs'))
        slowness = np.clip(np.log(np.maximum(latency, 1e-12) / np.maximum(macs, 1e-12)), -1, 1)
        by_name = dict(zip(self.cost.names, slowness))
        return {name: values - by_name[name] * values.std() for name, values in scores.items()}

    def alignment(self) -> int:
        """The multiple to which channel counts should be rounded on this device: 1, 2, 4, 8, 16 or 32.

        A device that computes channels in groups of 16 saves little time if a layer is narrowed by fewer than 16. So
        all wide layers are narrowed by steps of 1 to 32 channels from a width that suits every device (a multiple of
        64), and the seconds saved per channel are compared. The result is the finest step that saves nearly as much
        per channel as the coarser ones.
        """
        wide = {name: units for name, units in self.units.items() if name in self._channels and units >= _ALIGNED}
        widths = {name: _aligned_width(units) for name, units in wide.items()}
        concerned = [kernel for kernel in self._kernels if not widths.keys().isdisjoint(kernel.names)]

        def narrowed(by: int) -> Dict[str, int]:
            return {**self.units, **{name: width - by for name, width in widths.items()}}

        steps = [1, 2, 4, 8, 16, _MAX_ALIGNMENT]
        self._table.learn((kernel, narrowed(step)) for step in (0, *steps) for kernel in concerned)
        seconds = {step: sum(self._table(kernel, narrowed(step)) for kernel in concerned) for step in (0, *steps)}
        saved_per_channel = {step: (seconds[0] - seconds[step]) / step for step in steps}
        found = _MAX_ALIGNMENT
        for step in reversed(steps[:-1]):
            if saved_per_channel[step] < _AS_GOOD * max(saved_per_channel[s] for s in steps if s >= found):
                break
            found = step
        return found


def _aligned_width(units: int) -> int:
    """The largest multiple of 64 up to three quarters of the units; 64 at least."""
    return _ALIGNED * max(1, 3 * units // (4 * _ALIGNED))


def least_seconds(
        models: Sequence[nn.Module],
        args: Tuple,
        kwargs: Dict[str, Any],
        seconds: float = _SECONDS,
) -> List[float]:
    """The shortest seconds of a forward of each model: other programs make a forward slower, never faster.

    The models are timed in rounds until the three fastest rounds of every model agree to 3 %, eight rounds at most.

    Args:
        models: Models on one device.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of the forward.
        seconds: Seconds that a round spends on each model, at least.
    """
    rounds: List[List[float]] = []
    while len(rounds) < _MAX_ROUNDS:
        rounds.append([min(taken.times) for taken in time_models(models, args, kwargs, seconds * len(models))])
        ordered = np.sort(rounds, axis=0)
        enough = len(rounds) >= _AGREEING_ROUNDS
        if enough and (ordered[_AGREEING_ROUNDS - 1] <= _AGREEMENT * ordered[0]).all():
            break
    return ordered[0].tolist()
