"""Indexing by tensors."""
from typing import List, Optional, Sequence

import torch

from .base import Dims, axis, rule


@rule('embedding')
def _embedding(rec, out, weight, index, *args, **kwargs):
    rows, columns = rec.labels_of(weight)
    rec.labels.pin(rows)
    return [None] * (out.ndim - 1) + [columns]


def _indexed(indices: Sequence[Optional[torch.Tensor]]) -> List[int]:
    """The dims that are indexed: one by each index, and by a mask as many as it has."""
    at, d = [], 0
    for index in indices:
        taken = index.ndim if index is not None and is_mask(index) else 1
        at += [] if index is None else range(d, d + taken)
        d += taken
    return at


def is_mask(index: torch.Tensor) -> bool:
    """Whether an index is a mask, which selects as many entries as it has ones."""
    return index.dtype in (torch.bool, torch.uint8)


def _selected(labels: Dims, at: Sequence[int], new: int) -> Dims:
    """Labels of what an index selects: ``new`` dims stand for those that are indexed."""
    left = [label for d, label in enumerate(labels) if d not in at]
    where = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return [*left[:where], *[None] * new, *left[where:]]


@rule('index', '_unsafe_index')
def _index(rec, out, x, indices):
    labels, at = rec.labels_of(x), _indexed(indices)
    for d in at:
        rec.labels.pin(labels[d])
    return _selected(labels, at, out.ndim - x.ndim + len(at))


@rule('index_put', '_unsafe_index_put', '_index_put_impl')
def _index_put(rec, out, x, indices, values, *args, **kwargs):
    """``x[indices] = values``: the dims that aren't indexed are those of the values, aligned at the last one."""
    labels, at = rec.labels_of(x), _indexed(indices)
    for d in at:
        rec.labels.pin(labels[d])
    new = max(1 if is_mask(index) else index.ndim for index in indices if index is not None)
    selected = [None] * values.ndim + _selected(labels, at, new)
    for back, label in enumerate(reversed(rec.labels_of(values)), 1):
        if values.shape[-back] > 1:
            rec.labels.tie(selected[-back], label)
    return [None if d in at else label for d, label in enumerate(labels)]


@rule('index_select')
def _index_select(rec, out, x, dim, index):
    labels = list(rec.labels_of(x))
    rec.labels.pin(labels[axis(dim, x.ndim)])
    labels[axis(dim, x.ndim)] = None
    return labels


@rule('gather')
def _gather(rec, out, x, dim, index, **kwargs):
    d = axis(dim, x.ndim)
    rec.labels.pin(rec.labels_of(x)[d])
    labels = [None if i == d else label for i, label in enumerate(rec.labels_of(x))]
    for i, label in enumerate(labels):
        if label is not None and out.shape[i] != x.shape[i]:
            rec.labels.pin(label)
            labels[i] = None
    return labels
