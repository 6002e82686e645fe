"""``Sensitivity``: what a network's output loses as one structure after the other gets narrower, as plain data."""
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from ..core import aligned_table, percent

__all__ = ['Curve', 'SHARES', 'Sensitivity', 'removed_counts']

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of its units that a structure loses


@dataclass(frozen=True, eq=False)
class Curve:
    """What the output loses as one structure gets narrower. All but ``order`` have one entry per measurement.

    Attributes:
        order: Units, the first to go first, shape (units,).
        removed: Numbers of units that were removed, ascending.
        divergence: Mean Kullback-Leibler divergence of the classes' probabilities from the dense model's, in nats. For
            outputs that aren't of shape (images, two or more): squared error, as a share of the dense output's mean
            square.
        error: Share of the variance of the outputs of the layers that read the units that is lost, the mean over these
            layers. NaN where it isn't known.
        same_class: Share of the images whose class stays the same. NaN where there are no classes.
        top1: Top-1 accuracy in percent. NaN where the images have no labels.
    """
    order: np.ndarray
    removed: Tuple[int, ...]
    divergence: Tuple[float, ...]
    error: Tuple[float, ...]
    same_class: Tuple[float, ...]
    top1: Tuple[float, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.order)

    @property
    def divergence_by_share(self) -> List[float]:
        """The divergence at each of ``SHARES``: narrow structures lose the same number of units at several of them."""
        at = dict(zip(self.removed, self.divergence))
        return [at[count] for count in removed_counts(self.units)]

    @property
    def half(self) -> int:
        """Position of the measurement with about half of the units."""
        return int(np.argmin([abs(count - self.units / 2) for count in self.removed]))

    def marginal(self) -> np.ndarray:
        """What the removal of each unit adds to the divergence, in their order, growing, shape (units,).

        Between measurements it is interpolated, on a logarithmic scale. Beyond the last one it grows as it did last.
        """
        at = np.array([0, *self.removed])
        slopes = np.diff([0.0, *self.divergence]) / np.diff(at)
        slopes = _non_decreasing(np.maximum(slopes, 1e-12), np.diff(at))
        middles = (at[1:] + at[:-1]) / 2
        if len(slopes) > 1:
            growth = max(slopes[-1] / slopes[-2], 1.0)
            end = slopes[-1] * growth ** ((self.units - middles[-1]) / (middles[-1] - middles[-2]))
            middles, slopes = np.append(middles, self.units), np.append(slopes, end)
        values = np.exp(np.interp(np.arange(self.units) + 0.5, middles, np.log(slopes)))
        return values * (1 + 1e-9 * np.arange(self.units))  # no two are equal, so that the order is kept


def _non_decreasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls (pool adjacent violators)."""
    pools: List[List[float]] = []  # value, weight, length
    for value, weight in zip(values, weights):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            value, weight, length = pools.pop()
            last = pools[-1]
            total = last[1] + weight
            pools[-1] = [(last[0] * last[1] + value * weight) / total, total, last[2] + length]
    return np.concatenate([[value] * length for value, _, length in pools])


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The curves of all structures that may be cut. Coupled layers are one structure.

    Attributes:
        curves: By structure name.
        images: Number of images that it was measured on.
        top1: Top-1 accuracy of the dense model on these, in percent. NaN where they have no labels.
    """
    curves: Dict[str, Curve]
    images: int
    top1: float

    def scores(self, price: Mapping[str, float]) -> Dict[str, np.ndarray]:
        """What the output loses by each unit, for what it costs, by structure name, shape (units,), higher = keep.

        Args:
            price: Cost of one unit, by structure name.
        """
        scores = {}
        for name, curve in self.curves.items():
            scores[name] = np.empty(curve.units)
            scores[name][curve.order] = curve.marginal() / max(price[name], 1e-30)
        return scores

    def to_dict(self) -> Dict[str, Any]:
        """All that was measured, as plain data for JSON. What isn't known is None."""
        return {
            'images': self.images,
            'top1': _known(self.top1),
            'structures': {
                name: {
                    'units': curve.units,
                    'removed': list(curve.removed),
                    **{key: [_known(value) for value in getattr(curve, key)]
                       for key in ('divergence', 'error', 'same_class', 'top1')},
                } for name, curve in self.curves.items()
            },
        }

    def __str__(self) -> str:
        has_top1 = np.isfinite(self.top1)
        header = ['structure', 'units', *(percent(share) for share in SHARES), 'error', 'top-1' if has_top1 else 'same']
        rows = [tuple(header)]
        for name, curve in self.curves.items():
            quality = f'{curve.top1[curve.half]:.1f}' if has_top1 else _percent(curve.same_class[curve.half])
            cells = [f'{value:.2g}' for value in curve.divergence_by_share]
            rows.append((name, str(curve.units), *cells, _percent(curve.error[curve.half]), quality))
        quality = f'top-1, {self.top1:.1f} % when dense' if has_top1 else 'share of the images whose class is the same'
        return '\n'.join([
            f'divergence of the output on {self.images} images, by the share of its units that a structure loses (at '
            f'least one);',
            f'error of the layers that read it and {quality}, both with about half of its units',
            '',
            aligned_table(rows),
        ])


def _known(value: float) -> Optional[float]:
    return float(value) if np.isfinite(value) else None


def _percent(value: float) -> str:
    return percent(value) if np.isfinite(value) else '-'


def removed_counts(units: int) -> List[int]:
    """Number of units that are removed, at each of ``SHARES``."""
    return [max(1, min(round(share * units), units - 1)) for share in SHARES]
