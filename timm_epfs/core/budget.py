"""``Budget``: what a cut model may cost."""
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any, Dict, Optional, Union

from .cost import is_number
from .errors import PruningError
from .text import format_count

__all__ = ['BUDGETS', 'Budget']

# The quantities that a budget may limit, and their names in messages.
BUDGETS = {'macs': 'MACs', 'params': 'parameters', 'latency': 'latency'}

_SMALLEST_COUNT = 1000  # smaller ones are percentages, or counts of millions

_MILLISECONDS = re.compile(r'\s*(\d+(?:\.\d*)?|\.\d+)\s*ms\s*')


@dataclass(frozen=True)
class Budget:
    """What a cut model may cost: exactly one of MACs, parameters and latency.

    >>> Budget(macs=0.5).share(dense=4e9)
    0.5
    >>> Budget(params=1e6).share(dense=4e6)
    0.25
    >>> Budget(latency='3ms').share(dense=0.012)
    0.25

    Args:
        macs: Multiply-accumulates at batch 1: a share of the dense model's (``0.5``), or a count above 1 (``2e9``).
        params: Number of parameters: a share of the dense model's, or a count above 1.
        latency: Time that a batch takes: a share of the dense model's (``0.5``), or milliseconds (``'12ms'``).
        latency_batch_size: Number of images in a batch when latency is measured.

    Raises:
        PruningError: None or several of the three are given, or a value is invalid.
    """
    macs: Optional[float] = None
    params: Optional[float] = None
    latency: Optional[Union[float, str]] = None
    latency_batch_size: int = 1

    def __post_init__(self):
        given = [f'{name}=' for name in BUDGETS if getattr(self, name) is not None]
        if not given:
            raise PruningError('no budget was given; give one of macs=, params= and latency=')
        if len(given) > 1:
            raise PruningError(f'{" and ".join(given)} were given; a cut has one budget, so give only one of them')
        if self.quantity == 'latency':
            self._check_latency()
        elif not is_number(self.value) or self.value <= 0:
            raise PruningError(
                f'{self.quantity}={self.value!r} was given; give a share between 0 and 1, or a count above 1')

    def _check_latency(self) -> None:
        size = self.latency_batch_size
        if not (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
            raise PruningError(f'latency_batch_size={size!r} was given; give a positive integer')
        is_share = isinstance(self.latency, Real) and not isinstance(self.latency, bool) and 0 < self.latency < 1
        if not is_share and self._milliseconds is None:
            raise PruningError(
                f'latency={self.latency!r} was given; give a share of the dense model\'s time (0.5) or milliseconds '
                f'(\'12ms\')')

    @classmethod
    def given(
            cls,
            macs: Optional[Union[float, 'Budget']] = None,
            params: Optional[float] = None,
            latency: Optional[Union[float, str]] = None,
            latency_batch_size: int = 1,
    ) -> Optional['Budget']:
        """The budget that a function's arguments give, or None where they give none.

        Args:
            macs: As in ``Budget``, or a whole ``Budget``.
            params: As in ``Budget``.
            latency: As in ``Budget``.
            latency_batch_size: As in ``Budget``.

        Raises:
            PruningError: As for ``Budget``.
        """
        if isinstance(macs, Budget):
            if params is not None or latency is not None:
                raise PruningError(
                    'a Budget was given with params= or latency=; a cut has one budget, so leave these out')
            return macs
        if macs is None and params is None and latency is None:
            return None
        return cls(macs, params, latency, latency_batch_size)

    @property
    def quantity(self) -> str:
        """``'macs'``, ``'params'`` or ``'latency'``."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> Any:
        """The value that was given for the quantity."""
        return getattr(self, self.quantity)

    @property
    def label(self) -> str:
        """The quantity's name in messages."""
        return BUDGETS[self.quantity]

    @property
    def in_milliseconds(self) -> bool:
        """Whether it is a latency in milliseconds. Its share is known only when the dense model has been timed."""
        return self._milliseconds is not None

    @property
    def _milliseconds(self) -> Optional[float]:
        match = _MILLISECONDS.fullmatch(self.latency) if isinstance(self.latency, str) else None
        return float(match[1]) if match and float(match[1]) > 0 else None

    def share(self, dense: float) -> float:
        """The budget as a share of the dense model's cost.

        Args:
            dense: Cost of the dense model: MACs, parameters, or seconds.

        Raises:
            PruningError: The dense model is within the budget already, or the budget is a count too small to be meant.
        """
        if self.in_milliseconds:
            share, has = self._milliseconds / (1000 * dense), f'takes {1000 * dense:.3g} ms'
        else:
            value, has = float(self.value), f'has {format_count(dense)}'
            share = value / dense if value > 1 else value
            if 1 < value < _SMALLEST_COUNT and share < 0.001:
                raise PruningError(
                    f'{self.quantity}={self.value!r} was given, a count of {value:g} {self.label}, the dense model '
                    f'{has}; give a share between 0 and 1, or a larger count')
        if share >= 1:
            raise PruningError(
                f'{self.quantity}={self.value!r} was given, the dense model {has}; ask for less, as in 0.5')
        return share

    def at(self, share: float) -> 'Budget':
        """A budget of the same quantity, for another share of the dense model's cost."""
        return Budget(**{self.quantity: share}, latency_batch_size=self.latency_batch_size)

    def to_dict(self) -> Dict[str, Any]:
        """The quantity and the value that was given, for the recipe of a plan."""
        return {self.quantity: self.value}
