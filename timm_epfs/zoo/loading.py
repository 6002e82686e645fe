"""Models by the name that a user gives: timm's, torchvision's, and saved ones."""
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import timm
from timm.models import get_model_args, resolve_model_input_args
from torch import nn

from ..core import PruningError, one_line
from ..plan import Plan
from ..surgery import TORCHVISION, build_base
from .origin import note_origin
from .rebuilding import rebuilding_args

__all__ = ['base_of', 'create_model', 'load_model', 'model_args', 'plan_of', 'present_base_of']


def create_model(name: str, pretrained: bool = False, /, **model_args: Any) -> nn.Module:
    """Build a model by name, in evaluation mode, ready to be cut.

    Args:
        name: timm name, ``'torchvision/<name>'``, or a saved model: ``'local-dir:<folder>'``, ``'hf-hub:<repo>'``.
        pretrained: Load its weights.
        **model_args: Keyword arguments of the model.

    Raises:
        PruningError: There is no such model, it can't be built with these arguments, or it has no weights that are
            read here.
    """
    if name.startswith(TORCHVISION):
        return _create_torchvision(name, pretrained, model_args).eval()
    if name.startswith(('local-dir:', 'hf-hub:')):
        with one_line(f"{name} can't be loaded"):
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    else:
        model = build_base(name, model_args, pretrained=pretrained)
    return note_origin(model.eval()) if pretrained else model.eval()


def _create_torchvision(name: str, pretrained: bool, model_args: Dict[str, Any]) -> nn.Module:
    if pretrained:
        raise PruningError(
            f"{name}: torchvision's weights are pickles, and no pickle is read here; load them yourself and give the "
            f'module: prune(model, base={name!r}), or convert them to safetensors for --checkpoint'
        )
    model = build_base(name, model_args)
    model._timm_epfs_base = name, dict(model_args)  # timm's models know this of themselves
    return model


def base_of(model: nn.Module) -> Tuple[Optional[str], Dict[str, Any]]:
    """The name and the keyword arguments by which a model's dense base is built.

    Returns:
        They are None and empty where the model doesn't say: a module of the user's own, or features of a model.
    """
    plan = plan_of(model)
    if plan is not None:
        return plan.base, plan.base_args
    base = getattr(model, '_timm_epfs_base', None)
    if base is not None:
        return base
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    architecture = cfg.get('architecture') if isinstance(cfg, dict) else getattr(cfg, 'architecture', None)
    args = dict(get_model_args(model))
    if architecture and timm.is_model(architecture) and 'features_only' not in args:
        return architecture, args
    return None, {}


def present_base_of(model: nn.Module, base: Optional[str] = None) -> Tuple[Optional[str], Dict[str, Any]]:
    """As ``base_of``, with arguments for the model as it is now: its classifier may have been replaced by hand.

    Where no arguments build the model as it is, they are those that it was built with, and ``save_pretrained`` refuses
    it.

    Args:
        model: The model, dense or pruned.
        base: Its name, where the model doesn't say it.
    """
    name, args = base_of(model) if base is None else (base, {})
    if name is not None:
        with suppress(PruningError):
            args = rebuilding_args(model, name, args, plan_of(model))
    return name, args


def plan_of(model: nn.Module) -> Optional[Plan]:
    """The plan by which a model was pruned; None for a dense model."""
    plan = getattr(model, 'pruning_plan', None)
    return plan if isinstance(plan, Plan) else None


def load_model(name: str, pretrained: bool = False, img_size: Optional[int] = None) -> nn.Module:
    """A model by its name, or with its weights from the folder that it was saved in.

    Args:
        name: As ``create_model`` takes it, or a folder.
        pretrained: Load a name's published weights.
        img_size: Pixels, None for the model's own.

    Raises:
        PruningError: There is no such model.
    """
    if Path(name).is_dir() and not timm.is_model(name):
        name, pretrained = f'local-dir:{name}', True
    return create_model(name, pretrained, **model_args(name, img_size, {}))


def model_args(name: str, img_size: Optional[int], given: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments of a model; an image size only where its structure depends on it.

    Args:
        name: As ``create_model`` takes it.
        img_size: Pixels, None for the model's own.
        given: Its other arguments; those of None are left out.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if img_size is None or name.startswith(TORCHVISION):
        return given
    try:
        resolved = resolve_model_input_args(name, {'img_size': img_size}, **given)
    except Exception:  # whatever is wrong with the name is said better where the model is built
        return given
    return {name: value for name, value in resolved.items() if name == 'img_size' or name in given}
