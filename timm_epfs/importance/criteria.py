"""How much each unit matters: one score a unit, higher = keep.

The formulas, the reduction over the layers that share a unit and the normalisation are torch-pruning's
(``torch_pruning.pruner.importance``). What is done here is to hand it groups made from structures: each member becomes
a matrix with one row a unit, holding every entry that goes with the unit, in the stand-in of a linear layer. A group
then means the same whatever the layer (a plain, grouped or transposed convolution, attention heads, the columns behind
a flatten), and nothing of the model itself is handed over.
"""
import difflib
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ..core import Member, PruningError, Structure, eval_mode

__all__ = ['Criterion', 'CRITERIA', 'WITHOUT_DATA', 'check_criterion', 'score']


@dataclass(frozen=True)
class Criterion:
    """How to score a structure.

    Attributes:
        help: What it measures, and its source.
        importance: torch-pruning's class, empty where the score doesn't look at the weights.
        options: Arguments for that class.
        kinds: Members that count: ``'out'`` and ``'in'`` dims of convolutions and linear layers (biases and depthwise
            convolutions don't count, as in torch-pruning), ``'bn'`` and ``'ln'`` scales.
        normalizer: torch-pruning's, over the units of a structure. It makes structures comparable.
        needs_data: True where gradients are needed.
    """
    help: str
    importance: str = ''
    options: Mapping[str, Any] = field(default_factory=dict)
    kinds: Tuple[str, ...] = ('out', 'in', 'bn', 'ln')
    normalizer: str = 'mean'
    needs_data: bool = False


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
        'FPGMImportance', kinds=('out', 'in')),
    # BNScaleImportance is this same class with p=1 that looks for BatchNorm layers: the stand-ins hold only those.
    'bn_scale': Criterion(
        'Absolute BatchNorm scale (Liu et al., Network Slimming, ICCV 2017). '
        'Structures without BatchNorm are scored by l2.',
        'GroupMagnitudeImportance', {'p': 1}, kinds=('bn',)),
    'lamp': Criterion(
        'Squared weights over those of all units not below (Lee et al., Layer-adaptive Sparsity, ICLR 2021).',
        'LAMPImportance', {'p': 2}, normalizer='lamp'),
    'random': Criterion('Uniform in [0, 1), the control experiment. Needs no weights.', kinds=()),
    'uniform': Criterion('All alike: every layer is cut by the same share and its first units stay. Needs no weights.'),
    # torch-pruning's Taylor takes the BatchNorm branch only for GroupNorm's pruning function, and so never scores one.
    'taylor': Criterion(
        'Absolute weight times gradient of the loss (Molchanov et al., Importance Estimation, CVPR 2019). Needs data.',
        'GroupTaylorImportance', kinds=('out', 'in', 'ln'), needs_data=True),
    'obdc': Criterion(
        'Squared weight times diagonal Fisher information (Wang et al., EigenDamage, ICML 2019, its OBD-C baseline). '
        'Needs data, one backward an image.',
        'OBDCImportance', {'num_classes': None}, kinds=('out',), needs_data=True),
}

WITHOUT_DATA = tuple(name for name, criterion in CRITERIA.items() if not criterion.needs_data)


