"""What each ATen operation does to labels.

One function per kind of operation, found by the operation's name in ``RULES``; elementwise operations need none, their
tag says it all. An operation without a rule is opaque: whatever goes in is pinned and nothing comes out, so an unknown
operation costs coverage and never correctness.

A rule takes the recorder, the operation's arguments and its output, and returns the output's labels.
"""
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch

from .labels import Factor, Label

__all__ = ['RULES', 'elementwise', 'opaque']

Dims = List[Label]
RULES: Dict[str, Callable[..., Any]] = {}


def rule(*names: str):
    def register(fn):
        RULES.update(dict.fromkeys(names, fn))
        return fn
    return register


def _axis(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def _dims(dim, ndim: int) -> List[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    return [_axis(d, ndim) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def elementwise(rec, args: Sequence[Any], out: torch.Tensor) -> Dims:
    """Broadcasting ties the dims of all operands, aligned at the last."""
    result: Dims = [None] * out.ndim
    seen = [False] * out.ndim
    for tensor in rec.tensors(args):
        labels = rec.labels_of(tensor)
        for back in range(1, tensor.ndim + 1):
            if back > out.ndim or tensor.shape[-back] != out.shape[-back] or out.shape[-back] == 1:
                continue
            result[-back] = rec.labels.tie(result[-back], labels[-back]) if seen[-back] else labels[-back]
            seen[-back] = True
    if rec.name in ('add', 'add_') and sum(t.shape == out.shape and not rec.is_weight(t) for t in rec.tensors(args)) > 1:
        for label in result:
            rec.labels.mark_residual(label)
    return result


def opaque(rec, args: Sequence[Any], out: Any) -> None:
    """Nothing is known: pin whatever touches it."""
    for tensor in rec.tensors(args):
        for label in rec.labels_of(tensor):
            rec.labels.pin(label)


# -- shape ----------------------------------------------------------------------------------------------------------

@rule(
    'alias', 'clone', 'contiguous', 'detach', 'lift_fresh', '_to_copy', 'to', 'native_dropout', 'bernoulli_', 'uniform_',
    'normal_', 'zero_', 'fill_', 'empty_like', 'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like', 'copy',
)
def _same(rec, out, x, *args, **kwargs):
    return list(rec.labels_of(x))


@rule('as_strided_', 'hardswish', 'silu', 'mish')
def _same_shape(rec, out, x, *args, **kwargs):
    if out.shape == x.shape:
        return list(rec.labels_of(x))
    opaque(rec, (x,), out)
    return [None] * out.ndim


@rule('copy_')
def _copy_(rec, out, x, src, *args, **kwargs):
    return elementwise(rec, (x, src), out)


@rule('view', '_unsafe_view', 'reshape', '_reshape_alias')
def _view(rec, out, x, size, **kwargs):
    result: Dims = [None] * out.ndim
    labels = rec.labels_of(x)
    for ins, outs in _reshape_groups(x.shape, out.shape):
        lived = [i for i in ins if labels[i] is not None]
        if not lived:
            continue
        if len(ins) == len(outs) == 1:
            result[outs[0]] = labels[ins[0]]
            continue
        flat = labels[lived[0]] if len(lived) == 1 else rec.labels.merge([labels[i] for i in lived])
        if len(outs) == 1 and len(lived) == len(ins):
            result[outs[0]] = flat.reshape(-1)
            continue
        spread = np.broadcast_to(
            flat.reshape([x.shape[i] if i in lived else 1 for i in ins]), [x.shape[i] for i in ins],
        )
        for o, label in zip(outs, rec.labels.split(spread.reshape([out.shape[o] for o in outs]))):
            result[o] = label
    return result


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> List[Tuple[List[int], List[int]]]:
    """Smallest runs of dims with equal products on both sides; dims of length 1 belong to no run."""
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
    return [labels[_axis(d, x.ndim)] for d in dims]


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
    labels = rec.labels_of(x)
    lead = out.ndim - x.ndim
    return [None] * lead + [labels[i] if x.shape[i] == out.shape[lead + i] else None for i in range(x.ndim)]


@rule('unsqueeze')
def _unsqueeze(rec, out, x, dim):
    labels = list(rec.labels_of(x))
    labels.insert(_axis(dim, x.ndim + 1), None)
    return labels


@rule('squeeze')
def _squeeze(rec, out, x, dim=None):
    gone = {d for d in _dims(dim, x.ndim) if x.shape[d] == 1}
    return [label for i, label in enumerate(rec.labels_of(x)) if i not in gone]


@rule('repeat')
def _repeat(rec, out, x, repeats):
    labels = [None] * (out.ndim - x.ndim) + list(rec.labels_of(x))
    return [label if n == 1 or label is None else np.tile(label, n) for label, n in zip(labels, repeats)]


@rule('select')
def _select(rec, out, x, dim, index):
    labels = list(rec.labels_of(x))
    rec.labels.pin(labels.pop(_axis(dim, x.ndim)))
    return labels


@rule('unbind')
def _unbind(rec, out, x, dim=0):
    return [_select(rec, o, x, dim, i) for i, o in enumerate(out)]


@rule('slice')
def _slice(rec, out, x, dim=0, start=None, end=None, step=1):
    labels = list(rec.labels_of(x))
    d = _axis(dim, x.ndim)
    if labels[d] is not None:
        start = 0 if start is None else min(start + x.shape[d] if start < 0 else start, x.shape[d])
        if step == 1:
            rec.expect_start(labels[d][:start])
        else:
            _keep_blocks(rec, labels[d], step)
        labels[d] = labels[d][start:][::step][:out.shape[d]]
    return labels


def _keep_blocks(rec, label: np.ndarray, step: int) -> None:
    """Every ``step``-th entry is still the same one after a cut if entries go by whole blocks of ``step``."""
    if len(label) % step:
        rec.labels.pin(label)
        return
    blocks = label.reshape(-1, step)
    for i in range(1, step):
        rec.labels.tie(np.ascontiguousarray(blocks[:, 0]), np.ascontiguousarray(blocks[:, i]))


@rule('split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes')
def _split(rec, out, x, size, dim=0):
    d = _axis(dim, x.ndim)
    label = rec.labels_of(x)[d]
    if label is not None and isinstance(size, int):
        # the sizes follow from the length: equal pieces stay equal only if each loses the same entries
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
    d = _axis(dim, out.ndim)
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
    d = _axis(dim, out.ndim)
    result = elementwise(rec, tensors, tensors[0])
    result.insert(d, None)
    return result


@rule('flip')
def _flip(rec, out, x, dims):
    labels = list(rec.labels_of(x))
    for d in _dims(dims, x.ndim):
        labels[d] = None if labels[d] is None else labels[d][::-1].copy()
    return labels


@rule('roll')
def _roll(rec, out, x, shifts, dims=()):
    labels = list(rec.labels_of(x))
    for d in _dims(dims, x.ndim):
        rec.labels.pin(labels[d])
    return labels


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
        front, back = rec.atoms(before), rec.atoms(after)
        rec.follow('pad', 2 * i, front)
        rec.follow('pad', 2 * i + 1, back)
        labels[d] = np.concatenate([front, labels[d], back])
    return labels


# -- products -------------------------------------------------------------------------------------------------------

def _contract(rec, a: torch.Tensor, b: torch.Tensor, label_a: Label, label_b: Label) -> None:
    rec.labels.tie(label_a, label_b)
    if not rec.is_weight(a) and not rec.is_weight(b):
        rec.labels.mark_inexact(label_a, 'two activations are multiplied over it')
    for tensor, label in ((a, label_a), (b, label_b)):
        if rec.is_weight(tensor):
            rec.mark_input(label)


@rule('mm')
def _mm(rec, out, a, b, **kwargs):
    (m, k_a), (k_b, n) = rec.labels_of(a), rec.labels_of(b)
    _contract(rec, a, b, k_a, k_b)
    rec.count_product(out, [(a.shape[0], m), (a.shape[1], k_a), (b.shape[1], n)], [m, n])
    return [m, n]


@rule('addmm')
def _addmm(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _mm(rec, out, a, b))


@rule('bmm')
def _bmm(rec, out, a, b, **kwargs):
    (batch_a, m, k_a), (batch_b, k_b, n) = rec.labels_of(a), rec.labels_of(b)
    _contract(rec, a, b, k_a, k_b)
    batch = rec.labels.tie(batch_a, batch_b) if a.shape[0] > 1 else None
    if not rec.is_weight(a) and not rec.is_weight(b):
        rec.labels.mark_batched(batch)
    rec.count_product(out, [(a.shape[0], batch), (a.shape[1], m), (a.shape[2], k_a), (b.shape[2], n)], [batch, m, n])
    return [batch, m, n]


@rule('baddbmm')
def _baddbmm(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _bmm(rec, out, a, b))


@rule('mv')
def _mv(rec, out, a, b):
    m, k = rec.labels_of(a)
    _contract(rec, a, b, k, rec.labels_of(b)[0])
    return [m]


@rule('addmv')
def _addmv(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _mv(rec, out, a, b))


@rule('dot')
def _dot(rec, out, a, b):
    _contract(rec, a, b, rec.labels_of(a)[0], rec.labels_of(b)[0])
    return []


def _add_bias(rec, bias: torch.Tensor, out: torch.Tensor, labels: Dims) -> Dims:
    for back, label in enumerate(reversed(rec.labels_of(bias)), 1):
        if bias.shape[-back] == out.shape[-back] > 1:
            labels[-back] = rec.labels.tie(labels[-back], label)
    return labels


@rule('convolution', '_convolution')
def _convolution(rec, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *args):
    x_labels, w_labels = rec.labels_of(x), rec.labels_of(weight)
    channels = x_labels[1]
    w_in, w_out = (w_labels[0], w_labels[1]) if transposed else (w_labels[1], w_labels[0])
    for label in w_labels[2:]:
        rec.labels.pin(label)
    rec.labels.tie(x_labels[0], None)

    if groups == 1:
        _contract(rec, x, weight, channels, w_in)
        out_channels = w_out
    else:
        out_channels = _grouped(rec, x, weight, channels, w_in, w_out, transposed, groups)
    if bias is not None and out_channels is not None:
        out_channels = rec.labels.tie(out_channels, rec.labels_of(bias)[0])
    elif bias is not None:
        rec.labels.pin(rec.labels_of(bias)[0])

    spatial = [
        _slide(rec, label, same=x.shape[2 + i] == out.shape[2 + i]) for i, label in enumerate(x_labels[2:])
    ]
    result = [None, out_channels, *spatial]
    positions = (x if transposed else out).shape[2:]
    labels = x_labels[2:] if transposed else spatial
    rec.count_product(
        out,
        [(x.shape[0], None), *zip(weight.shape, w_labels), *zip(positions, labels)],
        result,
    )
    return result


def _slide(rec, label: Label, same: bool) -> Label:
    """A convolution that slides over channels, as ECA's does: it still runs when some are cut, with other neighbours."""
    if label is None or not same:
        rec.labels.pin(label)
        return None
    rec.labels.mark_inexact(label, 'a convolution slides over the channels')
    return label


def _grouped(rec, x, weight, channels, w_in, w_out, transposed, groups) -> Label:
    inner_in, inner_out = x.shape[1] // groups, (weight.shape[1] if transposed else weight.shape[0] // groups)
    full_in = w_in if transposed else channels
    if transposed:
        rec.labels.tie(channels, w_in)
        w_in = None
    n_out = groups * inner_out
    if full_in is None or (w_out is None and not transposed):
        for label in (full_in, w_in, w_out):
            rec.labels.pin(label)
        return None
    rec.mark_input(w_in)
    if inner_in == 1 and not transposed:  # depthwise: a channel and what is made of it go together
        rec.labels.tie(np.repeat(channels, inner_out), w_out)
        rec.follow('groups', 0, channels)
        return w_out

    axis = rec.labels.fresh(groups)
    rec.follow('groups', 0, axis)
    boxes = []
    if inner_in == 1:
        rec.labels.tie(full_in, axis)
    else:
        inner = w_in if w_in is not None else rec.labels.fresh(inner_in)
        boxes.append((full_in.reshape(groups, inner_in), (axis, inner)))
    result = w_out if not transposed else (rec.labels.fresh(n_out) if inner_out > 1 else axis)
    if inner_out == 1:
        rec.labels.tie(result, axis)
    else:
        inner = rec.labels.fresh(inner_out)
        if transposed:
            rec.labels.tie(inner, w_out)
        boxes.append((result.reshape(groups, inner_out), (axis, inner)))
    whole = ((0,) * len(boxes), 'groups')
    within = ((1,) * len(boxes), 'channels')
    rec.labels.add_factor(Factor(boxes, [whole, within] if groups >= max(inner_in, inner_out) else [within, whole]))
    return result


# -- normalisation and reduction ------------------------------------------------------------------------------------

@rule(
    'native_batch_norm', 'cudnn_batch_norm', '_native_batch_norm_legit', '_native_batch_norm_legit_no_training',
    '_batch_norm_with_update',
)
def _batch_norm(rec, out, x, weight, bias, *args, **kwargs):
    labels = list(rec.labels_of(x))
    for tensor in rec.tensors((weight, bias, *args)):
        labels[1] = rec.labels.tie(labels[1], rec.labels_of(tensor)[0]) if x.shape[1] > 1 else None
    if not rec.is_weight(x):
        return [labels]
    for i, label in enumerate(labels):  # a standardised weight: statistics over everything but dim 1
        if i != 1:
            rec.labels.mark_inexact(label, 'weights are standardised over their inputs')
    return [labels]


@rule('native_layer_norm', '_fused_rms_norm', 'rms_norm', 'layer_norm')
def _layer_norm(rec, out, x, shape, weight=None, bias=None, *args, **kwargs):
    labels = list(rec.labels_of(x))
    for i in range(len(shape)):
        d = x.ndim - len(shape) + i
        for tensor in rec.tensors((weight, bias)):
            labels[d] = rec.labels.tie(labels[d], rec.labels_of(tensor)[i]) if x.shape[d] > 1 else None
        rec.labels.mark_inexact(labels[d], 'normalised over the channels')
    return [labels] if isinstance(out, (tuple, list)) else labels


@rule('native_group_norm')
def _group_norm(rec, out, x, weight, bias, n, c, hw, groups, eps):
    labels = list(rec.labels_of(x))
    for tensor in rec.tensors((weight, bias)):
        labels[1] = rec.labels.tie(labels[1], rec.labels_of(tensor)[0]) if x.shape[1] > 1 else None
    if labels[1] is None:
        return [labels]
    if groups == c:
        rec.follow('num_groups', 0, labels[1])
    elif groups == 1:
        rec.labels.mark_inexact(labels[1], 'normalised over the channels')
    else:
        axis, inner = rec.labels.fresh(groups), rec.labels.fresh(c // groups)
        rec.follow('num_groups', 0, axis)
        rec.labels.mark_inexact(inner, 'normalised over groups of channels')
        box = (labels[1].reshape(groups, -1), (axis, inner))
        rec.labels.add_factor(Factor([box], [((0,), 'groups'), ((1,), 'channels')]))
    return [labels]


@rule('mean', 'sum', 'var', 'std', 'var_mean', 'amax', 'amin', 'linalg_vector_norm', 'norm', 'logsumexp', 'prod', 'any',
      'all', 'max', 'min', 'argmax', 'argmin', 'nansum', 'aminmax', 'std_mean')
def _reduce(rec, out, x, *args, **kwargs):
    if rec.name in ('linalg_vector_norm', 'norm'):
        args = args[1:]
    if rec.name in ('max', 'min') and args and isinstance(args[0], torch.Tensor):
        return elementwise(rec, (x, args[0]), out)
    dims = _dims(kwargs.get('dim', args[0] if args else None), x.ndim)
    first = out[0] if isinstance(out, (tuple, list)) else out
    keep = first.ndim == x.ndim
    reason = 'weights are standardised over their inputs' if rec.is_weight(x) else f'{rec.name} over the channels'
    result = []
    for d, label in enumerate(rec.labels_of(x)):
        if d in dims:
            rec.labels.mark_inexact(label, reason)
            result += [None] if keep else []
        else:
            result.append(label)
    return [result] * len(out) if isinstance(out, (tuple, list)) else result


@rule('_softmax', '_log_softmax', 'cumsum', 'cumprod', 'sort', 'topk', '_safe_softmax')
def _along(rec, out, x, *args, **kwargs):
    """Entries along the dim depend on each other in number or in order: none may go."""
    dim = kwargs.get('dim', args[1] if rec.name == 'topk' and len(args) > 1 else args[0] if args else -1)
    dim = dim if rec.name != 'topk' or len(args) > 1 or 'dim' in kwargs else -1
    labels = list(rec.labels_of(x))
    d = _axis(dim, x.ndim) if isinstance(dim, int) and not isinstance(dim, bool) else x.ndim - 1
    rec.labels.pin(labels[d])
    labels[d] = None
    return [labels] * len(out) if isinstance(out, (tuple, list)) else labels


# -- images ---------------------------------------------------------------------------------------------------------

def _spatial(n: int):
    def apply(rec, out, x, *args, **kwargs):
        labels = list(rec.labels_of(x))
        for d in range(x.ndim - n, x.ndim):
            rec.labels.pin(labels[d])
            labels[d] = None
        return [labels] * len(out) if isinstance(out, (tuple, list)) else labels
    return apply


for _n, _names in {
    1: ('avg_pool1d', '_adaptive_avg_pool1d', 'max_pool1d', 'upsample_nearest1d', 'upsample_linear1d',
        'reflection_pad1d', 'replication_pad1d'),
    2: ('avg_pool2d', '_adaptive_avg_pool2d', 'adaptive_avg_pool2d', 'max_pool2d_with_indices', 'max_pool2d',
        'adaptive_max_pool2d', 'upsample_nearest2d', 'upsample_bilinear2d', 'upsample_bicubic2d',
        '_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa', '_upsample_nearest_exact2d', 'reflection_pad2d',
        'replication_pad2d', '_fft_r2c', '_fft_c2c', '_fft_c2r'),
    3: ('avg_pool3d', '_adaptive_avg_pool3d', 'max_pool3d_with_indices', 'upsample_nearest3d', 'upsample_trilinear3d'),
}.items():
    RULES.update(dict.fromkeys(_names, _spatial(_n)))


@rule('im2col')
def _im2col(rec, out, x, kernel_size, *args):
    """(B, C, H, W) → (B, C·k·k, L)."""
    label = rec.labels_of(x)[1]
    return [None, None if label is None else np.repeat(label, kernel_size[0] * kernel_size[1]), None]


@rule('col2im')
def _col2im(rec, out, x, output_size, kernel_size, *args):
    label = rec.labels_of(x)[1]
    if label is None:
        return [None] * out.ndim
    window = kernel_size[0] * kernel_size[1]
    return [None, rec.labels.split(label.reshape(-1, window))[0], None, None]


@rule('unfold')
def _unfold(rec, out, x, dim, size, step):
    labels = list(rec.labels_of(x))
    d = _axis(dim, x.ndim)
    rec.labels.pin(labels[d])
    labels[d] = None
    return [*labels, None]


@rule('pixel_shuffle', 'pixel_unshuffle', 'grid_sampler_2d')
def _channels_only(rec, out, x, *args, **kwargs):
    if rec.name == 'grid_sampler_2d':
        return [None, rec.labels_of(x)[1], None, None]
    opaque(rec, (x,), out)
    return [None] * out.ndim


# -- look-ups -------------------------------------------------------------------------------------------------------

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
    rec.labels.pin(labels[_axis(dim, x.ndim)])
    labels[_axis(dim, x.ndim)] = None
    return labels


@rule('gather')
def _gather(rec, out, x, dim, index, **kwargs):
    d = _axis(dim, x.ndim)
    rec.labels.pin(rec.labels_of(x)[d])
    labels = [None if i == d else label for i, label in enumerate(rec.labels_of(x))]
    for i, label in enumerate(labels):
        if label is not None and out.shape[i] != x.shape[i]:
            rec.labels.pin(label)
            labels[i] = None
    return labels
