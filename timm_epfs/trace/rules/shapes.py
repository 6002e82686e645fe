"""Views, copies, concatenations: operations that only move entries."""
from typing import List, Sequence, Tuple

import numpy as np

from .base import Dims, axes, axis, elementwise, opaque, rule


@rule(
    'alias', 'clone', 'contiguous', 'detach', 'lift_fresh', '_to_copy', 'to', 'copy', 'native_dropout',
    'bernoulli_', 'uniform_', 'normal_', 'zero_', 'fill_',
    'empty_like', 'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like',
)
def _same(rec, out, x, *args, **kwargs):
    return list(rec.labels_of(x))


@rule('as_strided_', 'hardswish', 'silu', 'mish')
def _same_shape(rec, out, x, *args, **kwargs):
    if out.shape == x.shape:
        return list(rec.labels_of(x))
    opaque(rec, (x,), out)
    return [None] * out.ndim


@rule('copy_', '_prelu_kernel')
def _two_operands(rec, out, x, src, *args, **kwargs):
    return elementwise(rec, (x, src), out)


@rule('view', '_unsafe_view', 'reshape', '_reshape_alias')
def _view(rec, out, x, size, **kwargs):
    """Dims that are merged or split get new labels, all others keep theirs."""
    result: Dims = [None] * out.ndim
    labels = rec.labels_of(x)
    for ins, outs in _reshape_groups(x.shape, out.shape):
        labelled = [i for i in ins if labels[i] is not None]
        if not labelled:
            continue
        if len(ins) == len(outs) == 1:
            result[outs[0]] = labels[ins[0]]
            continue
        flat = labels[labelled[0]] if len(labelled) == 1 else rec.labels.merge([labels[i] for i in labelled])
        if len(outs) == 1 and len(labelled) == len(ins):
            result[outs[0]] = flat.reshape(-1)
            continue
        spread = np.broadcast_to(
            flat.reshape([x.shape[i] if i in labelled else 1 for i in ins]), [x.shape[i] for i in ins],
        )
        for o, label in zip(outs, rec.labels.split(spread.reshape([out.shape[o] for o in outs]))):
            result[o] = label
    return result


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> List[Tuple[List[int], List[int]]]:
    """The dims that are merged or split: shortest runs of dims whose lengths have the same product on both sides.

    >>> _reshape_groups([1, 8, 6, 5], [8, 2, 3, 5])      # only 6 is split, into 2 and 3
    [([1], [0]), ([2], [1, 2]), ([3], [3])]

    Args:
        before: Lengths before. Those of 1 are in no run.
        after: Lengths after, likewise.

    Returns:
        Pairs (numbers of dims before, numbers of dims after).
    """
    a = [i for i, n in enumerate(before) if n != 1]
    b = [i for i, n in enumerate(after) if n != 1]
    groups, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        ins, outs = [a[i]], [b[j]]
        p, q = before[a[i]], after[b[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p, ins = p * before[a[i]], ins + [a[i]]
                i += 1
            else:
                q, outs = q * after[b[j]], outs + [b[j]]
                j += 1
        groups.append((ins, outs))
    return groups


@rule('permute')
def _permute(rec, out, x, dims):
    labels = rec.labels_of(x)
    return [labels[axis(d, x.ndim)] for d in dims]


@rule('transpose', 'transpose_')
def _transpose(rec, out, x, a, b):
    labels = list(rec.labels_of(x))
    if x.ndim:
        labels[a], labels[b] = labels[b], labels[a]
    return labels


@rule('t')
def _t(rec, out, x):
    return list(rec.labels_of(x))[::-1]


@rule('expand')
def _expand(rec, out, x, size, **kwargs):
    lead = out.ndim - x.ndim
    same = [d for d in range(lead, out.ndim) if x.shape[d - lead] == out.shape[d]]
    rec.note_repeated(out, set(range(out.ndim)) - set(same))
    return [rec.labels_of(x)[d - lead] if d in same else None for d in range(out.ndim)]


@rule('unsqueeze')
def _unsqueeze(rec, out, x, dim):
    labels = list(rec.labels_of(x))
    labels.insert(axis(dim, x.ndim + 1), None)
    return labels


@rule('squeeze')
def _squeeze(rec, out, x, dim=None):
    gone = {d for d in axes(dim, x.ndim) if x.shape[d] == 1}
    return [label for i, label in enumerate(rec.labels_of(x)) if i not in gone]


@rule('repeat')
def _repeat(rec, out, x, repeats):
    labels = [None] * (out.ndim - x.ndim) + list(rec.labels_of(x))
    return [label if n == 1 or label is None else np.tile(label, n) for label, n in zip(labels, repeats)]


@rule('select')
def _select(rec, out, x, dim, index):
    labels = list(rec.labels_of(x))
    rec.labels.pin(labels.pop(axis(dim, x.ndim)))
    return labels


@rule('unbind')
def _unbind(rec, out, x, dim=0):
    return [_select(rec, o, x, dim, i) for i, o in enumerate(out)]


@rule('slice')
def _slice(rec, out, x, dim=0, start=None, end=None, step=1):
    labels = list(rec.labels_of(x))
    d = axis(dim, x.ndim)
    if labels[d] is not None:
        start = 0 if start is None else min(start + x.shape[d] if start < 0 else start, x.shape[d])
        if step == 1:
            rec.expect_start(labels[d][:start])
        else:
            _cut_in_runs(rec, labels[d], step)
        labels[d] = labels[d][start:][::step][:out.shape[d]]
    return labels


def _cut_in_runs(rec, label: np.ndarray, step: int) -> None:
    """Cut whole runs of ``step`` entries, so that after a cut, too, every ``step``-th one is the first of its run."""
    if len(label) % step:
        rec.labels.pin(label)
        return
    runs = label.reshape(-1, step)
    for i in range(1, step):
        rec.labels.tie(np.ascontiguousarray(runs[:, 0]), np.ascontiguousarray(runs[:, i]))


@rule('split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes')
def _split(rec, out, x, size, dim=0):
    d = axis(dim, x.ndim)
    label = rec.labels_of(x)[d]
    if label is not None and isinstance(size, int):
        # chunk() computes the size from the length: pieces begin where they did only if all lose the same entries
        pieces = [label[i:i + size] for i in range(0, len(label), size)]
        for piece in pieces[1:]:
            rec.labels.tie(*((pieces[0], piece) if len(piece) == size else (label, None)))
    result, start = [], 0
    for o in out:
        labels = list(rec.labels_of(x))
        if label is not None:
            labels[d] = label[start:start + o.shape[d]]
        start += o.shape[d]
        result.append(labels)
    return result


@rule('cat')
def _cat(rec, out, tensors, dim=0):
    tensors = [t for t in tensors if t.ndim == out.ndim]
    d = axis(dim, out.ndim)
    result = list(rec.labels_of(tensors[0]))
    for tensor in tensors[1:]:
        for i, label in enumerate(rec.labels_of(tensor)):
            if i != d:
                result[i] = rec.labels.tie(result[i], label) if out.shape[i] > 1 else None
    parts = [(rec.labels_of(t)[d], t.shape[d]) for t in tensors]
    if all(label is None for label, _ in parts):
        result[d] = None
    else:
        result[d] = np.concatenate([
            rec.constant(n) if label is None else label for label, n in parts
        ])
    return result


@rule('stack')
def _stack(rec, out, tensors, dim=0):
    d = axis(dim, out.ndim)
    result = elementwise(rec, tensors, tensors[0])
    result.insert(d, None)
    return result


@rule('flip')
def _flip(rec, out, x, dims):
    labels = list(rec.labels_of(x))
    for d in axes(dims, x.ndim):
        labels[d] = None if labels[d] is None else labels[d][::-1].copy()
    return labels


@rule('roll')
def _roll(rec, out, x, shifts, dims=()):
    labels = list(rec.labels_of(x))
    for d in axes(dims, x.ndim):
        rec.labels.pin(labels[d])
    return labels


@rule('tril', 'triu')
def _triangle(rec, out, x, diagonal=0):
    """Whether an entry is set to zero depends on its place in the last two dims."""
    labels = list(rec.labels_of(x))
    for label in labels[-2:]:
        rec.labels.pin(label)
    return [*labels[:-2], None, None]


@rule('constant_pad_nd')
def _pad(rec, out, x, pad, value=0):
    labels = list(rec.labels_of(x))
    for i in range(len(pad) // 2):
        d = x.ndim - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        if labels[d] is None or (before == 0 and after == 0):
            continue
        if before < 0 or after < 0:
            rec.labels.pin(labels[d])
            labels[d] = None
            continue
        front, back = rec.labels.new_nodes(before), rec.labels.new_nodes(after)
        rec.follow('pad', 2 * i, front)
        rec.follow('pad', 2 * i + 1, back)
        labels[d] = np.concatenate([front, labels[d], back])
    return labels