def check_criterion(name: str) -> None:
    """Raise ``PruningError`` where there is no criterion of this name."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(str(name), CRITERIA, n=1, cutoff=0)[0]
        raise PruningError(f'unknown criterion {name!r}, nearest is {near!r}: choose one of {", ".join(CRITERIA)}')


def score(
        model: nn.Module,
        structures: Iterable[Structure],
        criterion: str = 'l2',
        data: Optional[Iterable[Any]] = None,
        loss_fn: Optional[Callable[[Any, Any], torch.Tensor]] = None,
        seed: int = 0,
) -> Dict[str, np.ndarray]:
    """Score every unit of every structure.

    Scores are comparable across structures: each structure's are divided by their mean (``'lamp'``: its own rule;
    ``'random'``: as drawn; ``'uniform'``: ones). A structure whose raw scores are all zero scores zero. A structure
    that has none of the members a criterion looks at is scored on all its parameters (``'bn_scale'``: by ``'l2'``).
    The model is not changed, nor is the global random state; the model runs in evaluation mode.

    Args:
        model: The model that the structures were found on, or a copy of it.
        structures: What to score.
        criterion: One of ``CRITERIA``.
        data: For ``'taylor'`` and ``'obdc'``: batches (images, targets, ...).
        loss_fn: For ``'taylor'`` and ``'obdc'``: loss of (outputs, targets), cross entropy by default. ``'obdc'``
            without one draws the targets from the model's own predictions, as EigenDamage does; with one it uses the
            data's (the empirical Fisher).
        seed: For ``'random'`` and for the targets that ``'obdc'`` draws.

    Returns:
        Scores by structure name, float64, shape (units,), higher = keep.

    Raises:
        PruningError: Unknown criterion, data missing or empty, weights on the meta device, a model that the structures
            don't fit, or no BatchNorm for ``'bn_scale'``.
    """
    check_criterion(criterion)
    structures = list(structures)
    if criterion == 'random':
        return {s.name: _random(s, seed) for s in structures}
    if criterion == 'uniform':
        return {s.name: np.ones(s.units) for s in structures}
    if not structures:
        return {}

    rules = {s.name: _rule(model, s, criterion) for s in structures}
    if criterion == 'bn_scale' and all(rule is not CRITERIA['bn_scale'] for rule, _ in rules.values()):
        raise PruningError(
            "asked for criterion 'bn_scale', found no BatchNorm scale in any structure: choose another, such as 'l2'")
    tensors = {m.tensor: _tensor(model, m) for _, members in rules.values() for m in members}
    needs_data = CRITERIA[criterion].needs_data
    slopes = _slopes(model, tensors, criterion, data, loss_fn, seed) if needs_data else {}
    scores = {}
    for s in structures:
        rule, members = rules[s.name]
        rule = replace(rule, normalizer=None) if s.kind == 'blocks' else rule
        scores[s.name] = _score(s, rule, members, tensors, slopes).cpu().numpy().astype(np.float64)
    return _across_blocks(structures, scores)


def _across_blocks(structures: Sequence[Structure], scores: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """A block is a structure of one unit: blocks are normalised by the mean over all of them."""
    blocks = [s.name for s in structures if s.kind == 'blocks']
    mean = np.mean([scores[name] for name in blocks]) if blocks else 0.0
    return {name: score / mean if name in blocks and mean > 0 else score for name, score in scores.items()}


def _random(structure: Structure, seed: int) -> np.ndarray:
    """Seeded by name, so that a structure's scores don't depend on which others there are.

    Not by torch-pruning's class, which draws from torch's global generator.
    """
    return np.random.default_rng([seed % 2 ** 32, zlib.crc32(structure.name.encode())]).random(structure.units)


def _rule(model: nn.Module, structure: Structure, criterion: str) -> Tuple[Criterion, List[Member]]:
    """The criterion that scores the structure and the members it looks at."""
    names = (criterion, 'l2') if criterion == 'bn_scale' else (criterion,)
    for name in names:
        members = [m for m in structure.members if _kind(model, m) in CRITERIA[name].kinds]
        if members:
            return CRITERIA[name], members
    members = [m for m in structure.members if isinstance(_tensor(model, m), nn.Parameter)]
    if not members:
        raise PruningError(
            f"asked to score {structure.name!r} by {criterion!r}, found no parameter in it: use criterion='random', or "
            'leave the structure out')
    return CRITERIA[names[-1]], members


def _kind(model: nn.Module, member: Member) -> str:
    """What a member is to torch-pruning, empty where it scores no such thing."""
    owner, _, attribute = member.tensor.rpartition('.')
    _tensor(model, member)  # an unknown name is an error, not a member to skip
    module = model.get_submodule(owner)
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
    owner, _, attribute = member.tensor.rpartition('.')
    try:
        tensor = getattr(model.get_submodule(owner), attribute)
        fits = member.index.size == 0 or member.index.max() < tensor.shape[member.dim]
    except (AttributeError, IndexError):
        fits = False
    if not fits:
        raise PruningError(
            f'asked to score entries of dim {member.dim} of {member.tensor!r}, found no such tensor or a shorter one: '
            'score the model that the structures were found on')
    if tensor.is_meta:
        raise PruningError(
            f'asked to score {member.tensor!r}, found it on the meta device, without values: load weights, or use '
            "criterion='random'")
    return tensor


def _slopes(
        model: nn.Module,
        tensors: Mapping[str, torch.Tensor],
        criterion: str,
        data: Optional[Iterable[Any]],
        loss_fn: Optional[Callable[[Any, Any], torch.Tensor]],
        seed: int,
) -> Dict[str, torch.Tensor]:
    """Sum over the data of each tensor's gradient (taylor), or mean over images of its square (obdc).

    The gradient is taken by stand-in leaves that share the weights' memory, so that frozen layers have one too and no
    ``.grad`` or ``requires_grad`` of the model is touched. OBD-C goes image by image, because torch-pruning's own
    hooks hold only for convolutions without groups, dilation or bias and for linear layers on (batch, features).
    """
    if data is None:
        raise PruningError(f'criterion {criterion!r} needs data, found none: give data=, batches of (images, targets)')
    by_id = {id(tensor): tensor.detach().requires_grad_() for tensor in tensors.values()}  # a tied tensor is one leaf
    leaves = {name: by_id[id(tensor)] for name, tensor in tensors.items()}
    sums = {key: torch.zeros_like(leaf, dtype=torch.float32) for key, leaf in by_id.items()}
    device = next(iter(leaves.values())).device
    generator = torch.Generator().manual_seed(seed)
    fisher, count = criterion == 'obdc', 0
    # Forked, because a loader that shuffles draws from the global generator.
    with eval_mode(model), torch.enable_grad(), torch.random.fork_rng([device] if device.type == 'cuda' else []):
        for images, targets in _batches(data, criterion, device):
            outputs = functional_call(model, leaves, (images,))
            if fisher and loss_fn is None:
                chances = outputs.detach().float().softmax(-1).cpu()
                targets = torch.multinomial(chances, 1, generator=generator)[:, 0].to(device)
            loss = (loss_fn or F.cross_entropy)(outputs, targets)
            slopes = torch.autograd.grad(loss, list(by_id.values()), allow_unused=True, materialize_grads=True)
            for total, slope in zip(sums.values(), slopes):
                total += slope.float().square() if fisher else slope
            count += 1
    if not count:
        raise PruningError(f'criterion {criterion!r} needs data, found no batch in it: give at least one')
    return {name: sums[id(tensor)] / (count if fisher else 1) for name, tensor in tensors.items()}


def _batches(data: Iterable[Any], criterion: str, device: torch.device) -> Iterator[Tuple[torch.Tensor, Any]]:
    """The data on the device, one image at a time for OBD-C."""
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise PruningError(
                f'criterion {criterion!r} needs batches of (images, targets), found a {type(batch).__name__}: '
                'give a loader that yields both')
        images, targets = (part.to(device) if isinstance(part, torch.Tensor) else part for part in batch[:2])
        if criterion == 'obdc':
            yield from ((images[i:i + 1], targets[i:i + 1]) for i in range(len(images)))
        else:
            yield images, targets


class _Rows(nn.Linear):
    """One row a unit, as torch-pruning's importances expect a layer."""

    def __init__(self, weight: torch.Tensor, slope: Optional[torch.Tensor] = None):
        nn.Module.__init__(self)  # nn.Linear's own would draw random weights
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight)
        self.weight.grad = slope


