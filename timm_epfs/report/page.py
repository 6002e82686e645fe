"""One self-contained HTML page, made of sections. It loads nothing, runs no script, and escapes all that it shows.

A section is plain data: texts, tables and charts. ``page_template.html`` alone knows HTML.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Sequence, Tuple, Union

import timm
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..core import PruningError, check_place, one_line, write_whole
from ..version import __version__
from .charts import Chart

__all__ = ['Bar', 'Code', 'Figures', 'Name', 'Number', 'Section', 'Spark', 'Table', 'check_page', 'write_page']

_TEMPLATE = 'page_template.html'


@dataclass(frozen=True)
class Name:
    """A cell: the name of a layer, and of those that are coupled with it.

    Attributes:
        text: The name.
        note: What is said of it in small print.
        others: Names that unfold below it.
    """
    cell: ClassVar[str] = 'name'

    text: str
    note: str = ''
    others: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Number:
    """A cell: a number, and how it compares.

    Attributes:
        text: The number.
        note: Its comparison, in small print.
    """
    cell: ClassVar[str] = 'number'

    text: str
    note: str = ''


@dataclass(frozen=True)
class Bar:
    """A cell: a number above a bar.

    Attributes:
        text: The number.
        share: Length of the bar, from 0 to 1.
        is_gone: Whether the bar is hatched, for what went with a whole block.
    """
    cell: ClassVar[str] = 'bar'

    text: str
    share: float
    is_gone: bool = False


@dataclass(frozen=True)
class Spark:
    """A cell: a small curve without axes, the same scale in each row.

    Attributes:
        points: x and y, both from 0 to 1.
    """
    cell: ClassVar[str] = 'spark'

    points: Tuple[Tuple[float, float], ...]

    def polyline(self) -> str:
        """The points in a box of 100 by 24 units, as SVG takes them."""
        return ' '.join(f'{round(100 * x, 1):g},{round(23 - 22 * y, 1):g}' for x, y in self.points)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: Texts of the head.
        rows: Cells: ``Name``, ``Number``, ``Bar`` or ``Spark``.
    """
    part: ClassVar[str] = 'table'

    head: Tuple[str, ...]
    rows: Sequence[Tuple[Union[Name, Number, Bar, Spark], ...]]


@dataclass(frozen=True)
class Figures:
    """The few numbers that matter most, in large print.

    Attributes:
        numbers: Label, number, and note of each.
    """
    part: ClassVar[str] = 'figures'

    numbers: Sequence[Tuple[str, str, str]]


@dataclass(frozen=True)
class Code:
    """Text as it is, folded under its title."""
    part: ClassVar[str] = 'code'

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: What is said before its parts.
        parts: What it shows.
    """
    title: str
    text: str
    parts: Sequence[Union[Table, Figures, Code, Chart]]


def check_page(path: Path, what: str = '--report') -> None:
    """Check before a long computation that a page of its result can be written.

    Args:
        path: The file.
        what: What the message starts with.

    Raises:
        PruningError: It isn't a .html file, or it can't be written.
    """
    check_place(path, what)
    if path.suffix != '.html':
        raise PruningError(f'{what} {path} was given, only .html is written; name a .html file')


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], what: str = '--report') -> None:
    """Write a page, whole or not at all. The same content always gives the same bytes.

    Args:
        path: The file.
        title: Its heading, such as the name of a model.
        lead: What it is about, in one sentence.
        sections: What it shows.
        what: What a message starts with.

    Raises:
        PruningError: The file can't be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True)
    versions = f'timm_epfs {__version__}, timm {timm.__version__}, torch {torch.__version__}'
    text = environment.get_template(_TEMPLATE).render(title=title, lead=lead, sections=sections, versions=versions)
    with one_line(f'{what}: {path} not written'):
        write_whole(path, lambda part: part.write_text(text, encoding='utf-8', newline='\n'))
