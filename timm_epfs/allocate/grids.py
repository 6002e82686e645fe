"""The numbers of units that a structure may keep."""
from math import ceil, gcd
from typing import Optional

import numpy as np

from ..core import Structure

__all__ = ['ALIGN', 'grid', 'rounding_step']

ALIGN = 16  # wide layers keep multiples of this by default: oneDNN computes channels in sixteens


def grid(structure: Structure, step: int, floor: float, share: Optional[float] = None) -> np.ndarray:
    """The counts that a structure may keep, ascending: multiples of a step from its floor on, and all its units.

    >>> grid(Structure('conv', 'channels', units=20, members=()), step=8, floor=0.1)
    array([ 8, 16, 20])

    Args:
        structure: The structure.
        step: Counts below the dense one are multiples of this.
        floor: Share of its units that it keeps at least, one unit if it isn't a block.
        share: Share of its units to remove, where that is set: the one count that is nearest is left.
    """
    lowest = 0 if structure.kind == 'blocks' else max(1, ceil(floor * structure.units - 1e-9))
    counts = np.append(np.arange(-(-lowest // step) * step, structure.units, step), structure.units)
    if share is None:
        return counts
    return counts[np.abs(counts - (1 - share) * structure.units).argmin()][None] if share else counts[-1:]


def rounding_step(structure: Structure, round_to: Optional[int], align: int) -> int:
    """How many units make the widths of the layer that a structure leaves multiples of ``round_to``.

    >>> rounding_step(Structure('conv', 'channels', units=64, members=()), round_to=None, align=16)
    16

    Args:
        structure: The structure. Heads, groups and blocks go one by one.
        round_to: What widths are to be multiples of. None: ``align`` where there are four times as many units,
            elsewhere the largest power of two of which there are eight.
        align: A power of two.
    """
    if structure.kind not in ('channels', 'head_dims'):
        return 1
    if round_to is None:
        eighth = max(1, structure.units // 8)
        round_to = align if structure.units >= 4 * align else 1 << eighth.bit_length() - 1
    channels_per_unit = max(((m.role == 'out', m.index.shape[1]) for m in structure.members), default=(True, 1))[1]
    return round_to // gcd(round_to, channels_per_unit)
