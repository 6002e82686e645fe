"""Errors for unknown keywords, which name the nearest known one."""
from inspect import Parameter, signature
from typing import Any, Callable, List, Mapping, Optional, Sequence

from .errors import PruningError
from .text import nearest

__all__ = ['nearest_keyword', 'refuse_unknown']


def nearest_keyword(name: str, *functions: Callable) -> Optional[str]:
    """The parameter of these functions that is most similar to a name, or None where none is similar."""
    return next(iter(nearest(name, _parameters(*functions), cutoff=0.75)), None)


def refuse_unknown(given: Mapping[str, Any], *functions: Callable, related: Sequence[Callable] = ()) -> None:
    """Raise ``PruningError`` if there are keywords that no parameter of the functions took.

    >>> def cut(model, exclude=(), **unknown):
    ...     refuse_unknown(unknown, cut)
    >>> cut(None, exlude=['layer1'])
    Traceback (most recent call last):
        ...
    timm_epfs.core.errors.PruningError: unknown keyword exlude=; did you mean exclude=?

    Args:
        given: The keywords that were left over, with their values.
        *functions: Functions whose parameters are known keywords.
        related: Functions whose parameters may also have been meant, though they are given elsewhere.

    Raises:
        PruningError: ``given`` is not empty. The message names the nearest keyword, or all that are known.
    """
    for name in given:
        near = nearest_keyword(name, *functions, *related)
        hint = f'did you mean {near}=?' if near else f'known are {", ".join(_parameters(*functions))}'
        raise PruningError(f'unknown keyword {name}=; {hint}')


def _parameters(*functions: Callable) -> List[str]:
    """Names of the parameters that can be given by keyword."""
    parameters = [p for function in functions for p in signature(function).parameters.values()]
    variadic = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return sorted({p.name for p in parameters if p.kind not in variadic} - {'self'})
