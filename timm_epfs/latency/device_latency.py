"""A model on its device: what cuts of it take by the table of calls, and by the clock when they are measured whole."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from torch import nn

from ..core import Budget, OutOfReach, PruningError, device_of, percent
from ..trace import Trace
from .call_grids import points
from .clock import time_models
from .interpolation import LatencyModel
from .kernels import Kernel, inputs_of, kernels
from .timings import Table

__all__ = ['DeviceLatency', 'Match', 'least_seconds']

_CUTS = 8               # that are measured at most
_ENOUGH, _PROMISED = 0.02, 0.05     # how far from what was asked ends the search, and is a problem
_LEAST_SAVED = 0.05     # of the time, for what is saved of the table's: a measurement that says less is wrong
_ROUNDS, _SECONDS = 8, 0.35         # of a comparison at most, and how long each measures a model
_ALIKE, _NEAR = 3, 1.03             # so many rounds must agree, as nearly as this
_WIDEST = 32            # no device is known to want multiples of more
_NEARLY = 0.9           # of the time that a channel of the coarser step saves, for a finer one to be as good


@dataclass(frozen=True)
class Match:
    """A cut whose measured latency came nearest to a budget.

    Attributes:
        share: Share of the table's latency that it was asked for: what reproduces it.
        wanted: Share of the dense model's time that the budget stands for.
        dense: Measured seconds of the dense model.
        pruned: Measured seconds of the cut.
    """
    share: float
    wanted: float
    dense: float
    pruned: float

    @property
    def got(self) -> float:
        """Measured share of the dense model's time."""
        return self.pruned / self.dense

    @property
    def miss(self) -> float:
        """How far that is from what was wanted, relative to it."""
        return abs(self.got / self.wanted - 1)

    @property
    def next_share(self) -> float:
        """What to ask the table for next: on the line through this cut and the dense model."""
        saved = (1 - self.got) / (1 - self.share)
        return float(np.clip(1 - (1 - self.wanted) / max(saved, _LEAST_SAVED), 0.5 * self.share, 0.99))

    @property
    def milliseconds(self) -> List[float]:
        """Measured milliseconds of the dense model and of the cut."""
        return [1000 * self.dense, 1000 * self.pruned]

    @property
    def problem(self) -> str:
        """What is wrong where the budget was missed by more than 5 %, in a line; empty otherwise."""
        if self.miss <= _PROMISED:
            return ''
        return (
            f'latency: {percent(self.got)} of the dense latency where {percent(self.wanted)} were asked for, the '
            f'nearest that was found; a smaller round_to= or floor= may reach it, or a machine that does nothing else')


