"""The arguments of one cut, checked: a budget, and how the units that stay are chosen."""
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Mapping, Optional, Tuple, Union

from ..core import Budget, PruningError, pattern_list

__all__ = ['Choice', 'make_request']


@dataclass(frozen=True)
class Choice:
    """How the units that stay are chosen. The fields are arguments of ``prune``.

    Raises:
        PruningError: A field is not of its type. What depends on the model is checked later.
    """
    criterion: Optional[str] = None
    scope: str = 'global'
    widths: Optional[str] = None
    round_to: Optional[Union[int, str]] = None
    floor: float = 0.05
    ratios: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        if not (self.round_to in (None, 'auto') or _is_integer(self.round_to) and self.round_to >= 1):
            raise PruningError(f'round_to={self.round_to!r} was given; give a positive integer, \'auto\' or None')
        if not isinstance(self.ratios, Mapping):
            raise PruningError(
                f'ratios={self.ratios!r} was given; give a dict of shares to remove, as in ratios={{\'layer1\': 0.25}}')
        pattern_list('ratios', self.ratios)
        if not _is_integer(self.seed):
            raise PruningError(f'seed={self.seed!r} was given; give an integer')

    def for_data(self, has_data: bool) -> 'Choice':
        """This choice with the best criterion that there is data for, and the best widths, where none was given."""
        if self.criterion is not None:
            return self
        if not has_data:
            return replace(self, criterion='l2')
        return replace(self, criterion='obs', widths=self.widths or 'sensitivity')


def make_request(
        macs: Optional[Union[float, Budget]] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        criterion: Optional[str] = None,
        scope: str = 'global',
        widths: Optional[str] = None,
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        ratios: Optional[Mapping[str, float]] = None,
        seed: int = 0,
) -> Tuple[Budget, Choice]:
    """The arguments of a cut, which ``prune`` describes, as two objects.

    Raises:
        PruningError: No budget is given, or more than one; or an argument is not of its type.
    """
    budget = Budget.given(macs, params, latency, latency_batch_size) or Budget()  # which raises: none was given
    return budget, Choice(criterion, scope, widths, round_to, floor, {} if ratios is None else ratios, seed)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
