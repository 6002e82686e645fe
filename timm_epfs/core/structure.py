"""What can be cut, as plain data.

A *unit* is the smallest thing that stands or falls as a whole: a channel, an attention head or one dim of every head of
a layer, a convolution group, a residual block. A
*structure* is a run of units that occupy the same dims of the same tensors. Everything here is named, not held: a
structure found on one copy of a model is good for any other copy, on any device, in any process.
"""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Mapping, Optional, Sequence, Tuple

import numpy as np

from .errors import PruningError

__all__ = ['DEFAULT_KINDS', 'KINDS', 'Member', 'Size', 'Structure', 'kinds_named']

KINDS = ('channels', 'heads', 'head_dims', 'groups', 'blocks')
DEFAULT_KINDS = ('channels', 'heads', 'head_dims', 'groups')  # whole blocks go only where they are named
_SYNONYMS = {'filters': 'channels', 'neurons': 'channels'}  # the papers' words


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

    def matches(self, pattern: str) -> bool:
        """Whether a pattern names this structure: by a layer whose output its units are, or a block by its own name.

        A pattern is a name, the prefix of a module (``'layer1'`` for all that is in it), or has wildcards
        (``'*.conv3'``).
        """
        names = {self.name}
        if self.kind != 'blocks':
            names.add(self.name.partition('#')[0])
            names.update(m.tensor.rpartition('.')[0] for m in self.members if m.role == 'out')
        return any(name == pattern or name.startswith(f'{pattern}.') or fnmatchcase(name, pattern) for name in names)


def kinds_named(names: Sequence[str]) -> Tuple[str, ...]:
    """Kinds of structures by their names, ``'filters'`` and ``'neurons'`` for ``'channels'`` among them.

    >>> kinds_named(['filters', 'blocks'])
    ('channels', 'blocks')

    Raises:
        PruningError: There is no such kind, or a text was given in place of a list.
    """
    if isinstance(names, str) or not names:
        raise PruningError(f'kinds={names!r} was given; give a list, as in kinds=[\'channels\']')
    for name in names:
        if name not in KINDS and name not in _SYNONYMS:
            raise PruningError(f'kinds: there is no kind {name!r}; choose among {", ".join((*KINDS, *_SYNONYMS))}')
    return tuple(dict.fromkeys(_SYNONYMS.get(name, name) for name in names))


@dataclass(frozen=True)
class Size:
    """The length of a dim as a function of how many units each structure keeps: ``const + Σ coef · units left``."""
    const: int
    coefs: Tuple[Tuple[str, int], ...] = ()

    def __call__(self, left: Mapping[str, int]) -> int:
        """The length where so many units are left, by structure name."""
        return self.const + sum(coef * left[name] for name, coef in self.coefs)
