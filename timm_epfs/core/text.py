"""Numbers, names and tables as people read them."""
from difflib import get_close_matches
from typing import Iterable, List, Sequence

__all__ = ['aligned_table', 'format_count', 'markdown_table', 'nearest', 'percent', 'shorten']


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.5)
    '50.0 %'
    """
    return f'{100 * share:.1f} %'


def format_count(value: float) -> str:
    """A count in four digits.

    >>> format_count(4_089_184_256)
    '4.089 G'
    """
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= size:
            return f'{value / size:#.4g} {unit}'
    return f'{value:g}'


def shorten(text: str, width: int) -> str:
    """The text, or as much of its start as fits into ``width`` characters, with an ellipsis."""
    return text if len(text) <= width else f'{text[:width - 1]}…'


def nearest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> List[str]:
    """The known names that are most like one that isn't known; none where none is alike.

    >>> nearest('exlude', ['exclude', 'only'])
    ['exclude']
    """
    return get_close_matches(str(name), list(known), count, cutoff)


def aligned_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: its first column is text, the others are numbers.

    Args:
        rows: Cells by row, the head first.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))])
        for label, *cells in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> List[str]:
    """Lines of a Markdown table.

    Args:
        rows: Cells by row, the head first.
    """
    head, *rest = rows
    return [f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rest)]
