"""Values as JSON has them."""
from math import isfinite
from typing import Any

import numpy as np

from ..core import PruningError, check, invalid
from .limits import NAME

__all__ = ['json_value']

MAX_DEPTH = 16


def json_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy as JSON has it: dicts sorted, tuples as lists, numpy scalars as numbers.

    >>> json_value({'size': (3, np.int64(4)), 'depth': None}, 'base_args')
    {'depth': None, 'size': [3, 4]}

    Raises:
        PruningError: JSON has no such value, or it is nested more than ``MAX_DEPTH`` deep.
    """
    if depth > MAX_DEPTH:
        raise PruningError(f'{where[:80]}: nested more than {MAX_DEPTH} deep')
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        for key in value:
            check(key, NAME, where[:80])
        return {key: json_value(value[key], f'{where}.{key}', depth + 1) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [json_value(item, f'{where}[{i}]', depth + 1) for i, item in enumerate(value)]
    if isinstance(value, (bool, int, str, type(None))) or (isinstance(value, float) and isfinite(value)):
        return value
    raise invalid(where[:80], value, 'a JSON value')
