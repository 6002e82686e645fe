"""How many units structures keep where something else than the ranked scores says so."""
from typing import Collection, Dict, Sequence

import numpy as np

from ..core import CostModel, PruningError, Structure

__all__ = ['cost_aware_widths', 'in_proportion']


def cost_aware_widths(
        structures: Sequence[Structure],
        cost: CostModel,
        quantity: str,
        fixed: Collection[str] = (),
) -> Dict[str, float]:
    """Widths in inverse proportion to the square root of what a unit costs, by structure name.

    This is Neyman's optimum allocation of a sample to strata (Cochran, Sampling Techniques, 5.5), n ∝ N·S/√c: the
    sample are the units that stay of N, c is what one of them costs in the dense model. S says how much the units of a
    stratum differ. Our reading: by one for every layer that reads or writes them, because what is lost of a residual
    stream adds up over its layers, and by √k where a unit is k channels, so that a head is worth what its channels
    would be.

    Args:
        structures: Everything that the cost model counts.
        cost: Prices a vector of counts.
        quantity: What a unit costs of: ``'macs'``, ``'params'`` or ``'latency'``.
        fixed: Names of structures that are left uncut. All blocks must be, which have no width.

    Returns:
        Weights by structure name; only their ratios matter.

    Raises:
        PruningError: A block may be cut.
    """
    cuttable = [s for s in structures if s.name not in fixed]
    blocks = [s.name for s in cuttable if s.kind == 'blocks']
    if blocks:
        raise PruningError(
            f"widths='cost' says how wide layers become, not which blocks stay, and {blocks[0]} may go whole; leave "
            f'blocks out of kinds=, or widths= out')
    dense = cost.counts({s.name: s.units for s in structures})
    gradient = np.maximum(cost.gradient(quantity, dense), 1e-12 * cost(quantity, dense))
    price = dict(zip(cost.names, gradient))
    spread = {s.name: max(1.0, sum(m.index.shape[1] ** 0.5 for m in s.members if m.role != 'per')) for s in cuttable}
    return {s.name: s.units * spread[s.name] / price[s.name] ** 0.5 for s in cuttable}


def in_proportion(weight: float, units: int) -> np.ndarray:
    """What each further unit of a structure is worth, if structures are to keep units in proportion to their weights.

    Where all structures are cut at the same worth t, a structure keeps ``weight / t`` units, rounded to the nearest.

    >>> (in_proportion(3.0, 8) >= 1).sum(), (in_proportion(6.0, 8) >= 1).sum()
    (np.int64(3), np.int64(6))

    Args:
        weight: The structure's weight.
        units: How many units it has.

    Returns:
        Worth of the first unit, the second, …: descending, shape (units,).
    """
    return weight / (np.arange(units) + 0.5)
