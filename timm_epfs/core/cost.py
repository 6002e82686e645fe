"""What a model costs, as a function of how many units each structure keeps.

The trace writes down every matrix product and convolution with the sizes of its dims, and every size is linear in the
numbers of units left. A candidate plan is then priced by arithmetic on a short vector, without running the network.
"""
from math import isfinite
from numbers import Real
from typing import Collection, Dict, Iterable, List, Mapping, Sequence, Tuple

import numpy as np

from .structure import Size

__all__ = ['CostModel', 'QUANTITIES', 'is_number']

QUANTITIES = ('macs', 'params', 'activations')

Term = Tuple[str, float, Tuple[Size, ...]]


class CostModel:
    """MACs, parameters and activations of one forward of a single image (batch 1).

    - ``macs``: multiply-accumulates, half of what ``torch.utils.flop_counter.FlopCounterMode`` counts, attention
      products included.
    - ``params``: number of parameters.
    - ``activations``: number of elements that convolutions and matrix products write, the field's measure of
      activation memory.

    Args:
        names: Names of the structures, in the order of the count vectors.
        terms: Triples (quantity, coefficient, sizes): each adds coefficient · Π sizes to its quantity.
    """

    def __init__(self, names: Sequence[str], terms: Iterable[Term]):
        self.names = tuple(names)
        position = {name: i for i, name in enumerate(self.names)}
        sizes: Dict[Size, int] = {}
        rows: Dict[str, Dict[Tuple[int, ...], float]] = {quantity: {} for quantity in QUANTITIES}
        for quantity, coef, factors in terms:
            key = tuple(sorted(sizes.setdefault(size, len(sizes)) for size in factors if size.coefs))
            coef = coef * float(np.prod([size.const for size in factors if not size.coefs], dtype=np.float64))
            rows[quantity][key] = rows[quantity].get(key, 0.0) + coef

        self._const = np.array([size.const for size in sizes], dtype=np.float64)
        self._matrix = np.zeros((len(sizes), len(self.names)))
        for size, row in sizes.items():
            for name, coef in size.coefs:
                self._matrix[row, position[name]] += coef
        self._table = {quantity: self._compile(table) for quantity, table in rows.items()}

    @staticmethod
    def _compile(table: Dict[Tuple[int, ...], float]) -> List[Tuple[np.ndarray, np.ndarray]]:
        """Group terms by their number of factors: one gather and one product a group."""
        by_length: Dict[int, List[Tuple[Tuple[int, ...], float]]] = {}
        for key, coef in table.items():
            by_length.setdefault(len(key), []).append((key, coef))
        return [
            (np.array([key for key, _ in group], dtype=np.int64).reshape(len(group), length),
             np.array([coef for _, coef in group]))
            for length, group in by_length.items()
        ]

    def __call__(self, quantity: str, counts: np.ndarray) -> float:
        """Cost at the given numbers of units left.

        Args:
            quantity: One of ``QUANTITIES``.
            counts: Units left by structure, in the order of ``names``, shape (len(names),).
        """
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        return float(sum(coefs @ sizes[keys].prod(axis=1) for keys, coefs in self._table[quantity]))

    def gradient(self, quantity: str, counts: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, at the given counts, shape (len(names),)."""
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        by_size = np.zeros_like(sizes)
        for keys, coefs in self._table[quantity]:
            for column in range(keys.shape[1]):
                others = np.delete(sizes[keys], column, axis=1).prod(axis=1)
                np.add.at(by_size, keys[:, column], coefs * others)
        return by_size @ self._matrix

    def share(self, quantity: str, names: Collection[str], counts: np.ndarray) -> float:
        """Share of a quantity in terms that depend on one of the named structures, at the given counts."""
        columns = [i for i, name in enumerate(self.names) if name in names]
        touched = (self._matrix[:, columns] != 0).any(axis=1) if columns else np.zeros(len(self._const), dtype=bool)
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        inside = total = 0.0
        for keys, coefs in self._table[quantity]:
            values = coefs * sizes[keys].prod(axis=1)
            total += values.sum()
            inside += values[touched[keys].any(axis=1)].sum() if keys.shape[1] else 0.0
        return float(inside / total) if total else 0.0

    def counts(self, left: Mapping[str, int]) -> np.ndarray:
        """A count vector from a dict by name."""
        return np.array([left[name] for name in self.names], dtype=np.int64)


def is_number(value: object) -> bool:
    """Whether this is a finite number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
