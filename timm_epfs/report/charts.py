"""Charts as plain data, and the places of their parts: ``page_template.html`` draws them as SVG.

matplotlib's SVG isn't used: it is an extra, and its texts are shapes, which can neither be read aloud nor change their
colour in dark mode.
"""
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import ClassVar, Iterable, List, Sequence, Tuple

__all__ = ['Axis', 'Band', 'Cell', 'Chart', 'Line', 'axis_of']

_LEFT, _TOP, _RIGHT, _BOTTOM = 46.0, 8.0, 350.0, 172.0  # of the area inside the axes


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What it shows, with the unit.
        low: Value at its start.
        high: Value at its end, greater than ``low``.
        is_log: Whether it is logarithmic; then ``low`` is positive.
    """
    label: str
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where a value is, from 0 at the start to 1 at the end. Values beyond are at the nearer end.

        >>> Axis('λ', 1, 100, is_log=True).share(10)
        0.5
        """
        low, high, value = map(log10, (self.low, self.high, max(value, self.low))) if self.is_log else (
            self.low, self.high, value)
        return min(1.0, max(0.0, (value - low) / (high - low)))

    @property
    def ticks(self) -> List[Tuple[float, str]]:
        """A few round values inside the axis, with their texts.

        >>> [text for _, text in Axis('top-1, %', 81, 92).ticks]
        ['82', '84', '86', '88', '90', '92']
        >>> [text for _, text in Axis('λ', 0.001, 0.01, is_log=True).ticks]
        ['0.001', '0.002', '0.005', '0.01']
        """
        if self.is_log:
            first, last = floor(log10(self.low)), ceil(log10(self.high))
            step = max(1, ceil((last - first) / 5))
            factors = (1, 2, 5) if last - first < 3 else (1,)
            values = [factor * 10.0 ** power for power in range(first, last + 1, step) for factor in factors]
            return [(value, f'{value:g}') for value in values if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / 8)
        numbers = range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)
        return [(number * step, f'{number * step:.10g}') for number in numbers]


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that isn't below a number."""
    power = 10.0 ** floor(log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def axis_of(label: str, values: Iterable[float], is_log: bool = False) -> Axis:
    """An axis that holds all of some values, with a margin; of positive values where it is logarithmic.

    >>> axis = axis_of('top-1, %', [80, 90])
    >>> axis.low, axis.high
    (79.5, 90.5)
    """
    values = [value for value in values if value > 0 or not is_log] or [1.0]
    low, high = min(values), max(values)
    if is_log:
        return Axis(label, low / 1.5, high * 1.5, is_log)
    margin = 0.05 * (high - low) or max(1e-3, 0.05 * abs(high))
    return Axis(label, low - margin, high + margin)


@dataclass(frozen=True)
class Line:
    """Points of a chart, joined in their order.

    Attributes:
        label: Its name in the legend.
        points: Their x and y.
        has_dots: Whether each point is marked.
    """
    label: str
    points: Sequence[Tuple[float, float]]
    has_dots: bool = False


@dataclass(frozen=True)
class Band:
    """A part of the x axis that is shaded, such as a phase of training.

    Attributes:
        label: Its name in the legend.
        start: x of its start.
        end: x of its end.
    """
    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Cell:
    """A rectangle of a density plot.

    Attributes:
        x: Its range on the x axis.
        y: Its range on the y axis.
        shade: From 0, invisible, to 1.
    """
    x: Tuple[float, float]
    y: Tuple[float, float]
    shade: float


@dataclass(frozen=True)
class Chart:
    """Lines over shaded bands or cells, in a box of 360 by 210 units.

    Attributes:
        title: Its heading.
        x: The x axis.
        y: The y axis.
        lines: The lines.
        bands: Shaded parts of the x axis.
        cells: Rectangles of a density plot.
    """
    part: ClassVar[str] = 'chart'

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    cells: Sequence[Cell] = ()

    def left(self, x: float) -> float:
        """Distance of an x from the left edge of the box."""
        return round(_LEFT + self.x.share(x) * (_RIGHT - _LEFT), 1)

    def top(self, y: float) -> float:
        """Distance of a y from the top edge of the box."""
        return round(_BOTTOM - self.y.share(y) * (_BOTTOM - _TOP), 1)

    def polyline(self, line: Line) -> str:
        """The points of a line, as SVG takes them."""
        return ' '.join(f'{self.left(x):g},{self.top(y):g}' for x, y in line.points)

    def description(self) -> str:
        """The numbers in words, for those who can't see the picture: all points of short lines, the ends of others."""
        sentences = []
        for line in self.lines:
            points = line.points if len(line.points) <= 8 else (line.points[0], line.points[-1])
            shown = ', '.join(f'{y:.4g} at {x:.4g}' for x, y in points)
            sentences.append(f'{line.label}: {shown}.')
        return ' '.join([f'{self.y.label} by {self.x.label}.', *sentences])
