"""Optimal Brain Surgeon for units: what goes is what the rest can make up for.

With H = XᵀX the Gram matrix of what a layer reads, and W its weight, removing the features g of a unit and giving the
others the best weights costs the layer's output

    ½ tr(W_gᵀ ((H⁻¹)_gg)⁻¹ W_g),    and leaves    W − (H⁻¹)_:g ((H⁻¹)_gg)⁻¹ W_g.

After each unit, H⁻¹ is downdated to that of the features that stay, so the next unit is judged by what is left. A unit
that several layers read costs the sum of their errors, each as a share of its layer's output.

Source: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NeurIPS 1992, equations
5 and 6; for blocks of weights Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, equation 3; H of single layers'
outputs: Meng et al., OSSCAR, ICML 2024.
"""
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import LinearCall, Reader, Sums, Watch, list_readers, sample_positions
from ..core import Structure, eval_mode

__all__ = ['Consumer', 'Removal', 'consumers_of']

DAMPING = 1e-2  # share of the mean of H's diagonal that is added to it


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer, and what it reads.

    Attributes:
        name: Name of its weight.
        reader: How it is called.
        gram: Damped covariance of its inputs, shape (groups, features, features), float64.
        mean: Mean of its inputs, shape (groups, features).
    """
    name: str
    reader: Reader
    gram: Tensor
    mean: Tensor

    @property
    def call(self) -> LinearCall:
        """Its call."""
        return self.reader.call

    def features(self, structure: Structure) -> Optional[np.ndarray]:
        """Features that each unit of a structure owns, shape (units, k); None where it can't be told."""
        owned = [m for m in structure.members if m.tensor == self.name and m.role == 'in']
        if not owned or self.call.transposed and self.call.groups > 1:
            return None
        index = np.concatenate([member.index for member in owned], axis=1)
        kernel = int(np.prod(self.call.weight.shape[2:]))
        return (index[:, :, None] * kernel + np.arange(kernel)).reshape(len(index), -1)


@torch.no_grad()
def consumers_of(model: nn.Module, structures: Sequence[Structure], batches: Sequence[Tensor]) -> Dict[str, Consumer]:
    """The layers that read units of some structures, with statistics of one pass over the images.

    Args:
        model: The model.
        structures: The structures.
        batches: Batches of images.
    """
    names = {m.tensor for s in structures for m in s.members if m.role == 'in'}
    images = sum(map(len, batches))
    with eval_mode(model):
        readers, _ = list_readers(model, batches[0][:1])
        sums = {name: Sums() for name, reader in readers.items() if name in names and not reader.is_norm}

        def add(name, call, run):
            if name in sums:
                groups, features, _ = call.matrix(call.weight).shape
                rows = call.rows(sample_positions(name, call.positions, images, groups, features)).flatten(1, 2)
                sums[name].add(rows, rows[:, :, :0])
            return run()

        for batch in batches:
            with Watch(model, len(batch), add):
                model(batch)
    return {name: _consumer(name, readers[name], total) for name, total in sums.items()}


def _consumer(name: str, reader: Reader, sums: Sums) -> Consumer:
    gram = sums.centred().xx / sums.count
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    return Consumer(name, reader, gram, sums.x / sums.count)


class Removal:
    """Removes units of one structure one after the other, each time those that cost least.

    Args:
        structure: The structure.
        consumers: The layers that read its units.

    Attributes:
        order: Units that went, in this order.
        errors: What each of them cost, as the sum over consumers of the share of their outputs' variance.
    """

    def __init__(self, structure: Structure, consumers: Sequence[Consumer]):
        self.structure = structure
        self.order: List[int] = []
        self.errors: List[float] = []
        self._left = np.arange(structure.units)
        self._states = []
        for consumer in consumers:
            features = consumer.features(structure)
            if features is not None:
                self._states.append(_State(consumer, torch.from_numpy(features)))

    @property
    def is_measurable(self) -> bool:
        """Whether there is a consumer by which units can be judged."""
        return bool(self._states)

    def to(self, count: int, at_once: float = 1 / 32) -> None:
        """Remove units until ``count`` have gone.

        Args:
            count: Number of units.
            at_once: Share of all units that may go between two downdates.
        """
        while len(self.order) < count:
            step = min(max(1, int(at_once * self.structure.units)), count - len(self.order))
            left = torch.from_numpy(self._left)
            costs = sum(state.costs(left) for state in self._states).numpy()
            chosen = np.argsort(costs, kind='stable')[:step]
            self.order += self._left[chosen].tolist()
            self.errors += costs[chosen].tolist()
            for state in self._states:
                state.remove(torch.from_numpy(self._left[chosen]))
            self._left = np.delete(self._left, chosen)

    def weights(self) -> Dict[str, Tuple[Tensor, Tensor]]:
        """The consumers' weights without what went, by name, and by how much their outputs fell on average."""
        return {state.consumer.name: state.weight() for state in self._states}


class _State:
    """A consumer without some of its features."""

    def __init__(self, consumer: Consumer, features: Tensor):
        self.consumer = consumer
        call = consumer.call
        self.features = features  # (units, k)
        self.dense = call.matrix(call.weight).double()
        self.matrix = self.dense.clone()  # (groups, features, outputs)
        self.inverse = torch.linalg.inv(consumer.gram)
        variance = (self.dense * (consumer.gram @ self.dense)).sum()
        self.scale = 1 / variance.clamp_min(1e-30)

    def costs(self, units: Tensor) -> Tensor:
        """What each of some units costs, shape (units,)."""
        at = self.features[units]
        blocks = self.inverse[:, at[:, :, None], at[:, None, :]]  # (groups, units, k, k)
        weights = self.matrix[:, at]  # (groups, units, k, outputs)
        return (weights * torch.linalg.solve(blocks, weights)).sum((0, 2, 3)) * self.scale

    def remove(self, units: Tensor) -> None:
        """Remove units, and give the other features the best weights."""
        at = self.features[units].flatten()
        columns = self.inverse[:, :, at]
        block = columns[:, at]
        self.matrix -= columns @ torch.linalg.solve(block, self.matrix[:, at])
        self.inverse -= columns @ torch.linalg.solve(block, columns.transpose(1, 2))
        self.matrix[:, at] = 0
        self.inverse[:, at] = 0
        self.inverse[:, :, at] = 0

    def weight(self) -> Tuple[Tensor, Tensor]:
        call = self.consumer.call
        shift = torch.einsum('gf,gfo->go', self.consumer.mean, self.dense - self.matrix).flatten()
        return call.weight_of(self.matrix).to(call.weight), shift.to(call.weight)
