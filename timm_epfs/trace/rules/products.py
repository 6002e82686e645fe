"""Matrix products and convolutions: where units are made and used."""

import numpy as np
import torch

from ..labels import Factor, Label
from .base import Dims, rule


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
    """A convolution that slides over channels, as ECA's does: with some cut it still runs, on other neighbours."""
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
        if inner_in > 1:
            rec.mark_input(w_in)
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
