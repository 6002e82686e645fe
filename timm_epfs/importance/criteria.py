"""``score``: how much each unit matters, as one score per unit, higher = keep.

The formulas are torch-pruning's (``torch_pruning.pruner.importance``), and so are the reduction over the layers that
share a unit and the normalisation. This file builds the groups that torch-pruning scores. Each member of a structure
becomes a matrix with one row per unit, which holds all entries that the unit owns, as the weight of a stand-in linear
layer. So torch-pruning sees the same kind of group for every layer (a plain, grouped or transposed convolution,
attention heads, the columns after a flatten), and it never sees the model itself.
"""
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from ..core import Member, PruningError, Structure, nearest, one_line
from .gradients import gradients_of
from .obs import energy, obs
from .statistics import Statistics, gather_statistics

__all__ = ['CRITERIA', 'Criterion', 'WITHOUT_DATA', 'check_criterion', 'score']


@dataclass(frozen=True)
class Criterion:
    """How to score a structure.

    Attributes:
        help: What it measures, and its source.
        importance: Name of torch-pruning's class. Empty where the score doesn't depend on the weights.
        options: Arguments of that class.
        members: Types of members that count: ``'out'`` and ``'in'`` dims of convolutions and linear layers; ``'bn'``
            and ``'ln'`` scales. As in torch-pruning, biases and depthwise convolutions don't count.
        normalizer: Name of torch-pruning's normalisation over the units of a structure, which makes the scores of
            different structures comparable.
        needs: What data the score needs: ``'images'`` (``statistics.py``), ``'targets'``, which is images with targets,
            for gradients, or nothing (``''``).
    """
    help: str
    importance: str = ''
    options: Mapping[str, Any] = field(default_factory=dict)
    members: Tuple[str, ...] = ('out', 'in', 'bn', 'ln')
    normalizer: str = 'mean'
    needs: str = ''


# A criterion that is no class of torch-pruning's needs an entry here and a branch in ``score``, as 'random' has; or,
# if it is computed from what layers read, an entry in ``FROM_STATISTICS``.
CRITERIA: Dict[str, Criterion] = {
    'l1': Criterion(
        'Sum of absolute weights (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).',
        'GroupMagnitudeImportance', {'p': 1}),
    'l2': Criterion(
        'Sum of squared weights over the coupled layers (Fang et al., DepGraph, CVPR 2023).',
        'GroupMagnitudeImportance', {'p': 2}),
    'fpgm': Criterion(
        'Sum of distances to the other units, whole unit to whole unit, on squared weights (He et al., Filter Pruning '
        'via Geometric Median, CVPR 2019).',
        'FPGMImportance', members=('out', 'in')),
    # torch-pruning's BNScaleImportance is this class with p=1 on BatchNorm layers. The stand-ins hold only these.
    'bn_scale': Criterion(
        'Absolute BatchNorm scale (Liu et al., Network Slimming, ICCV 2017). '
        'Structures without BatchNorm are scored by l2.',
        'GroupMagnitudeImportance', {'p': 1}, members=('bn',)),
    'lamp': Criterion(
        'Squared weights, divided by the sum of those of all units whose weights are at least as large (Lee et al., '
        'Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021).',
        'LAMPImportance', {'p': 2}, normalizer='lamp'),
    'random': Criterion('Uniform in [0, 1), as a control experiment. Needs no weights.', members=()),
    'uniform': Criterion(
        'One for every unit: every layer loses the same share, and its first units stay. Needs no weights.'),
    # Without 'bn': torch-pruning's Taylor looks for GroupNorm's pruning function there, and never scores BatchNorm.
    'taylor': Criterion(
        'Absolute weight times gradient of the loss (Molchanov et al., Importance Estimation, CVPR 2019). Needs data.',
        'GroupTaylorImportance', members=('out', 'in', 'ln'), needs='targets'),
    'obdc': Criterion(
        'Squared weight times diagonal Fisher information (Wang et al., EigenDamage, ICML 2019, its OBD-C baseline). '
        'Needs data, and one backward per image.',
        'OBDCImportance', {'num_classes': None}, members=('out',), needs='targets'),
    'energy': Criterion(
        'Variance that a unit adds to the outputs of the layers that read it. Structures that no layer reads are '
        'scored by l2. Needs images.', needs='images'),
    'obs': Criterion(
        'Error of the layers that read a unit, after their best weights for what is left (Hassibi and Stork, Optimal '
        'Brain Surgeon, NeurIPS 1992). Structures that no layer reads are scored by l2. Needs images.', needs='images'),
}
FROM_STATISTICS = {'energy': energy, 'obs': obs}
WITHOUT_DATA = tuple(name for name, criterion in CRITERIA.items() if not criterion.needs)


