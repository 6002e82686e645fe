"""Pruned models from nothing but their plan: first their shapes, then their values.

A constructor makes dense models. It runs with its initialisers left out, so that large parameters cost nothing, and
what it makes is cut. Values come from a checkpoint, or from the constructor itself: it runs a second time, with each
parameter cut as soon as it is made, and so initialises it for the shape that stays.
"""
from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Mapping, Optional, Tuple, Union, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..plan import Plan, PrunedModel, check_plan
from .bases import build_base
from .construction import SkipInit, parameters_as_they_are_made
from .cutting import apply_plan
from .tensors import cut_tensor

__all__ = ['Skeleton', 'rebuild']

# What initialisers read off a layer besides its weight.
_SIZES = ('in_channels', 'out_channels', 'groups', 'in_features', 'out_features')


def rebuild(plan: Plan, device: Optional[Union[str, torch.device]] = None) -> PrunedModel:
    """The pruned model of a plan, built from its base, with fresh weights and ``model.pruning_plan`` set.

    Raises:
        PruningError: The base can't be built, or is not the one that the plan was made for.
    """
    check_plan(plan)
    model = cast(PrunedModel, Skeleton(plan, partial(build_base, plan.base, plan.base_args, device)).initialised())
    model.pruning_plan = plan
    return model


@dataclass(frozen=True, eq=False)
class _Made:
    """A parameter that a constructor makes.

    Attributes:
        module: The module that is given it.
        name: Its name in the model; None where it doesn't stay there.
        overwrites: How many initialisers overwrite the whole parameter after it is made. Only the last of them has to
            run, with what follows it. 0: the values it is made with count.
    """
    module: nn.Module
    name: Optional[str]
    overwrites: int


class Skeleton:
    """A pruned model that has everything but the values of its parameters, which are on the meta device.

    Args:
        plan: What stays.
        build: Builds the plan's base, without weights.

    Raises:
        PruningError: The base can't be built, or is not the one that the plan was made for.
    """

    def __init__(self, plan: Plan, build: Callable[[], nn.Module]):
        self._plan, self._build = plan, build
        made: List[Tuple[nn.Module, nn.Parameter]] = []
        with SkipInit() as skipped:

            def note(module: nn.Module, parameter: nn.Parameter) -> None:
                made.append((module, parameter))
                skipped.add(parameter)

            with parameters_as_they_are_made(note):
                model = build()
        names = {id(parameter): name for name, parameter in _parameters(model).items()}
        self._made = [
            _Made(module, names.get(id(parameter)), skipped.overwrites(parameter)) for module, parameter in made
        ]
        self._device = next((parameter.device for parameter in model.parameters()), None)
        _replace(model, {id(parameter): _to_meta(parameter) for parameter in model.parameters()})
        self._model = apply_plan(model, plan)

    def tensors(self) -> Dict[str, Tensor]:
        """What the model's ``state_dict()`` will be, with parameters on the meta device."""
        return self._model.state_dict()

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model with these weights.

        Args:
            weights: Tensors by name, all that the model has.
        """
        _replace(self._model, {id(p): _empty(p, self._device) for p in self._model.parameters()})
        self._model.load_state_dict(weights)
        return self._model

    def initialised(self) -> nn.Module:
        """The model with fresh weights, drawn for the shapes that stay.

        A constructor may rely on the shapes of its parameters. Then the dense model is initialised, and cut.
        """
        if self._device is None or self._device.type == 'meta':
            return self._model
        try:
            _replace(self._model, self._fresh_parameters())
        except Exception:
            self._model = apply_plan(self._build(), self._plan)
        return self._model

    def _fresh_parameters(self) -> Dict[int, nn.Parameter]:
        """Build once more, each parameter cut as soon as it is made.

        Returns:
            What stays, by the ``id`` of the parameter whose place it takes.
        """
        places, removed = _parameters(self._model), self._plan.removed()
        order = iter(self._made)
        fresh: Dict[int, nn.Parameter] = {}
        with SkipInit() as skipped:

            def cut(module: nn.Module, parameter: nn.Parameter) -> Optional[nn.Parameter]:
                made = next(order)
                place = places.get(made.name)
                if place is None:  # it goes
                    skipped.add(parameter)
                    return None
                if id(place) not in fresh:  # else it is tied
                    cut_parameter = _cut_to(place, parameter, None if made.overwrites else removed.get(made.name, {}))
                    if made.overwrites:
                        skipped.add(cut_parameter, last=made.overwrites)
                    for size in _SIZES:  # the cut sizes, from the first build: initialisers compute fan-in from them
                        if hasattr(made.module, size):
                            setattr(module, size, getattr(made.module, size))
                    fresh[id(place)] = cut_parameter
                return fresh[id(place)]

            with parameters_as_they_are_made(cut):
                self._build()
        return fresh


def _cut_to(
        place: nn.Parameter,
        parameter: nn.Parameter,
        removed: Optional[Mapping[int, np.ndarray]],
) -> nn.Parameter:
    """A parameter cut to the shape of the one whose place it takes; without its values where ``removed`` is None."""
    if parameter.shape == place.shape:
        return parameter
    if removed is None:
        return _empty(place, parameter.device)
    cut = cut_tensor(parameter, removed)
    if cut.shape != place.shape:
        raise ValueError(f'a parameter of shape {tuple(parameter.shape)} is not the one that the plan cuts')
    return nn.Parameter(cut, parameter.requires_grad)


def _parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Parameters under every name they have: tied ones appear several times."""
    return dict(model.named_parameters(remove_duplicate=False))


def _replace(model: nn.Module, parameters: Mapping[int, nn.Parameter]) -> None:
    """Replace each parameter by the one that is listed under its ``id``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameters[id(parameter)]


def _to_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to('meta'), parameter.requires_grad)


def _empty(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return nn.Parameter(values, parameter.requires_grad)
