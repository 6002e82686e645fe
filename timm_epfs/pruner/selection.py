"""``exclude=``, ``only=`` and ``kinds=``: the structures that a user allows to be cut."""
from typing import Collection, Sequence, Set

from ..core import Structure, check_patterns
from ..trace import Trace

__all__ = ['describe_nothing', 'left_alone']


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


def describe_nothing(traced: Trace) -> str:
    """Why nothing of a model may be cut."""
    if traced.structures:
        return 'exclude=, only= and kinds= leave out every structure; loosen them'
    places = '; '.join(f'{s.where} ({s.why})' for s in traced.skipped[:3])
    return f'no structure of this model can be cut{": " + places if places else ""}'
