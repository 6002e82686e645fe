"""Scores from what the layers that read a unit see: its activation energy there, and what the others can't make up for.

Let H be the covariance of what a layer reads, and W its weight. Without the features g of a unit, and with the best
weights for all others, the variance of the layer's output is off by

    tr(W_gᵀ ((H⁻¹)_gg)⁻¹ W_g),    with the weights    W − (H⁻¹)_:g ((H⁻¹)_gg)⁻¹ W_g.

After each removal, H⁻¹ is downdated to that of the features that are left, so the next unit is judged by what the ones
that stay can do. A unit that several layers read costs the sum of their errors, each as a share of the variance of the
layer's output.

Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NeurIPS 1992, equations
5 and 6; for blocks of weights Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, equation 3; H of single layers'
outputs: Meng et al., OSSCAR, ICML 2024.
"""
from typing import List, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core import Structure
from .statistics import Consumer

__all__ = ['energy', 'obs']

AT_ONCE = 1 / 32  # share of a structure's units that go between two downdates


def energy(structure: Structure, consumers: Sequence[Consumer]) -> np.ndarray:
    """What each unit adds to the variance of the layers that read it, as a share of it, shape (units,).

    Args:
        structure: The structure.
        consumers: The layers that read its units, one or more.
    """
    total = torch.zeros(structure.units)
    for consumer in _that_vary(consumers):
        variance = consumer.covariance.diagonal(dim1=1, dim2=2)[..., None] * consumer.matrix.square()
        by_unit = variance.sum((0, 2))[consumer.features(structure)].sum(1)
        total += (by_unit / _output_variance(consumer, consumer.matrix)).cpu()
    return total.numpy()


def obs(structure: Structure, consumers: Sequence[Consumer]) -> np.ndarray:
    """The error at which each unit goes, where those with the least error go first, shape (units,).

    Args:
        structure: The structure.
        consumers: The layers that read its units, one or more.
    """
    states = [_State(consumer, structure) for consumer in _that_vary(consumers)]
    if not states:
        return np.zeros(structure.units)
    left, reached = np.arange(structure.units), 0.0
    scores = np.empty(structure.units)
    step = max(1, int(AT_ONCE * structure.units))
    while len(left):
        costs = sum(state.costs(torch.from_numpy(left)) for state in states).numpy()
        chosen = np.argsort(costs, kind='stable')[:step]
        # A unit that goes later never scores less than one that went before.
        scores[left[chosen]] = np.maximum(costs[chosen], reached)
        reached = scores[left[chosen]].max()
        for state in states:
            state.remove(torch.from_numpy(left[chosen]))
        left = np.delete(left, chosen)
    return scores


def _that_vary(consumers: Sequence[Consumer]) -> List[Consumer]:
    """Those whose outputs aren't always the same: of one image, what reads pooled features sees a single row."""
    return [consumer for consumer in consumers if consumer.covariance.any()]


def _output_variance(consumer: Consumer, matrix: Tensor) -> Tensor:
    return (matrix * (consumer.covariance.to(matrix) @ matrix)).sum().clamp_min(1e-30)


class _State:
    """A consumer without the units that went."""

    def __init__(self, consumer: Consumer, structure: Structure):
        self._features = consumer.features(structure)  # (units, k)
        self._matrix = consumer.matrix.double()  # (groups, features, outputs)
        self._scale = 1 / _output_variance(consumer, self._matrix)
        self._inverse = torch.linalg.inv(consumer.damped.double())

    def costs(self, units: Tensor) -> Tensor:
        """What each of some units costs, shape (units,)."""
        at = self._features[units]
        blocks = self._inverse[:, at[:, :, None], at[:, None, :]]  # (groups, units, k, k)
        weights = self._matrix[:, at]  # (groups, units, k, outputs)
        return ((weights * torch.linalg.solve(blocks, weights)).sum((0, 2, 3)) * self._scale).cpu()

    def remove(self, units: Tensor) -> None:
        """Remove units, and give all others the best weights."""
        at = self._features[units].flatten()
        columns = self._inverse[:, :, at]
        block = columns[:, at]
        self._matrix -= columns @ torch.linalg.solve(block, self._matrix[:, at])
        self._inverse -= columns @ torch.linalg.solve(block, columns.transpose(1, 2))
        self._matrix[:, at] = 0
        self._inverse[:, at] = 0
        self._inverse[:, :, at] = 0
