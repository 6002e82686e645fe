"""``CostModel``: what a model costs, as a function of how many units each structure keeps.

The trace records every matrix product and convolution with the sizes of its dims. Every size is linear in the numbers
of units left. So the cost of a candidate plan is arithmetic on a short vector, and the network need not run.
"""
from math import isfinite
from numbers import Real
from typing import Collection, Dict, Iterable, List, Mapping, Sequence, Tuple

import numpy as np

from .structure import Size

__all__ = ['CostModel', 'QUANTITIES', 'is_number']

QUANTITIES = ('macs', 'params', 'activations')

Term = Tuple[str, float, Tuple[Size, ...]]  # quantity, coefficient, sizes


class CostModel:
    """MACs, parameters and activations of one forward of a single image (batch 1).

    - ``macs``: multiply-accumulates, half of what ``torch.utils.flop_counter.FlopCounterMode`` counts, attention
      products included.
    - ``params``: number of parameters.
    - ``activations``: number of elements that convolutions and matrix products write, the field's measure of
      activation memory.

    A pointwise convolution from ``a`` to ``b`` on 100 pixels has 100 · a · b MACs:

    >>> a, b = Size(0, (('a', 1),)), Size(0, (('b', 1),))
    >>> cost = CostModel(['a', 'b'], [('macs', 100.0, (a, b))])
    >>> cost('macs', cost.counts({'a': 4, 'b': 8}))
    3200.0
    >>> cost.gradient('macs', cost.counts({'a': 4, 'b': 8}))  # of one more unit in a, and in b
    array([800., 400.])

    Args:
        names: Names of the structures, in the order of the count vectors.
        terms: Triples (quantity, coefficient, sizes). Each adds coefficient · Π sizes to its quantity.
    """

    def __init__(self, names: Sequence[str], terms: Iterable[Term]):
        self.names = tuple(names)
        position = {name: i for i, name in enumerate(self.names)}
        size_ids: Dict[Size, int] = {}  # of sizes that depend on some structure
        # The coefficient of each product of such sizes. Terms with the same product are merged.
        products: Dict[str, Dict[Tuple[int, ...], float]] = {quantity: {} for quantity in QUANTITIES}
        for quantity, coef, sizes in terms:
            key = tuple(sorted(size_ids.setdefault(size, len(size_ids)) for size in sizes if size.coefs))
            coef = coef * float(np.prod([size.const for size in sizes if not size.coefs], dtype=np.float64))
            products[quantity][key] = products[quantity].get(key, 0.0) + coef

        # All sizes at once: const + matrix @ counts.
        self._const = np.array([size.const for size in size_ids], dtype=np.float64)
        self._matrix = np.zeros((len(size_ids), len(self.names)))
        for size, row in size_ids.items():
            for name, coef in size.coefs:
                self._matrix[row, position[name]] += coef
        self._table = {quantity: self._compile(table) for quantity, table in products.items()}

    @staticmethod
    def _compile(products: Dict[Tuple[int, ...], float]) -> List[Tuple[np.ndarray, np.ndarray]]:
        """Group products by their number of sizes, as arrays: size ids, shape (products, sizes), and coefficients."""
        by_length: Dict[int, List[Tuple[Tuple[int, ...], float]]] = {}
        for key, coef in products.items():
            by_length.setdefault(len(key), []).append((key, coef))
        return [
            (np.array([key for key, _ in group], dtype=np.int64).reshape(len(group), length),
             np.array([coef for _, coef in group]))
            for length, group in by_length.items()
        ]

    def __call__(self, quantity: str, counts: np.ndarray) -> float:
        """Cost of the cut model.

        Args:
            quantity: One of ``QUANTITIES``.
            counts: Number of units left of each structure, in the order of ``names``, shape (len(names),).
        """
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        return float(sum(coefs @ sizes[keys].prod(axis=1) for keys, coefs in self._table[quantity]))

    def gradient(self, quantity: str, counts: np.ndarray) -> np.ndarray:
        """Cost of one more unit in each structure, to first order, shape (len(names),).

        Args:
            quantity: One of ``QUANTITIES``.
            counts: Number of units left of each structure, in the order of ``names``, shape (len(names),).
        """
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        by_size = np.zeros_like(sizes)
        for keys, coefs in self._table[quantity]:
            for column in range(keys.shape[1]):
                others = np.delete(sizes[keys], column, axis=1).prod(axis=1)
                np.add.at(by_size, keys[:, column], coefs * others)
        return by_size @ self._matrix

    def share(self, quantity: str, names: Collection[str], counts: np.ndarray) -> float:
        """Share of the cost in layers whose size depends on some structures.

        Args:
            quantity: One of ``QUANTITIES``.
            names: Names of the structures.
            counts: Number of units left of each structure, in the order of the cost model's names.
        """
        columns = [i for i, name in enumerate(self.names) if name in names]
        depends = (self._matrix[:, columns] != 0).any(axis=1) if columns else np.zeros(len(self._const), dtype=bool)
        sizes = self._const + self._matrix @ np.asarray(counts, dtype=np.float64)
        inside = total = 0.0
        for keys, coefs in self._table[quantity]:
            values = coefs * sizes[keys].prod(axis=1)
            total += values.sum()
            inside += values[depends[keys].any(axis=1)].sum() if keys.shape[1] else 0.0
        return float(inside / total) if total else 0.0

    def counts(self, left: Mapping[str, int]) -> np.ndarray:
        """A count vector, from the number of units left by structure name."""
        return np.array([left[name] for name in self.names], dtype=np.int64)


def is_number(value: object) -> bool:
    """Whether this is a finite number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
