"""Warnings that point at the user's code."""
import sys
import warnings

__all__ = ['warn']

_PACKAGE = __name__.partition('.')[0]


def warn(message: str) -> None:
    """Issue a ``UserWarning`` for the nearest line on the call stack that is outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get('__name__', '').partition('.')[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
