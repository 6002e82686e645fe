"""Adafactor's second moments, cut to a plan.

Adafactor (Shazeer and Stern, ICML 2018, Algorithm 4) keeps no second moment V of a weight, but its means R over one dim
and C over another. They stand for ``V = R·C / mean(R)``.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from torch import Tensor

from .tensors import cut_tensor

__all__ = ['cut_factors']

Dims = Optional[Tuple[int, int]]


@dataclass(frozen=True)
class _Layout:
    """How an optimizer keeps R and C.

    Attributes:
        names: Names of R and C in the optimizer's state.
        keepdim: Whether R and C keep the dim that they are the mean over, with length 1.
        dims: The dims that C and R are the means over, given the shape of a weight and the options of its parameter
            group. None: the optimizer keeps V itself, as ``'exp_avg_sq'``.
    """
    names: Tuple[str, str]
    keepdim: bool
    dims: Callable[[Sequence[int], Mapping[str, Any]], Dims]


def _dims_of_timm(shape: Sequence[int], group: Mapping[str, Any]) -> Dims:
    least, last = group['min_dim_size_to_factor'], len(shape) - 1
    if len(shape) > 2 and min(shape[:2]) > least:
        return 0, 1
    return (last - 1, last) if len(shape) >= 2 and min(shape[-2:]) > least else None


def _dims_of_big_vision(shape: Sequence[int], group: Mapping[str, Any]) -> Dims:
    *_, second, largest = (None, None, *sorted(range(len(shape)), key=lambda dim: shape[dim]))
    return None if second is None or shape[second] < group['min_dim_size_to_factor'] else (second, largest)


_LAYOUTS = (
    _Layout(('exp_avg_sq_row', 'exp_avg_sq_col'), False, _dims_of_timm),           # timm.optim.Adafactor
    _Layout(('exp_avg_sq_r', 'exp_avg_sq_c'), True, _dims_of_big_vision),          # timm.optim.AdafactorBigVision
    _Layout(('row_var', 'col_var'), True, lambda shape, group: (len(shape) - 2, len(shape) - 1)),  # torch.optim
)


def cut_factors(
        state: Mapping[str, Any],
        shape: Sequence[int],
        group: Mapping[str, Any],
        removed: Mapping[int, Any],
) -> Tuple[Sequence[str], Dict[str, Tensor]]:
    """Cut the V that R and C stand for, and take the means again, over the dims that the optimizer will expect.

    So each entry that stays has the second moment that it had, where those dims stay the same.

    Args:
        state: What the optimizer keeps of one weight.
        shape: The weight's shape.
        group: Options of its parameter group.
        removed: Entries that go, by dim.

    Returns:
        Names of R and C, if they are in the state; and what takes their place.
    """
    layout = next((layout for layout in _LAYOUTS if layout.names[0] in state), None)
    if layout is None:
        return (), {}
    factors = [state[name] for name in layout.names]
    if not removed:
        return layout.names, dict(zip(layout.names, factors))
    col_dim, row_dim = layout.dims(shape, group)
    rows, cols = factors if layout.keepdim else (factors[0].unsqueeze(row_dim), factors[1].unsqueeze(col_dim))
    left = cut_tensor(rows * cols / rows.mean(col_dim, keepdim=True), removed)
    dims = layout.dims(left.shape, group)
    if dims is None:
        return layout.names, {'exp_avg_sq': left}
    means = [left.mean(dim, keepdim=layout.keepdim) for dim in reversed(dims)]
    return layout.names, dict(zip(layout.names, means))
