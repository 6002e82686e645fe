"""Grids: the numbers of units that a structure may keep."""
from math import ceil, gcd
from typing import Optional

import numpy as np

from ..core import Structure

__all__ = ['ALIGN', 'grid', 'rounding_step']

ALIGN = 16  # by default, wide layers keep multiples of this: oneDNN computes channels in blocks of 16


def grid(structure: Structure, step: int, floor: float, share: Optional[float] = None) -> np.ndarray:
    """The counts that a structure may keep: multiples of a step that are at least its floor, and all its units.

    >>> grid(Structure('conv', 'channels', units=20, members=()), step=8, floor=0.1)
    array([ 8, 16, 20])

    Args:
        structure: The structure.
        step: All counts but the largest are multiples of this.
        floor: Smallest share of its units that it keeps. It also keeps at least one unit, unless it is a block.
        share: Share of its units to remove. None: any. Otherwise the grid is the one count that is nearest to it.

    Returns:
        Counts, ascending, int64.
    """
    lowest = 0 if structure.kind == 'blocks' else max(1, ceil(floor * structure.units - 1e-9))
    lowest_multiple = ceil(lowest / step) * step
    counts = np.append(np.arange(lowest_multiple, structure.units, step), structure.units)
    if share is None:
        return counts
    if share == 0:
        return counts[-1:]
    nearest = np.abs(counts - (1 - share) * structure.units).argmin()
    return counts[nearest:nearest + 1]


def rounding_step(structure: Structure, round_to: Optional[int], align: int) -> int:
    """The step of a structure's grid, in units, that makes the width of its layer a multiple of ``round_to``.

    A wide layer keeps multiples of 16. One of 20 channels keeps multiples of 2, the largest power of two that is at
    most 20/8:

    >>> rounding_step(Structure('conv', 'channels', units=64, members=()), round_to=None, align=16)
    16
    >>> rounding_step(Structure('conv', 'channels', units=20, members=()), round_to=None, align=16)
    2

    Args:
        structure: The structure. Only channels and head dims are rounded; for all other kinds the step is 1.
        round_to: The layer's width is a multiple of this. None: of ``align`` where there are at least 4 · ``align``
            units; elsewhere of the largest power of two that is at most an eighth of the units.
        align: A power of two.
    """
    if structure.kind not in ('channels', 'head_dims'):
        return 1
    if round_to is None:
        eighth = max(1, structure.units // 8)
        round_to = align if structure.units >= 4 * align else 1 << eighth.bit_length() - 1
    channels_per_unit = max(((m.role == 'out', m.index.shape[1]) for m in structure.members), default=(True, 1))[1]
    return round_to // gcd(round_to, channels_per_unit)