class DeviceLatency:
    """Prices the cuts of a model on its device by a table, and measures them whole.

    Args:
        model: The dense model. It is run, in evaluation mode, and not changed.
        traced: Its trace.
        args: Positional arguments of the forward that was traced, batch 1; taken for their shapes only.
        kwargs: Keyword arguments of it, likewise.
        batch_size: Images in a batch.

    Attributes:
        cost: Prices cuts, as ``LatencyModel`` does.
        units: Units of the dense model, by structure name.

    Raises:
        PruningError: The weights are on the meta device, or the forward can't be timed call by call.
    """

    def __init__(self, model: nn.Module, traced: Trace, args: Tuple, kwargs: Dict[str, Any], batch_size: int = 1):
        self.model, self.batch_size = model, batch_size
        self.device = device_of(model)
        if self.device.type == 'meta':
            raise PruningError('latency: the model\'s weights are on the meta device, which takes no time; build it '
                               'on the device that it will run on')
        self._inputs = inputs_of(model, (args, kwargs), batch_size, self.device)
        self._table = Table(self.device)
        self._kernels = kernels(model, traced, args, kwargs, batch_size)
        self.units = {s.name: s.units for s in traced.structures}
        self._channels = {s.name for s in traced.structures if s.kind == 'channels'}
        self._table.learn((k, left) for k in self._kernels for row in points(k, self.units) for left in row)
        self.cost = LatencyModel(traced.cost, traced.structures, self._kernels, self._table)

    @property
    def dense(self) -> float:
        """Seconds of the dense model, by the table."""
        return self.cost('latency', self.cost.counts(self.units))

    @property
    def place(self) -> str:
        """Where latencies are measured, for a plan's recipe."""
        machine = self._table.machine
        return f'{machine["device"]}, threads: {machine["threads"]}, batch {self.batch_size}'

    def calls(self, left: Mapping[str, int]) -> List[Tuple[Kernel, float]]:
        """Every call and its seconds by the table, where these numbers of units are left."""
        return list(zip(self._kernels, self.cost.seconds_of_calls(self.cost.counts(left)).tolist()))

    def match(
            self,
            budget: Budget,
            cut: Callable[[float], nn.Module],
            dense: Optional[nn.Module] = None,
    ) -> Match:
        """Cut until the clock shows what was asked for.

        The table doesn't know what calls cost each other, nor what runs between them. What it is asked for is
        corrected by how much of the time each cut saved for what it saved of the table's. A cut is judged by its own
        measurements alone: one that was disturbed leads nowhere for long.

        Args:
            budget: A latency.
            cut: Gives a copy of the model, cut to a share of the table's latency; raises ``OutOfReach`` where none has
                so little.
            dense: The dense model as it is now. None: as it was given.

        Raises:
            PruningError: What was asked for is out of reach, or the dense model is as fast.
        """
        dense = self.model if dense is None else dense
        share = budget.share(least_seconds([dense], *self._inputs)[0] if budget.in_milliseconds else self.dense)
        found, reached = None, 1.0
        for _ in range(_CUTS):
            try:
                slim = cut(share)
            except OutOfReach:
                if found is None:
                    raise
                share = (share + reached) / 2  # further than any cut goes
                continue
            reached = share
            match = self._measure(budget, share, dense, slim)
            if match.miss <= _ENOUGH:  # and still is, a little later?
                again = self._measure(budget, share, dense, slim)
                fastest = min(match.dense, again.dense), min(match.pruned, again.pruned)
                match = Match(share, budget.share(fastest[0]), *fastest)
            if found is None or match.miss < found.miss:
                found = match
            if match.miss <= _ENOUGH:
                break
            share = match.next_share
        return found

    def _measure(self, budget: Budget, share: float, dense: nn.Module, slim: nn.Module) -> Match:
        seconds = least_seconds([dense, slim], *self._inputs)
        return Match(share, budget.share(seconds[0]), *seconds)

    def favour_slow_layers(self, scores: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Scores by which units go first that take more of the time than of the MACs.

        A structure's scores are moved by as much of their own standard deviation as the logarithm of that ratio, for
        one more unit in the dense model, and by one at most: what is slow is cut more, nothing is cut for that alone.
        Our own; HALP weighs importance against latency by a knapsack.

        Args:
            scores: Importance by structure name, shape (units,).
        """
        dense = self.cost.counts(self.units)
        seconds, macs = (self.cost.gradient(q, dense) / self.cost(q, dense) for q in ('latency', 'macs'))
        slowness = np.clip(np.log(np.maximum(seconds, 1e-12) / np.maximum(macs, 1e-12)), -1, 1)
        by_name = dict(zip(self.cost.names, slowness))
        return {name: values - by_name[name] * values.std() for name, values in scores.items()}

    def alignment(self) -> int:
        """The multiple that channel counts should be of, in 1, 2, 4, … 32.

        All wide layers are narrowed, by 1 to 32 channels, from a width that every device likes. From the top down, a
        step is as good as the next coarser one where it saves as much time a channel, or nearly.
        """
        base = {n: 2 * _WIDEST * max(1, u * 3 // (8 * _WIDEST)) for n, u in self.units.items() if n in self._channels}
        base = {name: width for name, width in base.items() if _WIDEST < width <= self.units[name]}
        concerned = [k for k in self._kernels if not base.keys().isdisjoint(k.names)]

        def left(less: int) -> Dict[str, int]:
            return {**self.units, **{name: width - less for name, width in base.items()}}

        steps = [2 ** i for i in range(6)]
        self._table.learn((kernel, left(less)) for less in (0, *steps) for kernel in concerned)
        seconds = {less: sum(self._table(kernel, left(less)) for kernel in concerned) for less in (0, *steps)}
        saved = {step: (seconds[0] - seconds[step]) / step for step in steps}
        found = steps.pop()
        while steps and saved[steps[-1]] >= _NEARLY * max(saved[step] for step in saved if step >= found):
            found = steps.pop()
        return found


def least_seconds(
        models: Sequence[nn.Module],
        args: Tuple,
        kwargs: Dict[str, Any],
        seconds: float = _SECONDS,
) -> List[float]:
    """Seconds of a forward of each model, once three rounds agree: what else runs makes it slower, never faster.

    Args:
        models: Models on one device.
        args: Positional arguments of the forward.
        kwargs: Keyword arguments of it.
        seconds: How long a round measures each, at least.
    """
    rounds: List[List[float]] = []
    while len(rounds) < _ROUNDS:
        rounds.append([min(taken.times) for taken in time_models(models, args, kwargs, seconds * len(models))])
        ordered = np.sort(rounds, axis=0)
        if len(rounds) >= _ALIKE and (ordered[_ALIKE - 1] <= _NEAR * ordered[0]).all():
            break
    return ordered[0].tolist()
