"""The table of rules, and the two that apply where an operation has none."""
from typing import Any, Callable, Dict, List, Sequence

import torch

from ..labels import Label

__all__ = ['Dims', 'RULES', 'elementwise', 'opaque', 'rule', 'axis', 'axes']

Dims = List[Label]
RULES: Dict[str, Callable[..., Any]] = {}


def rule(*names: str):
    """Say what operations do to labels: ``fn(rec, out, *args, **kwargs)``, registered under their names.

    ``fn`` takes the recorder, the output and the operation's own arguments, and returns a label for each dim of the
    output: one of ``rec.labels_of(argument)`` where its entries pass through, ``None`` where nothing can be cut. An
    operation of several outputs returns a list of such lists. ``rec.labels.tie``, ``.pin`` and ``.mark_inexact`` say
    what else must hold.

    >>> @rule('mylib::scaled_relu')
    ... def _scaled_relu(rec, out, x, scale):
    ...     labels = list(rec.labels_of(x))
    ...     labels[1] = rec.labels.tie(labels[1], rec.labels_of(scale)[0])
    ...     return labels

    Args:
        names: ``'name'`` of ATen's operations, ``'namespace::name'`` of others.
    """
    def register(fn):
        RULES.update(dict.fromkeys(names, fn))
        return fn
    return register


def axis(dim: int, ndim: int) -> int:
    """The number of a dim, counted from the front."""
    return dim % ndim if ndim else 0


def axes(dim, ndim: int) -> List[int]:
    """The numbers of dims, counted from the front; of all dims if none is given."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    return [axis(d, ndim) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def elementwise(rec, args: Sequence[Any], out: torch.Tensor) -> Dims:
    """The dims of all operands are tied, aligned at the last one, as broadcasting aligns them.

    Where an operand repeats one entry, it says nothing: whatever the others lose, it is repeated less often.
    """
    result: Dims = [None] * out.ndim
    seen = [False] * out.ndim
    for tensor in rec.tensors(args):
        labels = rec.labels_of(tensor)
        for back in range(1, tensor.ndim + 1):
            if back > out.ndim or tensor.shape[-back] != out.shape[-back] or out.shape[-back] == 1:
                continue
            if rec.repeats(tensor, tensor.ndim - back):
                continue
            result[-back] = rec.labels.tie(result[-back], labels[-back]) if seen[-back] else labels[-back]
            seen[-back] = True
    activations = [t for t in rec.tensors(args) if t.shape == out.shape and not rec.is_weight(t)]
    if rec.name in ('add', 'add_') and len(activations) > 1:
        for label in result:
            rec.labels.mark_residual(label)
    return result


def opaque(rec, args: Sequence[Any], out: Any) -> None:
    """Nothing is known about an operation: pin all that it is given."""
    for tensor in rec.tensors(args):
        for label in rec.labels_of(tensor):
            rec.labels.pin(label)
