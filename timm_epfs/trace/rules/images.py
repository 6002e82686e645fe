"""Pooling, resizing, windows: operations on the height and width of an image."""
import numpy as np

from .base import RULES, Dims, axis, rule


def _spatial(n: int):
    """The rule of operations on the last ``n`` dims, which can't be cut."""
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
    """(B, C, H, W) → (B, C·k·k, L): each channel becomes k·k that go together."""
    label = rec.labels_of(x)[1]
    return [None, None if label is None else np.repeat(label, kernel_size[0] * kernel_size[1]), None]


@rule('col2im')
def _col2im(rec, out, x, output_size, kernel_size, *args):
    """(B, C·k·k, L) → (B, C, H, W)."""
    label = rec.labels_of(x)[1]
    if label is None:
        return [None] * out.ndim
    window = kernel_size[0] * kernel_size[1]
    return [None, rec.labels.split(label.reshape(-1, window))[0], None, None]


@rule('unfold')
def _unfold(rec, out, x, dim, size, step):
    labels = list(rec.labels_of(x))
    d = axis(dim, x.ndim)
    rec.labels.pin(labels[d])
    labels[d] = None
    return [*labels, None]


@rule('pixel_shuffle')
def _pixel_shuffle(rec, out, x, factor):
    """(…, C·r·r, H, W) → (…, C, H·r, W·r): the r·r channels that make one go together."""
    labels = list(rec.labels_of(x))
    if labels[-3] is not None:
        labels[-3] = rec.labels.split(labels[-3].reshape(-1, factor * factor))[0]
    return _without_positions(rec, labels)


@rule('pixel_unshuffle')
def _pixel_unshuffle(rec, out, x, factor):
    """(…, C, H·r, W·r) → (…, C·r·r, H, W): each channel becomes r·r that go together."""
    labels = list(rec.labels_of(x))
    labels[-3] = None if labels[-3] is None else np.repeat(labels[-3], factor * factor)
    return _without_positions(rec, labels)


def _without_positions(rec, labels: Dims) -> Dims:
    for label in labels[-2:]:
        rec.labels.pin(label)
    return [*labels[:-2], None, None]


@rule('grid_sampler_2d', 'grid_sampler_3d', 'torchvision::roi_align', 'torchvision::roi_pool')
def _channels_only(rec, out, x, *args, **kwargs):
    labels = rec.labels_of(x)
    for label in (labels[0], *labels[2:], *(label for t in rec.tensors(args) for label in rec.labels_of(t))):
        rec.labels.pin(label)
    result = [None, labels[1], *[None] * (x.ndim - 2)]
    return [result, [None] * out[1].ndim] if isinstance(out, tuple) else result


@rule('affine_grid_generator')
def _affine_grid(rec, out, theta, *args):
    """A matrix for each image → the coordinates at which it is sampled."""
    batch, *matrix = rec.labels_of(theta)
    for label in matrix:
        rec.labels.pin(label)
    return [batch, *[None] * (out.ndim - 1)]


@rule('max_unpool2d', 'max_unpool3d')
def _max_unpool(rec, out, x, indices, *args):
    channels = rec.labels.tie(rec.labels_of(x)[-out.ndim + 1], rec.labels_of(indices)[-out.ndim + 1])
    return [None, channels, *[None] * (out.ndim - 2)]
