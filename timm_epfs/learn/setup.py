"""The arguments that all methods share, checked once and passed on as one object."""
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple, Union

from timm.utils import unwrap_model
from torch import nn

from ..core import Budget, PruningError, Structure
from ..pruner import Choice, Example, Pruner
from ..surgery import is_maskable, is_masked

__all__ = ['Setup', 'make_setup', 'structures_to_learn']


@dataclass(frozen=True)
class Setup:
    """What a learner starts from.

    Attributes:
        pruner: The model and its trace.
        budget: What the cut model may cost. None: the masks alone decide what stays.
        steps: Length of the sparse phase in optimizer steps.
        choice: How the units that stay are chosen when the selection is made.
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
        exclude: Optional[Sequence[str]] = None,
        only: Optional[Sequence[str]] = None,
        streams: Optional[bool] = None,
        example_input: Optional[Example] = None,
        base: Optional[str] = None,
) -> Setup:
    """Check the arguments of a learner, which ``Learner`` describes. A model that is not a ``Pruner`` is traced.

    Raises:
        PruningError: An argument is invalid, or the model can't be traced.
    """
    if steps is not None and not (isinstance(steps, int) and steps >= 1):
        raise PruningError(f'steps={steps!r} was given; give the number of optimizer steps, a positive integer')
    budget = Budget.given(macs, params, latency, latency_batch_size)
    choice = Choice(scope=scope, widths=widths, floor=floor, round_to=round_to)
    options = dict(
        kinds=kinds, exclude=exclude, only=only, streams=streams, example_input=example_input, base=base)
    return Setup(_pruner(model, options), budget, steps, choice)


def _pruner(model: Union[nn.Module, Pruner], options: Dict[str, Any]) -> Pruner:
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, Pruner):
        if given:
            raise PruningError(
                f'{next(iter(given))}= was given with a Pruner, which has its own; give it to the Pruner instead')
        return model
    if not isinstance(model, nn.Module):
        raise PruningError(
            f'the model is not a module: {type(model).__name__} was given; give an nn.Module or a Pruner')
    if is_masked(unwrap_model(model)):
        raise PruningError('the model already has a learner; call remove() on that one first')
    return Pruner(model, **{'streams': False, **given})


def structures_to_learn(pruner: Pruner) -> Tuple[List[Structure], FrozenSet[str]]:
    """The structures that get masks, and the names of those that the pruner may cut but that get none.

    No masks are put on structures that no weight can mask, and, unless ``streams=True``, on residual streams that are
    normalised over their channels.

    Raises:
        PruningError: No structure can be masked.
    """
    without_masks = frozenset(
        s.name for s in pruner.structures if (s.stream and not pruner.streams) or not is_maskable(s))
    structures = [s for s in pruner.structures if s.name not in without_masks]
    if not structures:
        raise PruningError(
            f'nothing to learn: none of the {", ".join(pruner.kinds)} of this model can be masked, or exclude= and '
            f'only= leave them out; loosen these, or name other kinds=')
    return structures, without_masks
