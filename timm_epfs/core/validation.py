"""Checks values from outside, such as JSON files, against a schema. Errors read ``where: found …, expected …``.

>>> schema = {'top1': Rule('percent', lambda value: 0 <= value <= 100), 'name': TEXT}
>>> check({'top1': 90}, schema, 'metrics')
{'top1': 90}
>>> check({'top1': 101}, schema, 'metrics')
Traceback (most recent call last):
timm_epfs.core.errors.PruningError: metrics.top1: found 101, expected percent
>>> check({'top5': 90}, schema, 'metrics')
Traceback (most recent call last):
timm_epfs.core.errors.PruningError: metrics: unknown field 'top5'; known: top1, name
"""
import reprlib
from dataclasses import dataclass
from typing import Any, Callable, Collection, Mapping, Union

from .errors import PruningError
from .text import shorten

__all__ = ['ANYTHING', 'DICT', 'FLAG', 'INTEGER', 'LIST', 'TEXT', 'Rule', 'check', 'invalid']


@dataclass(frozen=True, eq=False)
class Rule:
    """A condition on a value.

    Attributes:
        expected: The condition in words, for messages.
        holds: Whether a value meets the condition.
    """
    expected: str
    holds: Callable[[Any], bool]


ANYTHING = Rule('anything', lambda value: True)
TEXT = Rule('text', lambda value: isinstance(value, str))
INTEGER = Rule('an integer', lambda value: isinstance(value, int) and not isinstance(value, bool))
FLAG = Rule('true or false', lambda value: isinstance(value, bool))
LIST = Rule('a list', lambda value: isinstance(value, list))
DICT = Rule('a dict', lambda value: isinstance(value, Mapping))

Schema = Union[Rule, Mapping[str, 'Schema']]


def check(value: Any, schema: Schema, where: str, required: Collection[str] = ()) -> Any:
    """Check a value against a schema.

    Args:
        value: The value.
        schema: A rule; or, for a dict, the schema of each field that it may have.
        where: Name of the value in messages.
        required: Fields that a dict must have.

    Returns:
        The value. For a dict, a copy with its fields in the order of the schema.

    Raises:
        PruningError: The value doesn't match the schema, or lacks a field.
    """
    if isinstance(schema, Rule):
        if not schema.holds(value):
            raise invalid(where, value, schema.expected)
        return value
    known = ', '.join(schema)
    if not isinstance(value, Mapping):
        raise invalid(where, value, f'a dict with {known}')
    for name in required:
        if name not in value:
            raise PruningError(f'{where}: no field {name!r}; add it')
    for name in value:
        if name not in schema:
            raise PruningError(f'{where}: unknown field {shorten(str(name), 40)!r}; known: {shorten(known, 150)}')
    return {name: check(value[name], schema[name], f'{where}.{name}') for name in schema if name in value}


def invalid(where: str, value: Any, expected: str) -> PruningError:
    """The error for a value that doesn't match its schema."""
    return PruningError(f'{where}: found {reprlib.repr(value)[:80]}, expected {expected}')
