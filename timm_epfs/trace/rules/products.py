"""Matrix products and convolutions: where units are made and used."""
from typing import Sequence, Tuple

import numpy as np
import torch

from ..labels import Label
from ..reshapes import Grid, Reshape
from .base import Dims, rule


def _contract(rec, label_a: Label, label_b: Label, weights: Tuple[bool, bool]) -> None:
    """A product sums over a dim of both factors.

    Args:
        rec: The recorder.
        label_a: Label of the dim of the first factor.
        label_b: Label of the dim of the second factor.
        weights: Whether each of them is a weight.
    """
    rec.labels.tie(label_a, label_b)
    if not any(weights):
        rec.labels.mark_inexact(label_a, 'two activations are multiplied over it')
    for is_weight, label in zip(weights, (label_a, label_b)):
        if is_weight:
            rec.mark_input(label)


def _contract_vector(rec, a: torch.Tensor, b: torch.Tensor, label_a: Label, label_b: Label) -> None:
    """As ``_contract``, for a product with a vector. Of weights alone, it is a spectral norm, which reads no units."""
    if rec.is_weight(a) and rec.is_weight(b):
        rec.labels.mark_inexact(rec.labels.tie(label_a, label_b), 'a weight is divided by a sum over it')
    else:
        _contract(rec, label_a, label_b, _weights(rec, a, b))


def _weights(rec, a: torch.Tensor, b: torch.Tensor) -> Tuple[bool, bool]:
    """Which factors of a product are weights."""
    return rec.is_weight(a), rec.is_weight(b)


def _write(rec, label_a: Label, label_b: Label, weights: Tuple[bool, bool]) -> None:
    """If one of two factors is a weight, a product writes the dim of it that it doesn't sum over."""
    if any(weights) and not all(weights):
        rec.mark_output(label_a if weights[0] else label_b)


@rule('mm')
def _mm(rec, out, a, b, **kwargs):
    (m, k_a), (k_b, n) = rec.labels_of(a), rec.labels_of(b)
    weights = _weights(rec, a, b)
    _contract(rec, k_a, k_b, weights)
    _write(rec, m, n, weights)
    rec.count_product(out, [(a.shape[0], m), (a.shape[1], k_a), (b.shape[1], n)], [m, n])
    return [m, n]


@rule('addmm')
def _addmm(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _mm(rec, out, a, b))


@rule('bmm')
def _bmm(rec, out, a, b, **kwargs):
    (batch_a, m, k_a), (batch_b, k_b, n) = rec.labels_of(a), rec.labels_of(b)
    # Attention over learned queries multiplies what layers made of them, which are activations to it.
    weights = tuple(rec.is_weight(t) and not rec.is_layer_output(t) for t in (a, b))
    _contract(rec, k_a, k_b, weights)
    _write(rec, m, n, weights)
    batch = rec.labels.tie(batch_a, batch_b) if a.shape[0] > 1 else None
    if not any(weights):
        rec.labels.mark_heads(batch)
    rec.count_product(out, [(a.shape[0], batch), (a.shape[1], m), (a.shape[2], k_a), (b.shape[2], n)], [batch, m, n])
    return [batch, m, n]


@rule('baddbmm')
def _baddbmm(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _bmm(rec, out, a, b))


@rule('mv')
def _mv(rec, out, a, b):
    m, k = rec.labels_of(a)
    _contract_vector(rec, a, b, k, rec.labels_of(b)[0])
    return [m]


@rule('addmv')
def _addmv(rec, out, bias, a, b, **kwargs):
    return _add_bias(rec, bias, out, _mv(rec, out, a, b))


@rule('dot', 'vdot')
def _dot(rec, out, a, b):
    _contract_vector(rec, a, b, rec.labels_of(a)[0], rec.labels_of(b)[0])
    return []


def _add_bias(rec, bias: torch.Tensor, out: torch.Tensor, labels: Dims) -> Dims:
    for back, label in enumerate(reversed(rec.labels_of(bias)), 1):
        if bias.shape[-back] == out.shape[-back] > 1:
            labels[-back] = rec.labels.tie(labels[-back], label)
    return labels


@rule('convolution', '_convolution')
def _convolution(rec, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *args):
    x_labels, w_labels = rec.labels_of(x), rec.labels_of(weight)
    for label in w_labels[2:]:
        rec.labels.pin(label)

    if groups > 1:
        channels = (_transposed_groups if transposed else _groups)(rec, x, weight, groups)
    else:
        read, channels = (w_labels[0], w_labels[1]) if transposed else (w_labels[1], w_labels[0])
        weights = _weights(rec, x, weight)
        _contract(rec, x_labels[1], read, weights)
        _write(rec, None, channels, weights)
    if bias is not None:
        channels = rec.labels.tie(channels, rec.labels_of(bias)[0])

    spatial = [
        _slide(rec, label, same=x.shape[2 + i] == out.shape[2 + i]) for i, label in enumerate(x_labels[2:])
    ]
    result = [x_labels[0], channels, *spatial]  # heads may have been folded into the batch
    positions = (x if transposed else out).shape[2:]  # at each of these, the whole kernel is applied
    labels = x_labels[2:] if transposed else spatial
    rec.count_product(
        out,
        [(x.shape[0], x_labels[0]), *zip(weight.shape, w_labels), *zip(positions, labels)],
        result,
    )
    return result


