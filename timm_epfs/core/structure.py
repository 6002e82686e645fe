"""What can be cut, as plain data.

A *unit* is the smallest thing that stands or falls as a whole: a channel, an attention head or one dim of every head of
a layer, a convolution group, a residual block. A
*structure* is a run of units that occupy the same dims of the same tensors. Everything here is named, not held: a
structure found on one copy of a model is good for any other copy, on any device, in any process.
"""
from dataclasses import dataclass
from typing import Mapping, Optional, Tuple

import numpy as np

__all__ = ['Member', 'Size', 'Structure', 'KINDS']

KINDS = ('channels', 'heads', 'head_dims', 'groups', 'blocks')


@dataclass(frozen=True, eq=False)
class Member:
    """The entries of one dim of one tensor that a structure's units own.

    Attributes:
        tensor: Name of a parameter or buffer, as in ``named_parameters()`` and ``named_buffers()``.
        dim: Which dim of the tensor.
        role: ``'out'`` a layer's output dim, ``'in'`` a layer's input dim (contracted with the activation, so that a
            zero there silences the unit for that layer), ``'per'`` one value a unit (norms, biases, scales).
        index: Entries of the dim by unit, shape (units, k), int64. Row ``u`` goes when unit ``u`` goes.
        length: Length of the dim, where some of its entries can't go with any unit; None where all can.
    """
    tensor: str
    dim: int
    role: str
    index: np.ndarray
    length: Optional[int] = None


@dataclass(frozen=True, eq=False)
class Structure:
    """Units that are cut in the same places.

    Attributes:
        name: Name of the module whose output the units are, with ``#2``, ``#3`` … where one module has several.
        kind: One of ``KINDS``.
        units: Number of units.
        members: Every tensor dim that follows.
        exact: True where zeroing a unit for its consumers and cutting it give the same outputs.
        reason: Where not exact, why.
        stream: True for a residual stream that is normalised over its channels (ViT, ConvNeXt): cut only on request.
        shortcut: Of a block: its children that take its place when it goes, in the order they run. None: the identity.
    """
    name: str
    kind: str
    units: int
    members: Tuple[Member, ...]
    exact: bool = True
    reason: str = ''
    stream: bool = False
    shortcut: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """The length of a dim as a function of how many units each structure keeps: ``const + Σ coef · units left``."""
    const: int
    coefs: Tuple[Tuple[str, int], ...] = ()

    def __call__(self, left: Mapping[str, int]) -> int:
        """The length where so many units are left, by structure name."""
        return self.const + sum(coef * left[name] for name, coef in self.coefs)
