"""Calls of functions that are linear in a weight (linear layers, convolutions), and what they read as rows.

A row holds whatever one output position reads. So every such call is a matrix product, rows (rows, features) times
weight (features, outputs), one per group:

=====================  ==================================  ============================
call                   features                            outputs
=====================  ==================================  ============================
linear                 input features                      output features
convolution            channels of a group × kernel        output channels of the group
transposed convolution channels of a group × kernel        output channels of the group
=====================  ==================================  ============================
"""
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['LINEAR_FUNCTIONS', 'LinearCall', 'empty']

_CONVOLUTION = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
_TRANSPOSED = ('input', 'weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation')
# Names of the arguments, in their order, by function.
LINEAR_FUNCTIONS: Dict[Callable, Tuple[str, ...]] = {
    F.linear: ('input', 'weight', 'bias'),
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.conv_transpose1d: _TRANSPOSED,
    F.conv_transpose2d: _TRANSPOSED,
    F.conv_transpose3d: _TRANSPOSED,
}
_TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One call of a function in ``LINEAR_FUNCTIONS``.

    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> call = LinearCall(F.conv2d, {'input': image, 'weight': torch.ones(1, 1, 2, 2), 'stride': 2}, images=1)
    >>> call.positions  # 2 x 2
    4
    >>> call.rows(torch.tensor([0, 3])).squeeze()  # the first and the last
    tensor([[ 0.,  1.,  4.,  5.],
            [10., 11., 14., 15.]])

    Args:
        function: The function.
        args: Its arguments by name.
        images: Number of images in the batch.
    """
    function: Callable
    args: Dict[str, Any]
    images: int

    @property
    def input(self) -> Tensor:
        """What it reads."""
        return self.args['input']

    def without_input(self) -> 'LinearCall':
        """The call with an input that has no entries, so that it keeps no memory."""
        return replace(self, args={**self.args, 'input': empty(self.input)})

    @property
    def weight(self) -> Tensor:
        """The weight."""
        return self.args['weight']

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias."""
        return self.args.get('bias')

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.args.get('groups', 1)

    @property
    def channels(self) -> int:
        """Number of channels or features that it reads."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.function in _TRANSPOSED_FUNCTIONS

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed or not."""
        return self.function is not F.linear

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as a matrix, shape (groups, features, outputs)."""
        if not self.is_convolution:
            return weight.t()[None]
        if self.transposed:
            grouped = weight.reshape(self.groups, -1, weight.shape[1], prod(weight.shape[2:]))
            return grouped.transpose(2, 3).flatten(1, 2)
        return weight.reshape(self.groups, -1, prod(weight.shape[1:])).transpose(1, 2)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        shape = self.weight.shape
        if self.transposed:
            split = matrix.reshape(self.groups, -1, prod(shape[2:]), shape[1])
            return split.transpose(2, 3).reshape(shape)
        return matrix.transpose(1, 2).reshape(shape)

    @property
    def positions(self) -> int:
        """Number of output positions of one image."""
        return prod(self.output_size()) if self.is_convolution else prod(self.input.shape[:-1]) // self._leading

    @property
    def _leading(self) -> int:
        """Length of the dim that images are told apart by; 1 where the input isn't ordered by images."""
        length = self.input.shape[0] if self.input.ndim > 1 else 1
        return self.images if length % self.images == 0 else 1

    def outputs(self, rows: Tensor) -> Tensor:
        """What it returns for some of its rows, shape (images, positions, channels).

        Args:
            rows: Rows, shape (groups, images, positions, features).
        """
        outputs = rows @ self.matrix(self.weight)[:, None]
        outputs = outputs.permute(1, 2, 0, 3).flatten(2)
        return outputs if self.bias is None else outputs + self.bias

    def grouped(self, outputs: Tensor) -> Tensor:
        """Outputs with the last dim split by groups, shape (groups, images, positions, outputs of a group)."""
        return outputs.unflatten(-1, (self.groups, -1)).permute(2, 0, 1, 3)

    def rows(self, at: Tensor) -> Tensor:
        """What some output positions read, as rows, shape (groups, images, positions, features).

        Args:
            at: Positions, shape (positions,).
        """
        inputs = self.input
        if not self.is_convolution:
            return inputs.reshape(self._leading, -1, inputs.shape[-1])[:, at][None]
        table, valid = self._sources(at.cpu().numpy())
        flat = inputs.flatten(2)
        taken = flat[:, :, torch.from_numpy(table.ravel()).to(flat.device)].unflatten(2, table.shape)
        if not valid.all():
            taken = taken * torch.from_numpy(valid).to(taken)
        images, channels, positions, kernel = taken.shape
        grouped = taken.view(images, self.groups, channels // self.groups, positions, kernel)
        return grouped.permute(1, 0, 3, 2, 4).flatten(3)

    def output_size(self) -> Tuple[int, ...]:
        """Spatial size of the output of a convolution; empty for a linear layer."""
        if not self.is_convolution:
            return ()
        kernel, (stride, padding, dilation) = self.weight.shape[2:], self._geometry()
        size = self.input.shape[2:]
        if self.transposed:
            extra = _tuple(self.args.get('output_padding', 0), len(kernel))
            return tuple(
                (n - 1) * s - 2 * p[0] + d * (k - 1) + e + 1
                for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra))
        return tuple(
            (n + sum(p) - d * (k - 1) - 1) // s + 1 for n, s, p, d, k in zip(size, stride, padding, dilation, kernel))

    def _geometry(self) -> Tuple[Tuple[int, ...], Tuple[Tuple[int, int], ...], Tuple[int, ...]]:
        """Stride, padding before and after, and dilation, one for each spatial dim."""
        kernel = self.weight.shape[2:]
        stride, dilation = (_tuple(self.args.get(name, 1), len(kernel)) for name in ('stride', 'dilation'))
        padding = self.args.get('padding', 0)
        if padding == 'same':
            totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
            return stride, tuple((total // 2, total - total // 2) for total in totals), dilation
        padding = _tuple(0 if padding == 'valid' else padding, len(kernel))
        return stride, tuple((p, p) for p in padding), dilation

    def _sources(self, at: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """The input position that each output position reads at each place of the kernel, and whether there is one.

        Both have the shape (positions, kernel).
        """
        kernel, size = self.weight.shape[2:], self.input.shape[2:]
        stride, padding, dilation = self._geometry()
        places = np.array(list(product(*map(range, kernel))))  # (kernel, dims)
        outputs = np.stack(np.unravel_index(at, self.output_size()), axis=-1)  # (positions, dims)
        before, dilated = np.array([p[0] for p in padding]), places * np.array(dilation)
        if self.transposed:
            scaled = outputs[:, None] + before - dilated
            sources, valid = scaled // stride, (scaled % stride == 0).all(-1)
        else:
            sources, valid = outputs[:, None] * np.array(stride) - before + dilated, True
        valid = valid & ((sources >= 0) & (sources < np.array(size))).all(-1)
        sources = np.where(valid[..., None], sources, 0)
        return np.ravel_multi_index(np.moveaxis(sources, -1, 0), size), valid


def empty(tensor: Tensor) -> Tensor:
    """A tensor without entries. A slice would keep the memory of the whole tensor."""
    return tensor.new_empty((0, *tensor.shape[1:]))


def _tuple(value: Any, length: int) -> Tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * length if len(values) == 1 else values
