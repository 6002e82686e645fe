"""Indexing by tensors."""
import torch

from .base import axis, opaque, rule


@rule('embedding')
def _embedding(rec, out, weight, index, *args, **kwargs):
    rows, columns = rec.labels_of(weight)
    rec.labels.pin(rows)
    return [None] * (out.ndim - 1) + [columns]


@rule('index', '_unsafe_index')
def _index(rec, out, x, indices):
    labels = list(rec.labels_of(x))
    at = [d for d, index in enumerate(indices) if index is not None]
    for d in at:
        rec.labels.pin(labels[d])
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        opaque(rec, (x,), out)
        return [None] * out.ndim
    left = [label for d, label in enumerate(labels) if d not in at]
    new = out.ndim - len(left)
    where = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return [*left[:where], *[None] * new, *left[where:]]


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
