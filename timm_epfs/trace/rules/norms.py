"""Normalisations and reductions: cutting one entry may change what becomes of others."""
import torch

from ..reshapes import Grid, Reshape
from .base import axes, axis, elementwise, rule


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
    for i, label in enumerate(labels):  # standardisation of a weight: its statistics are over all dims but the second
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
        group, member = rec.labels.fresh(groups), rec.labels.fresh(c // groups)
        rec.follow('num_groups', 0, group)
        rec.labels.mark_inexact(member, 'normalised over groups of channels')
        grid = Grid(labels[1].reshape(groups, -1), (group, member))
        rec.labels.add_reshape(Reshape.in_groups([grid], whole_groups=True))
    return [labels]


@rule('_weight_norm_interface', '_weight_norm')
def _weight_norm(rec, out, v, g, dim=0):
    """``g · v / ‖v‖``, with a norm for each entry of one dim. Entries that are zero or gone add as little to it."""
    labels, of_norm = list(rec.labels_of(v)), [None] * g.ndim
    of_norm[dim] = labels[dim] = rec.labels.tie(labels[dim], rec.labels_of(g)[dim])
    return [labels, of_norm] if isinstance(out, tuple) else labels


@rule('mean', 'sum', 'var', 'std', 'var_mean', 'amax', 'amin', 'linalg_vector_norm', 'norm', 'logsumexp', 'prod', 'any',
      'all', 'max', 'min', 'argmax', 'argmin', 'nansum', 'aminmax', 'std_mean')
def _reduce(rec, out, x, *args, **kwargs):
    if rec.name in ('linalg_vector_norm', 'norm'):
        args = args[1:]
    if rec.name in ('max', 'min') and args and isinstance(args[0], torch.Tensor):
        return elementwise(rec, (x, args[0]), out)
    dims = axes(kwargs.get('dim', args[0] if args else None), x.ndim)
    first = out[0] if isinstance(out, (tuple, list)) else out
    keep = first.ndim == x.ndim
    reason = 'weights are standardised over their inputs' if rec.is_weight(x) else f'{rec.name} over the channels'
    result = []
    for d, label in enumerate(rec.labels_of(x)):
        if d in dims:
            rec.mark_inexact_if_read(out, label, reason)
            result += [None] if keep else []
        else:
            result.append(label)
    return [result] * len(out) if isinstance(out, (tuple, list)) else result


@rule('_softmax', '_log_softmax', 'cumsum', 'cumprod', 'sort', 'topk', '_safe_softmax')
def _along(rec, out, x, *args, **kwargs):
    """Along the dim, entries depend on the number or on the order of the others: none may go."""
    dim = kwargs.get('dim', args[1] if rec.name == 'topk' and len(args) > 1 else args[0] if args else -1)
    dim = dim if rec.name != 'topk' or len(args) > 1 or 'dim' in kwargs else -1
    labels = list(rec.labels_of(x))
    d = axis(dim, x.ndim) if isinstance(dim, int) and not isinstance(dim, bool) else x.ndim - 1
    rec.labels.pin(labels[d])
    labels[d] = None
    return [labels] * len(out) if isinstance(out, (tuple, list)) else labels
