"""How many units structures keep where something other than the scores decides it."""
from typing import Collection, Dict, Sequence

import numpy as np

from ..core import CostModel, PruningError, Structure

__all__ = ['cost_aware_width_weights', 'in_proportion']


def cost_aware_width_weights(
        structures: Sequence[Structure],
        cost: CostModel,
        quantity: str,
        fixed: Collection[str] = (),
) -> Dict[str, float]:
    """Weights of widths, inversely proportional to the square root of what a unit costs, by structure name.

    This is Neyman's optimum allocation of a sample to strata (Cochran, Sampling Techniques, 5.5): ``n ∝ N·S/√c``. Here
    a structure is a stratum of N units, n of them stay, and c is the cost of one unit in the dense model. S stands for
    how much the units of a stratum differ, and had to be chosen: it is the sum of √k over the layers that read or write
    the units, if a unit has k channels there. So a residual stream counts once for every layer, because what is lost
    of it adds up over its layers, and a head of k channels counts as much as k separate channels.

    Args:
        structures: All structures of the cost model.
        cost: Prices a vector of counts.
        quantity: Quantity of the cost: ``'macs'``, ``'params'`` or ``'latency'``.
        fixed: Names of structures that are not cut. All blocks must be among them, since they have no width.

    Returns:
        Weights by structure name, of those that are cut. Only their ratios matter.

    Raises:
        PruningError: A block may be cut.
    """
    cuttable = [s for s in structures if s.name not in fixed]
    blocks = [s.name for s in cuttable if s.kind == 'blocks']
    if blocks:
        raise PruningError(
            f"widths='cost' says how wide layers become, not which blocks stay, but {blocks[0]} is a block that may be "
            f"cut; leave out widths=, or leave 'blocks' out of kinds=")
    dense = cost.counts({s.name: s.units for s in structures})
    gradient = np.maximum(cost.gradient(quantity, dense), 1e-12 * cost(quantity, dense))
    price = dict(zip(cost.names, gradient))
    spread = {s.name: max(1.0, sum(m.index.shape[1] ** 0.5 for m in s.members if m.role != 'per')) for s in cuttable}
    return {s.name: s.units * spread[s.name] / price[s.name] ** 0.5 for s in cuttable}


def in_proportion(weight: float, units: int) -> np.ndarray:
    """Scores that make structures keep units in proportion to their weights.

    If all structures are cut at the same score t, each keeps ``weight / t`` units, rounded to the nearest number:

    >>> int((in_proportion(3.0, units=8) >= 1).sum()), int((in_proportion(6.0, units=8) >= 1).sum())
    (3, 6)

    Args:
        weight: The structure's weight.
        units: Its number of units.

    Returns:
        Scores, descending, shape (units,).
    """
    return weight / (np.arange(units) + 0.5)
