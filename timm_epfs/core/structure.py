"""``Structure``: what can be cut, as plain data.

A *unit* is the smallest part that can be cut: a channel, an attention head, one dim of every head of a layer, a
convolution group, or a residual block. A *structure* is a set of units that occupy the same dims of the same tensors.
Structures hold names of tensors, not tensors. So a structure that was found on one copy of a model is valid for any
other copy, on any device, in any process.
"""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Collection, Iterable, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from .errors import PruningError
from .text import nearest

__all__ = ['DEFAULT_KINDS', 'KINDS', 'Member', 'Size', 'Structure', 'check_patterns', 'kinds_named', 'pattern_list']

KINDS = ('channels', 'heads', 'head_dims', 'groups', 'blocks')
DEFAULT_KINDS = ('channels', 'heads', 'head_dims', 'groups')  # blocks only on request, or to meet a latency
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

    @property
    def owner(self) -> str:
        """Name of the module that has the tensor; of what a parametrisation computes a weight from, of its layer."""
        layer, parametrized, _ = self.tensor.partition('.parametrizations.')
        return layer if parametrized else self.tensor.rpartition('.')[0]


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

    @property
    def layers(self) -> Set[str]:
        """Names by which patterns find this structure: a block's own, or those of all layers that output its units."""
        if self.kind == 'blocks':
            return {self.name}
        return {self.name, self.name.partition('#')[0], *(m.owner for m in self.members if m.role == 'out')}

    def matches(self, pattern: str) -> bool:
        """Whether a pattern matches this structure.

        A block is matched by its name. Any other structure is matched by the name of each layer whose output channels
        are its units. The name of a module that holds them matches, too.

        >>> conv = Structure('layer1.0.conv1', 'channels', 16, ())
        >>> [conv.matches(pattern) for pattern in ('layer1', 'layer?.0', '*.conv1', 'layer2')]
        [True, True, True, False]

        Args:
            pattern: A name of a layer or module, with or without wildcards.
        """
        names = {name for layer in self.layers for name in _with_parents(layer)}
        return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _with_parents(name: str) -> Iterable[str]:
    """The name of a module, and those of all modules that it is in.

    >>> list(_with_parents('layer1.0.conv1'))
    ['layer1', 'layer1.0', 'layer1.0.conv1']
    """
    return accumulate(name.split('.'), '{}.{}'.format)


def pattern_list(option: str, patterns: Optional[Iterable[str]]) -> Tuple[str, ...]:
    """The patterns that an option was given; None stands for no patterns.

    Raises:
        PruningError: It isn't a list of texts.
    """
    if patterns is None:
        return ()
    if isinstance(patterns, str):
        raise PruningError(f'{option}={patterns!r} was given; give a list of patterns: {option}=[{patterns!r}]')
    given = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    for pattern in given:
        if not isinstance(pattern, str):
            raise PruningError(
                f'{option}= holds an object of type {type(pattern).__name__}; give a list of names, as in '
                f'{option}=[\'layer1\']')
    return given


def check_patterns(
        option: str,
        patterns: Iterable[str],
        structures: Sequence[Structure],
        uncut: Collection[str] = (),
        because_of: str = '',
) -> None:
    """Raise ``PruningError`` where a pattern matches no structure, or only structures that aren't cut anyway.

    >>> check_patterns('exclude', ['layr1'], [Structure('layer1.0.conv1', 'channels', 16, ())])
    Traceback (most recent call last):
        ...
    timm_epfs.core.errors.PruningError: exclude: nothing that can be cut is named 'layr1'; did you mean 'layer1'? \
timm_epfs.inspect lists the names

    Args:
        option: Name of the option, for the message.
        patterns: Patterns as ``Structure.matches`` reads them.
        structures: What can be cut.
        uncut: Names of those structures that other options leave uncut.
        because_of: These options, for the message.
    """
    for pattern in patterns:
        matched = [s for s in structures if s.matches(pattern)]
        if not matched:
            raise PruningError(f'{option}: {_why_unmatched(pattern, structures)}')
        if all(s.name in uncut for s in matched):
            kinds = ' and '.join(dict.fromkeys(s.kind for s in matched))
            raise PruningError(
                f'{option}: {pattern!r} matches only {kinds}, which stay uncut because of {because_of}; leave the '
                f'pattern out, or change that')


def _why_unmatched(pattern: str, structures: Sequence[Structure]) -> str:
    """What to say of a pattern that matches no structure."""
    followers = [(m.role, s.name) for s in structures for m in s.members if pattern in _with_parents(m.owner)]
    if 'in' in {role for role, _ in followers}:
        return f'the outputs of {pattern!r} are never cut, only what it reads; leave it out'
    if followers:
        return f'the outputs of {pattern!r} follow those of {followers[0][1]!r}; give that name instead'
    names = {name for s in structures for layer in s.layers for name in _with_parents(layer)}
    near = [] if set(pattern) & set('*?[') else nearest(pattern.strip('.'), sorted(names))
    hint = (
        f'did you mean {near[0]!r}? timm_epfs.inspect lists the names' if near else
        f'timm_epfs.inspect lists the names, such as {", ".join(s.name for s in structures[:3])}')
    return f'nothing that can be cut is named {pattern!r}; {hint}'


def kinds_named(names: Sequence[str]) -> Tuple[str, ...]:
    """Check names of kinds, and replace the synonyms ``'filters'`` and ``'neurons'`` by ``'channels'``.

    >>> kinds_named(['filters', 'blocks'])
    ('channels', 'blocks')

    Raises:
        PruningError: There is no such kind, the list is empty, or a text was given in place of a list.
    """
    if isinstance(names, str) or not isinstance(names, Iterable) or not names:
        example = names if isinstance(names, str) and names else 'channels'
        raise PruningError(f'kinds={names!r} was given; give a list, as in kinds=[{example!r}]')
    known = (*KINDS, *_SYNONYMS)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f'did you mean {near[0]!r}? All are' if near else 'choose from'
            raise PruningError(f'kinds: there is no kind {name!r}; {hint} {", ".join(known)}')
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