def check_criterion(name: str) -> None:
    """Raise ``PruningError`` if there is no criterion of this name."""
    if name not in CRITERIA:
        near = nearest(name, CRITERIA, cutoff=0)[0]
        raise PruningError(f'unknown criterion {name!r}, nearest is {near!r}; choose one of {", ".join(CRITERIA)}')


def score(
        model: nn.Module,
        structures: Iterable[Structure],
        criterion: str = 'l2',
        data: Optional[Iterable[Any]] = None,
        loss_fn: Optional[Callable[[Any, Any], torch.Tensor]] = None,
        seed: int = 0,
        statistics: Optional[Statistics] = None,
) -> Dict[str, np.ndarray]:
    """Score every unit of every structure.

    Scores are comparable across structures, because the scores of a structure are divided by their mean. There are
    exceptions: ``'lamp'`` has a normalisation of its own, ``'random'`` and ``'uniform'`` need none, and blocks, which
    have one unit each, are divided by the mean over all blocks.

    A structure whose weights are all zero scores zero. A structure that has none of the members that a criterion looks
    at is scored on all its parameters; for ``'bn_scale'``, it is scored by ``'l2'``.

    The model runs in evaluation mode. Neither the model nor the global random state is changed.

    Args:
        model: The model that the structures were found on, or a copy of it.
        structures: The structures to score.
        criterion: One of ``CRITERIA``.
        data: Batches of images, or tuples that start with images, for ``'obs'`` and ``'energy'``. Batches (images,
            targets, …), for ``'taylor'`` and ``'obdc'``.
        loss_fn: ``loss_fn(outputs, targets)``, for ``'taylor'`` and ``'obdc'``. None: cross-entropy; ``'obdc'`` then
            draws the targets from the model's own predictions, as EigenDamage does. With a ``loss_fn``, ``'obdc'`` uses
            the targets of the data (the empirical Fisher information).
        seed: Seed of ``'random'``, and of the targets that ``'obdc'`` draws.
        statistics: What ``gather_statistics`` found on the data, where it was done before.

    Returns:
        Scores by structure name, float64, shape (units,), higher = keep.

    Raises:
        PruningError: The criterion is unknown, its data is missing or empty, weights are on the meta device, the
            structures are of another model, or ``'bn_scale'`` finds no BatchNorm.
    """
    check_criterion(criterion)
    structures = list(structures)
    if criterion == 'random':
        return {s.name: _random(s, seed) for s in structures}
    if criterion == 'uniform':
        return {s.name: np.ones(s.units) for s in structures}
    if not structures:
        return {}

    if CRITERIA[criterion].needs == 'images':
        return _from_statistics(model, structures, criterion, data, statistics)
    rules = {s.name: _rule(model, s, criterion) for s in structures}
    if criterion == 'bn_scale' and all(rule is not CRITERIA['bn_scale'] for rule, _ in rules.values()):
        raise PruningError(
            "criterion 'bn_scale' needs BatchNorm, found no BatchNorm scale in any structure; choose another "
            "criterion, such as 'l2'")
    tensors = {m.tensor: _tensor(model, m) for _, members in rules.values() for m in members}
    needs_targets = CRITERIA[criterion].needs == 'targets'
    with one_line(f'criterion {criterion!r} fails on its data; check that the model and the loss take the batches'):
        gradients = gradients_of(model, tensors, criterion, data, loss_fn, seed) if needs_targets else {}
    scores = {}
    for s in structures:
        rule, members = rules[s.name]
        rule = replace(rule, normalizer=None) if s.kind == 'blocks' else rule
        scores[s.name] = _score(s, rule, members, tensors, gradients).cpu().numpy().astype(np.float64)
    return _normalise_blocks(structures, scores)


def _from_statistics(
        model: nn.Module,
        structures: Sequence[Structure],
        criterion: str,
        data: Optional[Iterable[Any]],
        statistics: Optional[Statistics],
) -> Dict[str, np.ndarray]:
    """Scores from what the layers that read the units see; by l2 where none is known to read them."""
    if statistics is None:
        if data is None:
            raise PruningError(f'criterion {criterion!r} needs images, found none; give data=, batches of images')
        statistics = gather_statistics(model, structures, data)
    readers = {s.name: statistics.consumers_of(s) for s in structures}
    scores = score(model, [s for s in structures if not readers[s.name]])
    for s in structures:
        if readers[s.name]:
            raw = FROM_STATISTICS[criterion](s, readers[s.name])
            scores[s.name] = raw / raw.mean() if raw.any() else raw
    return {s.name: scores[s.name] for s in structures}


