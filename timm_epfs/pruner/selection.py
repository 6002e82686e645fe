"""``exclude=``, ``only=`` and ``kinds=``: the structures that a user allows to be cut."""
from typing import Collection, Sequence, Set

from ..core import PruningError, Structure
from ..trace import Trace

__all__ = ['check_patterns', 'describe_nothing', 'left_alone']


def left_alone(
        structures: Sequence[Structure],
        exclude: Sequence[str],
        only: Sequence[str],
        kinds: Collection[str],
) -> Set[str]:
    """Names of the structures that may not be cut.

    Args:
        structures: All structures that can be cut.
        exclude: Patterns of structures that may not be cut, as ``Structure.matches`` reads them.
        only: Patterns of the only structures that may be cut. Empty: all may be.
        kinds: Kinds that may be cut.

    Raises:
        PruningError: ``exclude`` or ``only`` is not a list, or a pattern matches no structure.
    """
    check_patterns('exclude', exclude, structures)
    check_patterns('only', only, structures)
    return {
        s.name for s in structures
        if s.kind not in kinds
        or any(s.matches(pattern) for pattern in exclude)
        or (only and not any(s.matches(pattern) for pattern in only))
    }


def check_patterns(option: str, patterns: Sequence[str], structures: Sequence[Structure]) -> None:
    """Raise ``PruningError`` where an option is not a list of patterns, or a pattern matches no structure."""
    if isinstance(patterns, str):
        raise PruningError(f'{option}={patterns!r} was given; give a list of patterns: {option}=[{patterns!r}]')
    for pattern in patterns:
        if not any(s.matches(pattern) for s in structures):
            raise PruningError(
                f'{option}: nothing that can be cut is named {pattern!r}; timm_epfs.inspect lists the names, such as '
                f'{", ".join(s.name for s in structures[:3])}')


def describe_nothing(traced: Trace) -> str:
    """Why nothing of a model may be cut."""
    if traced.structures:
        return 'exclude=, only= and kinds= leave out every structure; loosen them'
    places = '; '.join(f'{s.where} ({s.why})' for s in traced.skipped[:3])
    return f'no structure of this model can be cut{": " + places if places else ""}'
