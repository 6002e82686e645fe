"""``measure_sensitivity``: narrows one structure after the other, and compares the network's outputs.

A structure is narrowed in place, without cutting. The layers that read its units get weights that make up for those
that go (least squares on the covariance of what they read), and BatchNorm behind them gets the mean and the variance
that go with these. What counts is how far the *output* then is from the dense model's, on images that weren't used for
this. Errors of single layers tell much less: some are made up for further on, others grow.
"""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import are_logits, divergence, has_classes, output_tensors
from ..core import PruningError, Structure, eval_mode, named_tensors, one_line, progress
from .curves import Curve, Sensitivity, removed_counts
from .statistics import Statistics, refitted

__all__ = ['measure_sensitivity']


@torch.no_grad()
def measure_sensitivity(
        model: nn.Module,
        structures: Sequence[Structure],
        scores: Mapping[str, np.ndarray],
        statistics: Statistics,
) -> Sensitivity:
    """Measure the curves of some structures. A block goes as a whole, and nothing makes up for it.

    Args:
        model: The model. Its weights are changed and changed back.
        structures: The structures.
        scores: The units with the lowest scores go first, by structure name, shape (units,).
        statistics: Of the same structures.

    Raises:
        PruningError: The outputs have no values to compare, or not always the same shapes.
    """
    curves = {}
    with eval_mode(model), one_line('sensitivity can\'t be measured on this model'):
        dense = [_outputs(model(images)) for images, _ in statistics.measure_on]
        classes = [labels for _, labels in statistics.measure_on]
        if not all(tensor.isfinite().all() for batch in dense for tensor in batch):
            raise PruningError(
                'its output isn\'t finite on these images; give criterion= and widths= that need no data')
        may_be_logits = has_classes(model)
        _, _, top1 = _compare(dense, dense, classes, may_be_logits)
        for structure in progress(structures, 'measuring sensitivity'):
            order = np.argsort(scores[structure.name], kind='stable')
            rows = []
            removed = sorted(set(removed_counts(structure.units)))
            for count in removed:
                with _narrowed(model, structure, order[:count], statistics) as error:
                    outputs = [_outputs(model(images)) for images, _ in statistics.measure_on]
                diverged, same, accuracy = _compare(outputs, dense, classes, may_be_logits)
                rows.append((diverged, error, same, accuracy))
            curves[structure.name] = Curve(order, tuple(removed), *zip(*rows))
    return Sensitivity(curves, sum(len(images) for images, _ in statistics.measure_on), top1)


@contextmanager
def _narrowed(model: nn.Module, structure: Structure, gone: np.ndarray, statistics: Statistics) -> Iterator[float]:
    """A model without some units of a structure. Yields the error of the layers that read them."""
    tensors = named_tensors(model)
    consumers = statistics.consumers_of(structure)
    refitted_here = {consumer.name for consumer in consumers}
    before: Dict[str, Tensor] = {}
    errors = []

    def change(name: str, value: Tensor) -> None:
        before.setdefault(name, tensors[name].clone())
        tensors[name].copy_(value)

    try:
        for member in structure.members:
            silences = member.role == 'in' or structure.kind == 'blocks'
            if silences and member.tensor not in refitted_here:
                tensor = tensors[member.tensor]
                index = torch.from_numpy(member.index[gone].ravel()).to(tensor.device)
                change(member.tensor, tensor.index_fill(member.dim, index, 0))
        for consumer in consumers:
            call, bias, norm, old = consumer.reader.call, consumer.reader.bias, consumer.reader.norm, consumer.matrix
            new = refitted(consumer.damped, old, consumer.features(structure)[gone].flatten())
            change(consumer.name, call.weight_of(new))
            old_variance, new_variance, lost = (
                (matrix * (consumer.covariance @ matrix)).sum(1).flatten() for matrix in (old, new, old - new))
            errors.append(float(lost.sum() / old_variance.sum().clamp_min(1e-30)))
            shift = torch.einsum('gf,gfo->go', consumer.mean, old - new).flatten()
            if bias:
                change(bias, tensors[bias] + shift)
            elif norm:
                change(norm, tensors[norm] - shift)
            if norm:
                variance = norm[:-len('mean')] + 'var'
                ratio = torch.where((old_variance > 0) & (new_variance > 0), new_variance / old_variance, 1.0)
                change(variance, tensors[variance] * ratio)
        yield float(np.mean(errors)) if errors else np.nan
    finally:
        for name, value in before.items():
            tensors[name].copy_(value)


def _outputs(output: Any) -> List[Tensor]:
    return [tensor.double() for tensor in output_tensors(output)]  # small divergences would drown in rounding errors


def _compare(
        outputs: Sequence[List[Tensor]],
        dense: Sequence[List[Tensor]],
        classes: Sequence[Optional[Tensor]],
        may_be_logits: bool,
) -> Tuple[float, float, float]:
    """Divergence, share of the images whose class stays, and top-1 in percent."""
    counts = np.array([len(batch[0]) for batch in dense])
    divergences = np.array([float(divergence(*pair, may_be_logits)) for pair in zip(outputs, dense)])
    mean = float((counts * divergences).sum() / counts.sum())
    if not are_logits(dense[0], may_be_logits):
        return mean, np.nan, np.nan
    new, old = (torch.cat([batch[0] for batch in side]).argmax(1) for side in (outputs, dense))
    same = float((new == old).float().mean())
    labelled = [labels for labels in classes if labels is not None]
    if len(labelled) < len(classes):
        return mean, same, np.nan
    return mean, same, float(100 * (new == torch.cat(labelled)).float().mean())
