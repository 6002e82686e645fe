"""The model that a user asks to prune: built from its name, or taken out of its wrappers."""
from contextlib import nullcontext
from inspect import signature
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

import torch
from timm.utils import unwrap_model
from torch import nn

from ..core import PruningError, nearest_keyword, one_line
from ..surgery import is_masked
from ..zoo import create_model
from .request import make_request

__all__ = ['check_unmasked', 'prepare_model']


def prepare_model(
        model: Union[str, nn.Module],
        device: Optional[Union[str, torch.device]],
        pretrained: bool,
        model_args: Dict[str, Any],
        ours: Sequence[Callable],
) -> nn.Module:
    """The dense model as a module without DDP or compile wrappers.

    Args:
        model: A name, or a module.
        device: Device of a model that is given by name.
        pretrained: Whether to load published weights, where ``model`` is a name.
        model_args: Keyword arguments of the model, where ``model`` is a name.
        ours: Functions of this library whose keywords may have been misspelt, and so ended up in ``model_args``.

    Raises:
        PruningError: There is no such model, or an argument doesn't go with it.
    """
    if isinstance(model, str):
        return _build(model, device, pretrained, model_args, ours)
    if not isinstance(model, nn.Module):
        raise PruningError(
            f'the model is neither a name nor a module: {type(model).__name__} was given; give a name or an nn.Module')
    _refuse_misspelt(model_args, ours)
    if model_args:
        raise PruningError(
            f'{next(iter(model_args))}= was given with a module, but goes with a model\'s name; build the module with '
            f'it instead')
    if device is not None:
        raise PruningError(
            f'device={str(device)!r} was given with a module, but goes with a model\'s name; move the module there '
            f'instead')
    if pretrained:
        raise PruningError(
            f'pretrained={pretrained!r} was given with a module, but goes with a model\'s name; load the weights into '
            f'the module instead')
    model = unwrap_model(model)
    check_unmasked(model)
    return model


def check_unmasked(model: nn.Module) -> None:
    """Raise ``PruningError`` where a learner's masks are on a model."""
    if is_masked(model):
        raise PruningError(
            "the model has a learner's masks; cut it with learner.export(), or take them off with learner.remove()")


def _build(
        name: str,
        device: Optional[Union[str, torch.device]],
        pretrained: bool,
        model_args: Dict[str, Any],
        ours: Sequence[Callable],
) -> nn.Module:
    """Build a model on its device. On the meta device its weights never exist."""
    on_meta = device is not None and str(device) == 'meta'
    try:
        with torch.device('meta') if on_meta else nullcontext():
            model = create_model(name, pretrained, **model_args)
    except PruningError as e:
        if isinstance(e.__cause__, TypeError):  # the model knows no such argument
            _refuse_misspelt(model_args, ours)
        raise
    if device is None or on_meta:
        return model
    with one_line(f'device {str(device)!r} can\'t be used'):
        return model.to(device)


def _refuse_misspelt(model_args: Mapping[str, Any], ours: Sequence[Callable]) -> None:
    """Raise ``PruningError`` where what was taken for an argument of the model is one of ours, or nearly one."""
    for name in model_args:
        if name in signature(make_request).parameters:
            example = f'pruner({name}=…)' if name == 'macs' else f'pruner(macs=…, {name}=…)'
            raise PruningError(f'{name}= belongs to the cut, {example}, not to Pruner or inspect; give it there')
        near = nearest_keyword(name, *ours)
        if near:
            raise PruningError(f'unknown keyword {name}=; did you mean {near}=?')
