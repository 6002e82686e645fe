"""What every method is asked, checked once and passed on whole."""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Union

from timm.utils import unwrap_model
from torch import nn

from ..core import Budget, PruningError
from ..pruner import Choice, Example, Pruner
from ..surgery import is_masked

__all__ = ['Setup', 'make_setup']


@dataclass(frozen=True)
class Setup:
    """What to learn from.

    Attributes:
        pruner: The model with its trace.
        budget: What may be left; None: whatever the method leaves.
        steps: Length of the sparse phase in optimizer steps.
        choice: How units are chosen in the end.
    """
    pruner: Pruner
    budget: Optional[Budget]
    steps: Optional[int]
    choice: Choice


def make_setup(
        model: Union[nn.Module, Pruner],
        macs: Optional[Union[float, Budget]] = None,
        steps: Optional[int] = None,
        *,
        params: Optional[float] = None,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        scope: str = 'global',
        widths: Optional[str] = None,
        floor: float = 0.05,
        round_to: Optional[Union[int, str]] = None,
        kinds: Optional[Sequence[str]] = None,
        exclude: Sequence[str] = (),
        only: Sequence[str] = (),
        streams: Optional[bool] = None,
        example_input: Optional[Example] = None,
        base: Optional[str] = None,
) -> Setup:
    """Check the arguments of a learner, which ``Learner`` describes; a model that is no pruner is traced.

    Raises:
        PruningError: What was asked for can't be done.
    """
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise PruningError(f'steps={steps!r} was given; give the number of optimizer steps, from 1 on')
    budget = Budget.given(macs, params, latency, latency_batch_size)
    choice = Choice(scope=scope, widths=widths, floor=floor, round_to=round_to)
    options = dict(
        kinds=kinds, exclude=exclude, only=only, streams=streams, example_input=example_input, base=base)
    return Setup(_pruner(model, options), budget, steps, choice)


def _pruner(model: Union[nn.Module, Pruner], options: Dict[str, Any]) -> Pruner:
    given = {name: value for name, value in options.items() if value is not None and not _is_empty(value)}
    if isinstance(model, Pruner):
        if given:
            raise PruningError(f'{next(iter(given))}= was given with a Pruner, which has its own; give it to that')
        return model
    if not isinstance(model, nn.Module):
        raise PruningError(f'a model was asked for, {type(model).__name__} was given; give an nn.Module')
    if is_masked(unwrap_model(model)):
        raise PruningError('the model has a learner already; call remove() on that one first')
    return Pruner(model, **{'streams': False, **given})


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value