def _normalise_blocks(structures: Sequence[Structure], scores: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Divide the scores of blocks, which are structures of one unit, by the mean over all blocks."""
    blocks = [s.name for s in structures if s.kind == 'blocks']
    mean = np.mean([scores[name] for name in blocks]) if blocks else 0.0
    return {name: score / mean if name in blocks and mean > 0 else score for name, score in scores.items()}


def _random(structure: Structure, seed: int) -> np.ndarray:
    """Random scores. They are seeded by name, so that they don't depend on which other structures are scored.

    torch-pruning's class isn't used because it draws from torch's global generator.
    """
    return np.random.default_rng([seed % 2 ** 32, zlib.crc32(structure.name.encode())]).random(structure.units)


def _rule(model: nn.Module, structure: Structure, criterion: str) -> Tuple[Criterion, List[Member]]:
    """The criterion that scores a structure, and the members that it looks at."""
    names = (criterion, 'l2') if criterion == 'bn_scale' else (criterion,)
    for name in names:
        members = [m for m in structure.members if _member_type(model, m) in CRITERIA[name].members]
        if members:
            return CRITERIA[name], members
    members = [m for m in structure.members if isinstance(_tensor(model, m), nn.Parameter)]
    if not members:
        raise PruningError(
            f"criterion {criterion!r} found no parameter in structure {structure.name!r}; use criterion='random', or "
            f'leave the structure out')
    return CRITERIA[names[-1]], members


def _member_type(model: nn.Module, member: Member) -> str:
    """The member's type, as in ``Criterion.members``. Empty where torch-pruning doesn't score such members."""
    owner, _, attribute = member.tensor.rpartition('.')
    _tensor(model, member)  # raises if there is no such tensor
    module = model.get_submodule(owner)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith('proj_weight'):
        return member.role
    if attribute != 'weight':
        return ''
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups == module.out_channels > 1
        return '' if depthwise else member.role
    if isinstance(module, nn.Linear):
        return member.role
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 'bn'
    return 'ln' if isinstance(module, nn.LayerNorm) else ''


def _tensor(model: nn.Module, member: Member) -> torch.Tensor:
    """The tensor of a member, with checks that the member fits it and that it has values."""
    owner, _, attribute = member.tensor.rpartition('.')
    try:
        tensor = getattr(model.get_submodule(owner), attribute)
        fits = member.index.size == 0 or member.index.max() < tensor.shape[member.dim]
    except (AttributeError, IndexError):
        fits = False
    if not fits:
        raise PruningError(
            f'the structures need dim {member.dim} of {member.tensor!r}, but the model has no such tensor or a shorter '
            f'one; score the model that the structures were found on')
    if tensor.is_meta:
        raise PruningError(
            f'{member.tensor!r} is on the meta device and has no values to score; load weights, or use '
            f"criterion='random'")
    return tensor


class _StandIn(nn.Linear):
    """A linear layer with one output per unit, as torch-pruning's importances expect a layer."""

    def __init__(self, weight: torch.Tensor, gradient: Optional[torch.Tensor] = None):
        nn.Module.__init__(self)  # nn.Linear's would draw random weights
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.weight.grad = gradient


def _rows(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """The entries of a tensor that each unit owns, shape (units, entries)."""
    tensor = tensor.detach().float().movedim(member.dim, 0)
    index = member.index.reshape(-1)
    is_whole_dim = len(index) == len(tensor) and np.array_equal(index, np.arange(len(index)))
    if not is_whole_dim:  # indexing would copy
        tensor = tensor[torch.from_numpy(index).to(tensor.device)]
    return tensor.reshape(len(member.index), -1)


def _score(
        structure: Structure,
        rule: Criterion,
        members: Sequence[Member],
        tensors: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Scores of one structure by torch-pruning, shape (units,)."""
    from torch_pruning.dependency import Dependency, Group, Node
    from torch_pruning.pruner import function, importance

    group, prune = Group(), function.prune_linear_out_channels
    # Taylor and OBD-C sort the indices, which a slice doesn't support. For all others, a slice avoids a copy.
    indices = torch.arange(structure.units) if gradients else slice(None)
    for member in members:
        gradient = _rows(gradients[member.tensor], member) if gradients else None
        node = Node(_StandIn(_rows(tensors[member.tensor], member), gradient), None, member.tensor)
        group.add_dep(Dependency(prune, prune, node, node), indices)
        group[-1].root_idxs = range(structure.units)

    # Normalise separately: where all scores are zero, the normalisers would divide zero by zero.
    scorer = getattr(importance, rule.importance)(**rule.options)
    scorer.normalizer = None
    if rule.importance == 'OBDCImportance':
        scorer.steps = 1  # the mean over images is already taken
        scorer.Fisher = {dep.layer: dep.layer.weight.grad for dep, _ in group}
    raw = scorer(group)
    return scorer._normalize(raw, rule.normalizer) if raw.any() else raw
