"""The tensors that a model returned, whatever it returned them in."""
from typing import Any, Iterator, List, Set

from torch import Tensor, nn

__all__ = ['returned_tensors']


def returned_tensors(output: Any) -> List[Tensor]:
    """All tensors in what a model returned: in lists, tuples and dicts, and in the attributes of other objects.

    >>> from types import SimpleNamespace
    >>> import torch
    >>> output = SimpleNamespace(logits=torch.zeros(1, 5), hidden=(torch.zeros(1, 2), {'last': torch.zeros(3)}))
    >>> [tuple(tensor.shape) for tensor in returned_tensors(output)]
    [(1, 5), (1, 2), (3,)]
    """
    return list(_tensors(output, set()))


def _tensors(value: Any, seen: Set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif hasattr(value, '__dict__') and not isinstance(value, (type, nn.Module)):
        parts = vars(value).values()
    else:
        return
    if id(value) not in seen:
        seen.add(id(value))
        for part in parts:
            yield from _tensors(part, seen)
