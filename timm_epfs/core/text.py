"""Numbers, names and tables, formatted for people."""
from difflib import get_close_matches
from typing import Any, Iterable, List, Sequence

import torch

__all__ = ['aligned_table', 'format_count', 'kind_of', 'markdown_table', 'nearest', 'percent', 'shorten']


def percent(share: float) -> str:
    """Format a share as a percentage.

    >>> percent(0.5)
    '50.0 %'
    """
    return f'{100 * share:.1f} %'


def format_count(value: float) -> str:
    """Format a count with four digits and a unit.

    >>> format_count(4_089_184_256)
    '4.089 G'
    """
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= size:
            return f'{value / size:#.4g} {unit}'
    return f'{value:g}'


def kind_of(value: Any) -> str:
    """What a value is: its type, and of a tensor its dtype and shape.

    >>> kind_of({}), kind_of(None), kind_of(torch.zeros(2, 3))
    ('a dict', 'None', 'a float32 tensor of shape (2, 3)')
    """
    if isinstance(value, torch.Tensor):
        return f'a {str(value.dtype).removeprefix("torch.")} tensor of shape {tuple(value.shape)}'
    return 'None' if value is None else f'a {type(value).__name__}'


def shorten(text: str, width: int) -> str:
    """Truncate a text to ``width`` characters, with an ellipsis where anything is left out."""
    return text if len(text) <= width else f'{text[:width - 1]}…'


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> List[str]:
    """The known names that are most similar to an unknown one, best first. Empty where none is similar.

    >>> nearest('exlude', ['exclude', 'only'])
    ['exclude']
    """
    return get_close_matches(str(name), list(known), count, cutoff)


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal. The first column is aligned left, all others right.

    Args:
        rows: Cells of each row, the header first.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))])
        for label, *cells in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> List[str]:
    """The lines of a Markdown table.

    Args:
        rows: Cells of each row, the header first.
    """
    head, *rest = rows
    return [f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rest)]
