"""Keywords that no function takes."""
from inspect import signature
from typing import Any, Callable, List, Mapping, Optional

from .errors import PruningError
from .text import nearest

__all__ = ['nearest_keyword', 'refuse_unknown']


def nearest_keyword(name: str, *functions: Callable) -> Optional[str]:
    """The parameter of these functions that is most like a name; None where none is alike."""
    return next(iter(nearest(name, _parameters(*functions), cutoff=0.75)), None)


def refuse_unknown(given: Mapping[str, Any], *functions: Callable) -> None:
    """Raise ``PruningError`` where keywords are left over that no parameter of the functions took.

    >>> def cut(model, exclude=(), **unknown):
    ...     refuse_unknown(unknown, cut)
    >>> cut(None, exlude=['layer1'])
    Traceback (most recent call last):
        ...
    timm_epfs.core.errors.PruningError: unknown keyword exlude=; did you mean exclude=?

    Args:
        given: Keywords that were left over.
        *functions: Whose parameters there are to choose from.
    """
    for name in given:
        near = nearest_keyword(name, *functions)
        hint = f'did you mean {near}=?' if near else f'known are {", ".join(_parameters(*functions))}'
        raise PruningError(f'unknown keyword {name}=; {hint}')


def _parameters(*functions: Callable) -> List[str]:
    """Names of what may be given by keyword."""
    found = [p for f in functions for p in signature(f).parameters.values()]
    variable = (found[0].VAR_KEYWORD, found[0].VAR_POSITIONAL) if found else ()
    return sorted({p.name for p in found if p.kind not in variable} - {'self'})
