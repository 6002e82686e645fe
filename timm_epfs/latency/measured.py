"""A latency that is asked for, and the cut that has it: found by the table, measured whole, corrected."""
import re
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from torch import nn

from ..core import Budget, OutOfReach, PruningError, device_of
from ..trace import Trace
from .clock import time_models
from .grids import points
from .interpolation import LatencyModel
from .kernels import Kernel, inputs_of, kernels
from .timings import Table

__all__ = ['Asked', 'Bench', 'race']

_CUTS = 8               # that are measured at most
_ENOUGH, _PROMISED = 0.02, 0.05     # how far from what was asked ends the search, and needs a warning
_LEAST_SAVED = 0.05     # of the time, for what is saved of the table's: a measurement that says less is wrong
_ROUNDS, _SECONDS = 8, 0.35         # of a race at most, and how long each measures a model
_ALIKE, _NEAR = 3, 1.03             # so many rounds must agree, as nearly as this
_WIDEST = 32            # no device is known to want multiples of more
_NEARLY = 0.9           # of the time that a channel of the coarser step saves, for a finer one to be as good


@dataclass(frozen=True)
class Asked:
    """A latency as a user gives it: a share of the dense model's between 0 and 1, or text such as ``'12ms'``."""
    value: Union[float, str]

    def __post_init__(self):
        if self._milliseconds is None and not (
                isinstance(self.value, Real) and not isinstance(self.value, bool) and 0 < self.value < 1):
            raise PruningError(
                f'latency={self.value!r} was asked; give a share of the dense model\'s, as in 0.5, or milliseconds, as '
                f'in \'12ms\'')

    @property
    def _milliseconds(self) -> Optional[float]:
        found = re.fullmatch(r'\s*(\d+(?:\.\d*)?|\.\d+)\s*ms\s*', self.value) if isinstance(self.value, str) else None
        return float(found[1]) if found and float(found[1]) > 0 else None

    def share(self, dense: float) -> float:
        """As a share of the dense model's seconds.

        Raises:
            PruningError: The dense model is as fast.
        """
        if self._milliseconds is None:
            return float(self.value)
        if self._milliseconds >= 1000 * dense:
            raise PruningError(
                f'latency={self.value!r} was asked, the dense model takes {1000 * dense:.3g} ms; ask for less')
        return self._milliseconds / (1000 * dense)


@dataclass(frozen=True)
class _Met:
    """A cut and its measurement: the share of the table's latency it was asked for, seconds of the dense model and of
    the cut."""
    slim: nn.Module
    aim: float
    dense: float
    fast: float
    asked: Asked

    @property
    def wanted(self) -> float:
        return self.asked.share(self.dense)

    @property
    def got(self) -> float:
        return self.fast / self.dense

    @property
    def off(self) -> float:
        return abs(self.got / self.wanted - 1)

    @property
    def corrected(self) -> float:
        """What to ask the table for next: on the line through this cut and the dense model."""
        saved = (1 - self.got) / (1 - self.aim)
        return float(np.clip(1 - (1 - self.wanted) / max(saved, _LEAST_SAVED), 0.5 * self.aim, 0.99))


class Bench:
    """A model on its device at a batch size: prices its cuts by a table, and measures them whole.

    Args:
        model: The dense model. It is run, in evaluation mode, and not changed.
        traced: Its trace.
        args: Positional arguments of the forward that was traced, batch 1; taken for their shapes only.
        kwargs: Keyword arguments of it, likewise.
        batch_size: Images a batch.

    Attributes:
        cost: Prices cuts, as ``LatencyModel`` does.
        units: Units of the dense model, by name.
    """

    def __init__(self, model: nn.Module, traced: Trace, args: Tuple, kwargs: Dict[str, Any], batch_size: int = 1):
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise PruningError(f'latency_batch_size={batch_size!r} was asked; give a whole number from 1 on')
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

    def budget(self, share: float) -> Budget:
        """The budget of the table that is a share of what the table says of the dense model."""
        return Budget('latency', share * self.dense)

    def meet(
            self,
            asked: Asked,
            cut: Callable[[Budget], nn.Module],
            dense: Optional[nn.Module] = None,
    ) -> Tuple[nn.Module, float, List[float]]:
        """Cut until the clock shows what was asked.

        The table doesn't know what calls cost each other, nor what runs between them. What it is asked for is
        corrected by how much of the time each cut saved for what it saved of the table's. A cut is judged by its own
        measurements alone: one that was disturbed leads nowhere for long.

        Args:
            asked: What was asked.
            cut: Gives a copy of the model, cut to a budget of the table.
            dense: The dense model as it is now. None: as it was given.

        Returns:
            The cut that came nearest, the share of the table's latency that it was asked for, and the milliseconds
            measured of the dense model and of it.

        Raises:
            PruningError: What was asked is out of reach.

        Warns:
            UserWarning: It was missed by more than 5 %.
        """
        dense = self.model if dense is None else dense
        aim = asked.share(race([dense], *self._inputs)[0]) if isinstance(asked.value, str) else float(asked.value)
        found, reached = None, 1.0
        for _ in range(_CUTS):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings('ignore', message='.* of the latency where')
                    slim = cut(self.budget(aim))
            except OutOfReach:
                if found is None:
                    raise
                aim = (aim + reached) / 2  # further than any cut goes
                continue
            reached = aim
            seconds = race([dense, slim], *self._inputs)
            met = _Met(slim, aim, *seconds, asked)
            if met.off <= _ENOUGH:  # and still is, a little later?
                met = _Met(slim, aim, *map(min, seconds, race([dense, slim], *self._inputs)), asked)
            if found is None or met.off < found.off:
                found = met
            if met.off <= _ENOUGH:
                break
            aim = met.corrected
        if found.off > _PROMISED:
            warnings.warn(
                f'latency: {100 * found.got:.1f} % of the dense latency where {100 * found.wanted:.1f} % were asked, '
                f'the nearest that was found; a smaller round_to= or floor= may reach it, or a machine that does '
                f'nothing else', UserWarning, stacklevel=3)
        return found.slim, found.aim, [1000 * found.dense, 1000 * found.fast]

    def lean(self, scores: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Scores by which that goes first which takes more of the time than of the MACs.

        A structure's scores are moved by as much of their own standard deviation as the logarithm of that ratio, for
        one more unit in the dense model, and by one at most: what is dear is cut more, nothing is cut for that alone.
        Our own; HALP weighs importance against latency by a knapsack.

        Args:
            scores: Importance by structure name, shape (units,).
        """
        dense = self.cost.counts(self.units)
        seconds, macs = (self.cost.gradient(q, dense) / self.cost(q, dense) for q in ('latency', 'macs'))
        dear = np.clip(np.log(np.maximum(seconds, 1e-12) / np.maximum(macs, 1e-12)), -1, 1)
        by_name = dict(zip(self.cost.names, dear))
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


def race(models: Sequence[nn.Module], args: Tuple, kwargs: Dict[str, Any], seconds: float = _SECONDS) -> List[float]:
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
