"""What a network's output loses as one structure after the other gets narrower.

A structure is narrowed in place, without cutting: the units that go are those that the rest can make up for (``obs``),
and the layers that read them get the weights that make up for them. What counts is how far the *output* then is from
the dense model's, on a few images.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import image_batches
from ..core import Structure, eval_mode, progress
from .obs import Removal, consumers_of

__all__ = ['Curve', 'Sensitivity', 'measure_sensitivity']

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7)  # of its units that a structure loses
IMAGES = 48


@dataclass(frozen=True, eq=False)
class Curve:
    """What the output loses as one structure gets narrower.

    Attributes:
        order: Units, the first to go first, shape (units,).
        removed: Numbers of units that were removed, ascending.
        divergence: How far the output then was from the dense model's.
    """
    order: np.ndarray
    removed: Tuple[int, ...]
    divergence: Tuple[float, ...]

    def marginal(self) -> np.ndarray:
        """What the removal of each unit adds, in their order, never falling, shape (units,)."""
        at = np.array([0, *self.removed])
        slopes = np.diff([0.0, *self.divergence]) / np.diff(at)
        slopes = _non_decreasing(np.maximum(slopes, 1e-12), np.diff(at))
        middles = (at[1:] + at[:-1]) / 2
        units = len(self.order)
        if len(slopes) > 1:  # beyond the last measurement it grows as it did last
            growth = slopes[-1] / slopes[-2]
            end = slopes[-1] * max(growth, 1.0) ** ((units - middles[-1]) / (middles[-1] - middles[-2]))
            middles, slopes = np.append(middles, units), np.append(slopes, end)
        return np.exp(np.interp(np.arange(units) + 0.5, middles, np.log(slopes)))


def _non_decreasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls (pool adjacent violators)."""
    pools: List[List[float]] = []  # value, weight, length
    for value, weight in zip(values, weights):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            v, w, n = pools.pop()
            u = pools[-1]
            pools[-1] = [(u[0] * u[1] + v * w) / (u[1] + w), u[1] + w, u[2] + n]
    return np.concatenate([[value] * length for value, _, length in pools])


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The curves of all structures.

    Attributes:
        curves: By structure name.
    """
    curves: Dict[str, Curve]

    def scores(self, price: Mapping[str, float]) -> Dict[str, np.ndarray]:
        """Scores by structure name, shape (units,), higher = keep: what the output loses by the unit, a cost of one.

        Args:
            price: Cost of one unit, by structure name.
        """
        scores = {}
        for name, curve in self.curves.items():
            scores[name] = np.empty(len(curve.order))
            scores[name][curve.order] = curve.marginal() / price[name]
        return scores


@torch.no_grad()
def measure_sensitivity(
        model: nn.Module,
        structures: Sequence[Structure],
        batches: Sequence[Tensor],
        shares: Sequence[float] = SHARES,
) -> Sensitivity:
    """Measure the curves of some structures."""
    consumers = consumers_of(model, structures, batches)
    images = image_batches(batches, model, IMAGES)
    curves = {}
    with eval_mode(model):
        dense = [_output(model(batch)) for batch in images]
        for structure in progress(structures, 'measuring sensitivity'):
            curves[structure.name] = _measure(model, structure, consumers, images, dense, shares)
    return Sensitivity(curves)


def _measure(model, structure, consumers, images, dense, shares) -> Curve:
    readers = [consumers[name] for name in dict.fromkeys(m.tensor for m in structure.members) if name in consumers]
    removal = Removal(structure, readers)
    counts = sorted({max(1, min(round(share * structure.units), structure.units - 1)) for share in shares})
    divergence = []
    for count in counts:
        removal.to(count)
        with _narrowed(model, structure, removal):
            outputs = [_output(model(batch)) for batch in images]
        divergence.append(sum(_divergence(new, old) for new, old in zip(outputs, dense)) / sum(map(len, images)))
    removal.to(structure.units)
    return Curve(np.array(removal.order), tuple(counts), tuple(divergence))


@contextmanager
def _narrowed(model: nn.Module, structure: Structure, removal: Removal) -> Iterator[None]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = removal.weights()
    changed: Dict[str, Tensor] = {}

    def change(name: str, value: Tensor) -> None:
        changed.setdefault(name, tensors[name].clone())
        tensors[name].copy_(value)

    gone = removal.order
    for member in structure.members:
        if member.role == 'in' and member.tensor not in weights:
            value = tensors[member.tensor].clone().index_fill_(
                member.dim, torch.from_numpy(member.index[gone].ravel()), 0)
            change(member.tensor, value)
    for state in removal._states:
        name, (weight, shift) = state.consumer.name, weights[state.consumer.name]
        change(name, weight)
        bias, norm = state.consumer.call.bias, state.consumer.reader.norm
        if bias is not None:
            names = [n for n, t in tensors.items() if t is bias]
            change(names[0], bias + shift)
        elif norm:
            change(norm, tensors[norm] - shift)
    try:
        yield
    finally:
        for name, value in changed.items():
            tensors[name].copy_(value)


def _output(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


def _divergence(new: Tensor, dense: Tensor) -> float:
    """Kullback-Leibler divergence of logits, summed over images; of other outputs, their relative squared error."""
    if dense.ndim == 2 and dense.shape[1] > 1:
        return float(F.kl_div(F.log_softmax(new, 1), F.log_softmax(dense, 1), log_target=True, reduction='sum'))
    return float((new - dense).square().sum() / dense.square().mean().clamp_min(1e-12) / dense[0].numel())
