"""Masks on the weights of whatever reads a unit, and nowhere else.

A zero in the column that a consumer contracts with a channel is the same as a zero in the channel, whatever norm,
activation or gate stands between (members with the role ``'in'``); a block is scaled where its branches end. It takes a
weight-sized multiply instead of an activation-sized one, works under DDP, autocast and torch.compile, and folds away
exactly.

All masks of a model are one flat vector. It is neither a parameter nor a buffer: optimizers, weight decay,
``zero_grad``, clipping, DDP and checkpoints of the model never see it. The parameters stay the same objects, under
longer names while the masks are on.
"""
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..core import PruningError, Structure

__all__ = ['Masks', 'is_maskable', 'is_masked', 'unmasked_name']

Place = Tuple[Tuple[int, ...], torch.Tensor]


def is_maskable(structure: Structure) -> bool:
    """Whether there is a weight that scales every unit of a structure."""
    return any(_scales(structure, member.role) for member in structure.members)


def _scales(structure: Structure, role: str) -> bool:
    return structure.kind == 'blocks' or role == 'in'


class Masks:
    """The masks of some structures of a model, all ones at first.

    The network runs with ``train_masks`` in training mode and with ``eval_masks`` in evaluation mode. Both have one
    entry per unit and two more: a constant one for what no structure owns, and a probe. The probe is added to the loss,
    so that its gradient says how the loss was scaled before the backward pass (by a ``GradScaler``, by accumulation).

    A deep copy of the model (EMA) shares the masks: it has its own averaged weights and the current masks, so that its
    zeros are exact.

    Args:
        model: The model, changed in place until ``remove``.
        structures: What gets masks.
        learn: Whether the masks get gradients.

    Attributes:
        slices: Entries of each structure's units.
        units: Number of units.
        owner: Number of the structure of each unit, shape (units,).
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure], learn: bool = True):
        self._model = model
        self._learn = learn
        ends = np.cumsum([0, *(s.units for s in structures)])
        self.slices = {s.name: slice(int(a), int(b)) for s, a, b in zip(structures, ends, ends[1:])}
        self.units = int(ends[-1])
        self.owner = torch.from_numpy(np.repeat(np.arange(len(structures)), [s.units for s in structures]))
        self._order = {name: list(module._parameters) for name, module in model.named_modules()}
        tensors = _aliases(model)
        shapes = {name: named[0][1].shape for name, named in tensors.items()}
        places = _places(structures, self.slices, self.units, shapes)
        self._anchor = tensors[next(iter(places))][0][1]
        self.train_masks = torch.ones(self.units + 2, device=self._anchor.device, requires_grad=True)
        self.eval_masks = torch.ones(self.units + 2, device=self._anchor.device)
        for name, found in places.items():
            for path, tensor in tensors[name]:
                owner, _, leaf = path.rpartition('.')
                scale = Scale(self, [(shape, torch.from_numpy(index).to(tensor.device)) for shape, index in found])
                module = model.get_submodule(owner)
                scale.train(module.training)
                _register(module, leaf, scale)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'Masks':
        return self

    def values(self, training: bool) -> torch.Tensor:
        """What the network runs with in this mode, shape (units + 2,)."""
        if not training:
            return self.eval_masks
        return self.train_masks if self._learn else self.train_masks.detach()

    def probe(self) -> torch.Tensor:
        """A zero to add to the loss."""
        entry = self.train_masks[-1]
        return entry - entry.detach()

    def take_gradient(self) -> torch.Tensor:
        """The gradient since the last call, the probe's last, shape (units + 1,), float32, on the masks' device.

        Raises:
            PruningError: There was no backward, or its loss lacked the probe.
        """
        grad, self.train_masks.grad = self.train_masks.grad, None
        if grad is None:
            raise PruningError(
                'step() was called before any backward; first call loss.backward() on a loss with '
                'learner.penalty(target) in it')
        device = self._anchor.device
        if grad.device != device:  # the model was moved
            self.train_masks = self.train_masks.detach().to(device).requires_grad_()
            self.eval_masks = self.eval_masks.to(device)
        return torch.cat([grad[:self.units], grad[-1:]]).to(device)

    @torch.no_grad()
    def set(self, train_masks: torch.Tensor, eval_masks: torch.Tensor) -> None:
        """Write new masks, shape (units,) each, in place, so that nothing is compiled again."""
        self.train_masks[:self.units].copy_(train_masks)
        self.eval_masks[:self.units].copy_(eval_masks)

    def split(self, flat: np.ndarray) -> Dict[str, np.ndarray]:
        """One value per unit, by structure name."""
        return {name: flat[at] for name, at in self.slices.items()}

    def remove(self) -> None:
        """Give the model its dense weights back. Copies that share the masks keep them."""
        _unwrap(self._model, self._order, folded=False)

    def fold(self, copy: nn.Module) -> nn.Module:
        """Multiply the masks of evaluation mode into the weights of a copy of the model, which is changed in place."""
        _unwrap(copy, self._order, folded=True)
        return copy


class Scale(nn.Module):
    """Multiplies a weight by the masks of the units that it reads.

    Args:
        masks: The masks.
        places: For each of some dims of the weight, the shape that its scales broadcast from, and for each of its
            entries the position of its mask.
    """

    def __init__(self, masks: Masks, places: List[Place]):
        super().__init__()
        self.masks = masks
        self.places = places

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        values = self.masks.values(self.training).to(weight.device)
        for shape, index in self.places:
            weight = weight * values.index_select(0, index).to(weight.dtype).view(shape)
        return weight

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.places = [(shape, fn(index)) for shape, index in self.places]
        return self


def _register(module: nn.Module, leaf: str, scale: Scale) -> None:
    """Put a scale on a tensor, which isn't touched.

    torch's own registration writes to the tensor, which then forgets the hooks by which a DDP wrapper made earlier
    gathers its gradient. It is shown a stand-in.
    """
    registry = '_parameters' if leaf in module._parameters else '_buffers'
    tensor = getattr(module, registry)[leaf]
    getattr(module, registry)[leaf] = nn.Parameter(torch.empty(0)) if registry == '_parameters' else torch.empty(0)
    parametrize.register_parametrization(module, leaf, scale, unsafe=True)
    getattr(module.parametrizations[leaf], registry)['original'] = tensor


def is_masked(model: nn.Module) -> bool:
    """Whether a learner's masks are on the model."""
    return any(isinstance(module, Scale) for module in model.modules())