@rule('torchvision::deform_conv2d')
def _deform_convolution(rec, out, x, weight, offset, mask, bias, *args):
    """A convolution whose kernel is moved by offsets, which are the same for all channels of a group."""
    groups, offset_groups = args[6:8]
    for tensor in (offset, mask):
        for label in rec.labels_of(tensor):
            rec.labels.pin(label)
    x_labels = rec.labels_of(x)
    if offset_groups > 1:
        rec.labels.pin(x_labels[1])
    stride, padding, dilation = (list(args[i:i + 2]) for i in (0, 2, 4))
    return _convolution(rec, out, x, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def _slide(rec, label: Label, same: bool) -> Label:
    """A convolution that slides over channels, as ECA's does: with some cut it still runs, on other neighbours."""
    if label is None or not same:
        rec.labels.pin(label)
        return None
    rec.labels.mark_inexact(label, 'a convolution slides over the channels')
    return label


def _groups(rec, x: torch.Tensor, weight: torch.Tensor, groups: int) -> Label:
    """What is cut together in a convolution in groups. Returns the label of the channels that it makes.

    In G groups, each of which reads i channels and makes o, the input has G·i channels, the weight has shape
    (G·o, i, …), and the output has G·o channels. Three cases:

    - *Depthwise* (i = 1): a channel of the input, which is a group, and the o channels that are made of it. In
      ``Conv2d(8, 16, groups=8)``: channel 3 of the input; rows 6 and 7 of the weight, which are channels 6 and 7 of
      the output.
    - *Many narrow groups*: whole groups. In ``Conv2d(128, 128, groups=32)`` of a ResNeXt, for group 3: channels 12 to
      15 of the input; rows 12 to 15 of the weight, which are channels 12 to 15 of the output.
    - *Few wide groups*: the same channels of every group. In ``Conv2d(128, 64, groups=2)``, for channel 5 of what each
      group reads: channels 5 and 64 + 5 of the input, and column 5 of the weight. For channel 7 of what each group
      makes: rows 7 and 32 + 7 of the weight, which are channels 7 and 32 + 7 of the output.

    So the input and the output are grids, of shapes (G, i) and (G, o), and both are cut along the same axis. The
    weight's second dim has the label of the input grid's second axis, so cutting channel 5 of every group cuts
    column 5.
    """
    in_channels, (out_channels, column) = rec.labels_of(x)[1], rec.labels_of(weight)[:2]
    in_per_group, out_per_group = weight.shape[1], weight.shape[0] // groups
    if in_channels is None or out_channels is None:
        for label in (in_channels, out_channels, column):
            rec.labels.pin(label)
        return None
    rec.mark_input(column)
    if in_per_group == 1:
        rec.labels.tie(np.repeat(in_channels, out_per_group), out_channels)
        rec.follow('groups', 0, in_channels)
        return out_channels
    group = rec.labels.fresh(groups)
    column = column if column is not None else rec.labels.fresh(in_per_group)
    _cut_in_groups(rec, group, [(in_channels, column), (out_channels, rec.labels.fresh(out_per_group))])
    return out_channels


def _transposed_groups(rec, x: torch.Tensor, weight: torch.Tensor, groups: int) -> Label:
    """As ``_groups``, for a transposed convolution.

    Its weight has shape (G·i, o, …): the channels of the input are its rows, and no dim of it has the G·o channels of
    the output, which get labels of their own. In ``ConvTranspose2d(128, 64, groups=32)``, whose weight has shape
    (128, 2, …), for group 3: channels 12 to 15 of the input, which are rows 12 to 15; channels 6 and 7 of the output.
    With one output channel per group, an output channel is a group.
    """
    in_channels, (row, column) = rec.labels_of(x)[1], rec.labels_of(weight)[:2]
    in_per_group, out_per_group = weight.shape[0] // groups, weight.shape[1]
    rec.labels.tie(in_channels, row)
    if in_per_group > 1:
        rec.mark_input(row)
    if row is None:
        rec.labels.pin(column)
        return None
    group = rec.labels.fresh(groups)
    out_channels = rec.labels.fresh(groups * out_per_group) if out_per_group > 1 else group
    in_of_group, out_of_group = rec.labels.fresh(in_per_group), rec.labels.fresh(out_per_group)
    if out_of_group is not None:
        rec.labels.tie(out_of_group, column)
    _cut_in_groups(rec, group, [(row, in_of_group), (out_channels, out_of_group)])
    return out_channels


def _cut_in_groups(rec, group: np.ndarray, sides: Sequence[Tuple[np.ndarray, Label]]) -> None:
    """Cut the input and the output of a convolution by whole groups, or in the same places of every group.

    Args:
        rec: The recorder.
        group: Label of the groups.
        sides: Pairs (label of all channels, label of those of one group, ``None`` if there is a single one).
    """
    rec.follow('groups', 0, group)
    grids = []
    for channels, member in sides:
        if member is None:
            rec.labels.tie(channels, group)
        else:
            grids.append(Grid(channels.reshape(len(group), len(member)), (group, member)))
    narrow = all(len(group) >= grid.nodes.shape[1] for grid in grids)
    rec.labels.add_reshape(Reshape.in_groups(grids, whole_groups=narrow))
