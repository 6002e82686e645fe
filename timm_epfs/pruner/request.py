"""The arguments of one cut, checked: a budget, and how the units that stay are chosen."""
from dataclasses import dataclass, field
from typing import Mapping, Optional, Tuple, Union

from ..core import Budget

__all__ = ['Choice', 'make_request']


@dataclass(frozen=True)
class Choice:
    """How the units that stay are chosen. The fields are arguments of ``prune``."""
    criterion: str = 'l2'
    scope: str = 'global'
    widths: Optional[str] = None
    round_to: Optional[Union[int, str]] = None
    floor: float = 0.05
    ratios: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


def make_request(
        macs: Optional[Union[float, Budget]] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        criterion: str = 'l2',
        scope: str = 'global',
        widths: Optional[str] = None,
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        ratios: Optional[Mapping[str, float]] = None,
        seed: int = 0,
) -> Tuple[Budget, Choice]:
    """The arguments of a cut, which ``prune`` describes, as two objects.

    Raises:
        PruningError: No budget is given, or more than one.
    """
    budget = Budget.given(macs, params, latency, latency_batch_size) or Budget()  # which raises: none was given
    return budget, Choice(criterion, scope, widths, round_to, floor, dict(ratios or {}), seed)
