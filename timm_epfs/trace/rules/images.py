"""Pooling, resizing, windows: operations on the height and width of an image."""
import numpy as np

from .base import RULES, axis, opaque, rule


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


@rule('pixel_shuffle', 'pixel_unshuffle', 'grid_sampler_2d')
def _channels_only(rec, out, x, *args, **kwargs):
    if rec.name == 'grid_sampler_2d':
        return [None, rec.labels_of(x)[1], None, None]
    opaque(rec, (x,), out)
    return [None] * out.ndim
