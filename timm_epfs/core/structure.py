"""``Structure``: what can be cut, as plain data.

A *unit* is the smallest part that can be cut: a channel, an attention head, one dim of every head of a layer, a
convolution group, or a residual block. A *structure* is a set of units that occupy the same dims of the same tensors.
Structures hold names of tensors, not tensors. So a structure that was found on one copy of a model is valid for any
other copy, on any device, in any process.
"""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Iterable, Mapping, Optional, Sequence, Tuple

import numpy as np

from .errors import PruningError
from .text import nearest

__all__ = ['DEFAULT_KINDS', 'KINDS', 'Member', 'Size', 'Structure', 'check_patterns', 'kinds_named']

KINDS = ('channels', 'heads', 'head_dims', 'groups', 'blocks')
DEFAULT_KINDS = ('channels', 'heads', 'head_dims', 'groups')  # whole blocks are cut only on request
_SYNONYMS = {'filters': 'channels', 'neurons': 'channels'}  # as papers call them


@dataclass(frozen=True, eq=False)
class Member:
    """The entries of one dim of one tensor that a structure's units own.

    Attributes:
        tensor: Name of a parameter or buffer, as in ``named_parameters()`` and ``named_buffers()``.
        dim: The dim of the tensor.
        role: ``'out'`` for a layer's output dim; ``'in'`` for a layer's input dim, which is contracted with the
            activation, so that a zero there silences the unit for that layer; ``'per'`` for dims with one value per
            unit (normalisations, biases, scales).
        index: Entries of the dim that each unit owns, shape (units, k), int64. Cutting unit ``u`` removes row ``u``.
        length: Length of the dim, where some of its entries belong to no unit. None where all belong to one.
    """
    tensor: str
    dim: int
    role: str
    index: np.ndarray
    length: Optional[int] = None


@dataclass(frozen=True, eq=False)
class Structure:
    """A set of units that occupy the same dims of the same tensors.

    Attributes:
        name: Name of the module whose output the units are; with ``#2``, ``#3`` … where one module has several.
        kind: One of ``KINDS``.
        units: Number of units.
        members: Every tensor dim that gets shorter when a unit is cut.
        exact: Whether setting a unit to zero for the layers that read it and cutting it give the same outputs.
        reason: Why not, where it isn't exact.
        stream: Whether it is a residual stream that is normalised over its channels (ViT, ConvNeXt).
        shortcut: For a block: its children that take its place when it is cut, in the order in which they run. Empty:
            the identity does.
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
        """Whether a pattern matches this structure.

        A block is matched by its name. Any other structure is matched by the name of each layer whose output channels
        are its units.

        Args:
            pattern: A name, the prefix of a module (``'layer1'`` for everything in it), or a name with wildcards
                (``'*.conv3'``).
        """
        names = {self.name}
        if self.kind != 'blocks':
            names.add(self.name.partition('#')[0])
            names.update(m.tensor.rpartition('.')[0] for m in self.members if m.role == 'out')
        return any(name == pattern or name.startswith(f'{pattern}.') or fnmatchcase(name, pattern) for name in names)


def check_patterns(option: str, patterns: Iterable[str], structures: Sequence[Structure]) -> None:
    """Raise ``PruningError`` where an option is not a list of patterns, or a pattern matches no structure.

    >>> check_patterns('exclude', ['layr1'], [Structure('layer1.0.conv1', 'channels', 16, ())])
    Traceback (most recent call last):
        ...
    timm_epfs.core.errors.PruningError: exclude: nothing that can be cut is named 'layr1'; did you mean 'layer1'? \
timm_epfs.inspect lists the names

    Args:
        option: Name of the option, for the message.
        patterns: Patterns as ``Structure.matches`` reads them.
        structures: What can be cut.
    """
    if isinstance(patterns, str):
        raise PruningError(f'{option}={patterns!r} was given; give a list of patterns: {option}=[{patterns!r}]')
    for pattern in patterns:
        if not any(s.matches(pattern) for s in structures):
            prefixes = {s.name.rsplit('.', i)[0] for s in structures for i in range(s.name.count('.') + 1)}
            near = nearest(pattern, sorted(prefixes))
            raise PruningError(
                f'{option}: nothing that can be cut is named {pattern!r}; '
                + (f'did you mean {near[0]!r}? timm_epfs.inspect lists the names' if near else
                   f'timm_epfs.inspect lists the names, such as {", ".join(s.name for s in structures[:3])}'))


def kinds_named(names: Sequence[str]) -> Tuple[str, ...]:
    """Check names of kinds, and replace the synonyms ``'filters'`` and ``'neurons'`` by ``'channels'``.

    >>> kinds_named(['filters', 'blocks'])
    ('channels', 'blocks')

    Raises:
        PruningError: There is no such kind, the list is empty, or a text was given in place of a list.
    """
    if isinstance(names, str) or not names:
        raise PruningError(f'kinds={names!r} was given; give a list, as in kinds=[\'channels\']')
    for name in names:
        if name not in KINDS and name not in _SYNONYMS:
            raise PruningError(f'kinds: there is no kind {name!r}; choose from {", ".join((*KINDS, *_SYNONYMS))}')
    return tuple(dict.fromkeys(_SYNONYMS.get(name, name) for name in names))


@dataclass(frozen=True)
class Size:
    """The length of a dim as a function of how many units each structure keeps: ``const + Σ coef · units left``.

    A concatenation of 3 input channels with two copies of the channels of ``conv``, of which 10 are left:

    >>> Size(3, (('conv', 2),))({'conv': 10})
    23
    """
    const: int
    coefs: Tuple[Tuple[str, int], ...] = ()

    def __call__(self, left: Mapping[str, int]) -> int:
        """The length, given the number of units left by structure name."""
        return self.const + sum(coef * left[name] for name, coef in self.coefs)
