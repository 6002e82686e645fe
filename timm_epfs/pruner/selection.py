"""``exclude=``, ``only=``, ``kinds=`` and ``streams=``: the structures that a user allows to be cut."""
from typing import Collection, Optional, Sequence, Set, Tuple

from ..core import PruningError, Structure, check_patterns, first_few, kinds_named, pattern_list
from ..trace import Trace

__all__ = ['checked_options', 'describe_nothing', 'left_alone']

Patterns = Tuple[str, ...]


def checked_options(
        exclude: Optional[Sequence[str]],
        only: Optional[Sequence[str]],
        kinds: Sequence[str],
        streams: Optional[bool],
) -> Tuple[Patterns, Patterns, Tuple[str, ...], Optional[bool]]:
    """The four options as a ``Pruner`` keeps them, checked as far as is possible without the model.

    Raises:
        PruningError: One of them is not what ``prune`` takes.
    """
    patterns = pattern_list('exclude', exclude), pattern_list('only', only)
    if only is not None and not patterns[1]:
        raise PruningError(f'only={only!r} was given, which leaves nothing to cut; give patterns, or None to cut all')
    if streams is not None and not isinstance(streams, bool):
        raise PruningError(
            f'streams={streams!r} was given; give True, False, or None (only if the budget can\'t be met otherwise)')
    return (*patterns, kinds_named(kinds), streams)


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
        PruningError: A pattern matches no structure, or only structures of other kinds.
    """
    of_other_kinds = {s.name for s in structures if s.kind not in kinds}
    check_patterns('exclude', exclude, structures, of_other_kinds, 'kinds=')
    check_patterns('only', only, structures, of_other_kinds, 'kinds=')
    return of_other_kinds | {
        s.name for s in structures
        if any(s.matches(pattern) for pattern in exclude)
        or (only and not any(s.matches(pattern) for pattern in only))
    }


def describe_nothing(traced: Trace, exclude: Sequence[str], only: Sequence[str], kinds: Sequence[str]) -> str:
    """Why nothing of a model may be cut, given the options of its pruner."""
    found = sorted({s.kind for s in traced.structures})
    if set(found) & set(kinds):
        given = ' and '.join(name for name, value in (('exclude=', exclude), ('only=', only)) if value)
        return f'{given or "an earlier cut"} leaves out every structure; loosen it'
    if found:
        return f'this model has {" and ".join(found)} to cut, and kinds= leaves them out; give kinds={found}'
    places = [f'{s.where} ({s.why})' for s in traced.skipped]
    places = places or [f'{name} is fixed by {why}' for name, (_, why) in traced.fixed.items()]
    if not places:
        return 'this model has no layers to cut'
    return f'no structure of this model can be cut: {first_few(places)}'
