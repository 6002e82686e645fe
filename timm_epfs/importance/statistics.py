"""What the layers that read a model's units see: covariances of their inputs, from one pass over some images."""
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import (
    Call,
    LinearCall,
    Reader,
    Sums,
    Watch,
    fast_format,
    labelled_batches,
    list_readers,
    sample_positions,
)
from ..core import PruningError, Structure, eval_mode, plain_attention, progress

__all__ = ['Consumer', 'Statistics', 'gather_statistics', 'refitted']

TO_MEASURE, TO_MEASURE_PIXELS = 512, 2 ** 21  # images that are kept to measure on, or fewer large ones
HELD_OUT = 8  # of all others, every eighth image is held out to choose the damping on
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # shares of the mean of a covariance's diagonal that are added to it

Batches = List[Tuple[Tensor, Optional[Tensor]]]  # images and their classes, where they are known


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer or convolution, and what it reads.

    Attributes:
        name: Name of its weight.
        reader: How it is called.
        covariance: Covariance of its inputs, shape (groups, features, features), float32. Where no constant can make up
            for their mean, it is the mean of their products.
        mean: Mean of its inputs, shape (groups, features).
        damping: What is to be added to the covariance's diagonal, as a share of its mean.
    """
    name: str
    reader: Reader
    covariance: Tensor
    mean: Tensor
    damping: float = 0.0

    @property
    def damped(self) -> Tensor:
        """The covariance, damped."""
        return _damped(self.covariance, self.damping)

    @property
    def matrix(self) -> Tensor:
        """A copy of its weight, shape (groups, features, outputs of a group), float32."""
        call: LinearCall = self.reader.call
        return call.matrix(call.weight.detach().clone()).float()

    def features(self, structure: Structure) -> Optional[Tensor]:
        """Features that each unit of a structure owns, shape (units, k). None where they aren't alike in all groups."""
        owned = [m for m in structure.members if m.tensor == self.name and m.role == 'in']
        call: LinearCall = self.reader.call
        if not owned or call.transposed and call.groups > 1:
            return None
        index = np.concatenate([member.index for member in owned], axis=1)
        kernel = int(np.prod(call.weight.shape[2:]))
        features = (index[:, :, None] * kernel + np.arange(kernel)).reshape(len(index), -1)
        return torch.from_numpy(features).to(self.mean.device)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one pass over some images gives.

    Attributes:
        consumers: The layers that read units, by the names of their weights.
        measure_on: Batches of images that weren't used for these.
    """
    consumers: Dict[str, Consumer]
    measure_on: Batches

    def consumers_of(self, structure: Structure) -> List[Consumer]:
        """Those that read units of a structure, and for which it is known which features these are."""
        names = dict.fromkeys(m.tensor for m in structure.members if m.role == 'in')
        found = [self.consumers[name] for name in names if name in self.consumers]
        return [consumer for consumer in found if consumer.features(structure) is not None]


@torch.no_grad()
def gather_statistics(model: nn.Module, structures: Sequence[Structure], data: Any) -> Statistics:
    """Run images through a model in evaluation mode, and sum up what the layers read.

    A few images, at most a quarter, are kept to measure on.

    Args:
        model: The model.
        structures: The structures whose consumers are looked for.
        data: Images as ``timm_epfs.compensate`` takes them.

    Raises:
        PruningError: There are no images, or they aren't images that the model can run.
    """
    with torch.random.fork_rng([]):  # a loader that shuffles draws from the global random state
        labelled = labelled_batches(data, model)
    with eval_mode(model):
        memory_format = fast_format(labelled[0][0], model)
    batches = [(images.contiguous(memory_format=memory_format), classes) for images, classes in labelled]
    count = sum(len(images) for images, _ in batches)
    pixels = batches[0][0][0, 0].numel() if batches[0][0].ndim > 2 else 1
    every = max(4, -(-count // max(1, min(TO_MEASURE, TO_MEASURE_PIXELS // pixels))))
    if count < every:
        rest, kept = [images for images, _ in batches], batches  # too few to keep any
    else:
        rest, kept = _split(batches, every)
    names = {m.tensor for s in structures for m in s.members if m.role == 'in'}
    return Statistics(_consumers(model, names, rest), kept)


def _split(batches: Batches, every: int) -> Tuple[List[Tensor], Batches]:
    """The images of some batches without every so-many-th, and these in batches of the same size."""
    rest: List[Tensor] = []
    kept: Dict[Tuple[int, ...], Batches] = {}
    first = 0
    for images, classes in batches:
        chosen = (torch.arange(len(images), device=images.device) + first) % every == every - 1
        first += len(images)
        rest.append(images[~chosen])
        labels = None if classes is None else classes[chosen]
        kept.setdefault(tuple(images.shape[1:]), []).append((images[chosen], labels))
    merged: Batches = []
    size = max(map(len, rest))
    for alike in kept.values():
        parts = torch.cat([images for images, _ in alike]).split(size)
        known = [classes for _, classes in alike if classes is not None]
        labelled = len(known) == len(alike)
        merged += zip(parts, torch.cat(known).split(size) if labelled else [None] * len(parts))
    return [images for images in rest if len(images)], [batch for batch in merged if len(batch[0])]


def _consumers(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> Dict[str, Consumer]:
    count, first = sum(map(len, batches)), 0
    with eval_mode(model), plain_attention(model):
        readers, _ = list_readers(model, batches[0][:1])
        sums = {name: (Sums(), Sums()) for name, reader in readers.items() if name in names and not reader.is_norm}

        def add(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            if name in sums:
                groups, features, _ = call.matrix(call.weight).shape
                rows = call.rows(sample_positions(name, call.positions, count, groups, features))
                numbers = torch.arange(rows.shape[1], device=rows.device) + first
                held_out = numbers % HELD_OUT == HELD_OUT - 1
                for total, chosen in zip(sums[name], (~held_out, held_out)):
                    part = rows[:, chosen].flatten(1, 2)
                    total.add(part, part[:, :, :0])
            return run()

        for images in progress(batches, 'reading activations'):
            with Watch(model, len(images), add):
                model(images)
            first += len(images)
    return {name: _consumer(name, readers[name], *totals) for name, totals in sums.items()}


def _consumer(name: str, reader: Reader, fit: Sums, held_out: Sums) -> Consumer:
    whole = fit + held_out
    centred = reader.has_intercept
    covariance = ((whole.centred() if centred else whole).xx / whole.count).float()
    if not covariance.isfinite().all():
        raise PruningError(
            f'{name} reads values that are not finite; run the model in float32, or give criterion= and widths= that '
            f'need no data')
    consumer = Consumer(name, reader, covariance, (whole.x / whole.count).float())
    return replace(consumer, damping=_damping(consumer.matrix, fit, held_out, centred))


def _damping(matrix: Tensor, fit: Sums, held_out: Sums, centred: bool) -> float:
    """The damping at which a layer without half of its features comes nearest to its outputs on rows held out."""
    if not (fit.count and held_out.count):
        return max(DAMPINGS)
    train = ((fit.centred() if centred else fit).xx / fit.count).float()
    to_mean = (fit.x / fit.count).float() if centred else torch.zeros_like(fit.x).float()
    test, mean = (held_out.xx / held_out.count).float(), (held_out.x / held_out.count).float()
    energy = (train.diagonal(dim1=1, dim2=2)[..., None] * matrix.square()).sum((0, 2))
    gone = energy.argsort()[:len(energy) // 2]
    errors = []
    for damping in DAMPINGS:
        lost = matrix - refitted(_damped(train, damping), matrix, gone)
        to_bias = torch.einsum('gf,gfo->go', to_mean, lost)
        on_average = torch.einsum('gf,gfo->go', mean, lost)
        errors.append(float((lost * (test @ lost)).sum() + (to_bias.square() - 2 * to_bias * on_average).sum()))
    return DAMPINGS[int(np.argmin(errors))]


def _damped(covariance: Tensor, damping: float) -> Tensor:
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    added = (damping * diagonal.mean(1, keepdim=True)).clamp_min(1e-12)
    return covariance + torch.diag_embed(added.expand_as(diagonal))


def refitted(covariance: Tensor, matrix: Tensor, gone: Tensor) -> Tensor:
    """A weight without some features, the others refitted, shape (groups, features, outputs).

    Args:
        covariance: Damped covariance of what it reads, shape (groups, features, features).
        matrix: The weight.
        gone: The features that go.
    """
    stays = torch.ones(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    stays[gone] = False
    left, lost = covariance[:, stays], matrix[:, ~stays]
    factor, info = torch.linalg.cholesky_ex(left[:, :, stays])
    if info.any():  # too little damping for single precision
        factor = torch.linalg.cholesky(left[:, :, stays].double()).to(matrix)
    change = torch.cholesky_solve(left[:, :, ~stays] @ lost, factor)
    result = torch.zeros_like(matrix)
    result[:, stays] = matrix[:, stays] + change
    return result