def unmasked_name(model: nn.Module, name: str) -> str:
    """The name that a parameter of a model has once the masks are off."""
    owner, _, leaf = name.rpartition('.')
    if leaf != 'original' or not any(isinstance(step, Scale) for step in model.get_submodule(owner).children()):
        return name
    module, _, tensor = owner.rpartition('parametrizations.')
    return module + tensor


def _aliases(model: nn.Module) -> Dict[str, List[Tuple[str, torch.Tensor]]]:
    """Every name of every tensor, by each of its names, itself first."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    by_id: Dict[int, List[Tuple[str, torch.Tensor]]] = {}
    for name, tensor in named:
        by_id.setdefault(id(tensor), []).append((name, tensor))
    return {name: by_id[id(tensor)] for name, tensor in named}


def _places(
        structures: Sequence[Structure],
        slices: Mapping[str, slice],
        one: int,
        shapes: Mapping[str, Sequence[int]],
) -> Dict[str, List[Tuple[Tuple[int, ...], np.ndarray]]]:
    """For each tensor, the vectors of mask positions that scale it. An entry that several own is scaled by each."""
    vectors: Dict[Tuple[str, int], List[np.ndarray]] = {}
    for structure in structures:
        for member in structure.members:
            if not _scales(structure, member.role):
                continue
            layers = vectors.setdefault((member.tensor, member.dim), [])
            free = next((layer for layer in layers if (layer[member.index] == one).all()), None)
            if free is None:
                free = np.full(shapes[member.tensor][member.dim], one, dtype=np.int64)
                layers.append(free)
            free[member.index] = np.arange(slices[structure.name].start, slices[structure.name].stop)[:, None]
    places: Dict[str, List[Tuple[Tuple[int, ...], np.ndarray]]] = {}
    for (tensor, dim), layers in vectors.items():
        shape = tuple(-1 if d == dim else 1 for d in range(len(shapes[tensor])))
        places.setdefault(tensor, []).extend((shape, layer) for layer in layers)
    return places


@torch.no_grad()
def _unwrap(model: nn.Module, order: Mapping[str, List[str]], folded: bool) -> None:
    """Take the masks off a model.

    Not by torch's ``remove_parametrizations``: that takes the property off the class, which deep copies share.
    """
    for path, module in list(model.named_modules()):
        found = dict(_scaled(module))
        if not found:
            continue
        for steps in found.values():
            steps.eval()
        values = {name: getattr(module, name).clone() for name in found} if folded else {}
        originals = {name: found[name].original for name in found}
        for name, value in values.items():
            originals[name].copy_(value)
        if len(found) < len(module.parametrizations):
            raise PruningError(f'{path} has parametrizations that are not the learner\'s; remove these first')
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, original in originals.items():
            registry = module._parameters if isinstance(original, nn.Parameter) else module._buffers
            registry[name] = original
        module._parameters = {name: module._parameters[name] for name in order.get(path, module._parameters)}


def _scaled(module: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """Parametrizations of a module that are masks."""
    if parametrize.is_parametrized(module):
        for name, steps in module.parametrizations.items():
            if any(isinstance(step, Scale) for step in steps):
                yield name, steps