def _rows(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """The entries of a tensor that each unit owns, shape (units, all of them)."""
    tensor = tensor.detach().float().movedim(member.dim, 0)
    index = member.index.reshape(-1)
    if len(index) != len(tensor) or not np.array_equal(index, np.arange(len(index))):
        tensor = tensor[torch.from_numpy(index).to(tensor.device)]
    return tensor.reshape(len(member.index), -1)


def _score(
        structure: Structure,
        rule: Criterion,
        members: Sequence[Member],
        tensors: Mapping[str, torch.Tensor],
        slopes: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    from torch_pruning.dependency import Dependency, Group, Node
    from torch_pruning.pruner import function, importance

    group, prune = Group(), function.prune_linear_out_channels
    for member in members:
        slope = _rows(slopes[member.tensor], member) if slopes else None
        node = Node(_Rows(_rows(tensors[member.tensor], member), slope), None, member.tensor)
        # Taylor and OBD-C sort the indices, which a slice can't; the others take a slice without copying.
        group.add_dep(Dependency(prune, prune, node, node), torch.arange(structure.units) if slopes else slice(None))
        group[-1].root_idxs = range(structure.units)
    # Raw first: the normalisers divide zero by zero where every unit is zero.
    scorer = getattr(importance, rule.importance)(**rule.options)
    scorer.normalizer = None
    if rule.importance == 'OBDCImportance':
        scorer.steps = 1  # the mean is taken already
        scorer.Fisher = {dep.layer: dep.layer.weight.grad for dep, _ in group}
    raw = scorer(group)
    return scorer._normalize(raw, rule.normalizer) if raw.any() else raw
