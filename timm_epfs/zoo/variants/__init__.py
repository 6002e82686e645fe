"""The plans of this folder, and your own, as models that timm knows by name.

A file ``<name>.json`` is a plan and makes ``<name>`` a timm model; ``<name>.<tag>.safetensors`` beside it are its
weights, under timm's ``<name>.<tag>``. Names come from the folder's listing: a plan is read when its model is made.
"""
import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

import timm
from timm.layers import to_2tuple
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_path
from torch import nn

from ...core import PruningError, one_line
from ...plan import Plan
from ..config import check_config, is_from_config
from ..entry_point import as_plan, epfs_pruned
from ..weights import has_weights

__all__ = ['names', 'plan_path', 'register', 'tags', 'weights_path']

FOLDER = Path(__file__).parent

# timm's register_model looks for its module's default_cfgs.
default_cfgs: Dict[str, Any] = {}

_NAME = r'[a-zA-Z_]\w*'
_HUB = 'hf-hub:'
# What a base's default cfg says about its dense weights.
_OF_THE_WEIGHTS = dict(
    url=None, file=None, state_dict=None, hf_hub_id=None, hf_hub_filename=None, source=None,
    architecture=None, tag=None, custom_load=False,
)


def names() -> List[str]:
    """Names of the variants that come with timm_epfs: base, ``_epfs``, percent of the MACs that are removed.

    ``_blocks`` follows where residual blocks were removed.
    """
    return list(_tags_by_name())


def tags(name: str) -> List[str]:
    """Tags of the weights that come with a variant."""
    return _tags_by_name().get(name, [])


def _tags_by_name() -> Dict[str, List[str]]:
    """What the folder holds: tags of weights by name, in one listing."""
    files = sorted(os.listdir(FOLDER))
    found: Dict[str, List[str]] = {file.removesuffix('.json'): [] for file in files if file.endswith('.json')}
    for file in files:
        name, _, tag = file.removesuffix('.safetensors').partition('.')
        if file.endswith('.safetensors') and name in found:
            found[name].append(tag)
    return found


def plan_path(name: str) -> Path:
    """The plan of a variant."""
    return FOLDER / f'{name}.json'


def weights_path(name: str, tag: str) -> Path:
    """Weights of a variant."""
    return FOLDER / f'{name}.{tag}.safetensors'


def register(
        name: str,
        plan: Union[Plan, Mapping[str, Any], str, Path],
        weights: Optional[Union[str, Path]] = None,
) -> None:
    """Add a name of your own to timm's registry, in this process.

    >>> register('my_resnet', plan_path('resnet18_epfs55'))
    >>> timm.create_model('my_resnet', num_classes=10).num_classes
    10

    Args:
        name: The name; letters, digits and underscores.
        plan: What to build: a plan, its dict, or the path of its JSON.
        weights: For ``pretrained=True``: the path of a ``.safetensors``, a folder written by ``save_pretrained``, or
            ``'hf-hub:org/name'``.

    Raises:
        PruningError: The name is taken or not valid, or the plan or the weights can't be read.
    """
    if not isinstance(name, str) or not re.fullmatch(_NAME, name, re.ASCII):
        raise PruningError(
            f'register: {str(name)[:80]!r} is not a valid timm name; use letters, digits and underscores')
    if timm.is_model(name):
        raise PruningError(f'register: timm has a model named {name!r} already; choose another name')
    plan = as_plan(plan)
    if plan.base in (None, name):
        raise PruningError(f'register: the plan of {name!r} names no base to build; give base= when pruning')
    _add(name, plan, {name: _describe(plan, weights)})


def _register_folder() -> None:
    for name, its_tags in _tags_by_name().items():
        base_cfg = get_pretrained_cfg(name.rpartition('_epfs')[0]) or PretrainedCfg()
        cfg = dataclasses.replace(base_cfg, **_OF_THE_WEIGHTS)
        cfgs = {f'{name}.{tag}': dataclasses.replace(cfg, file=str(weights_path(name, tag))) for tag in its_tags}
        _add(name, plan_path(name), cfgs or {name: cfg})


def _add(name: str, plan: Union[Plan, Path], cfgs: Mapping[str, PretrainedCfg]) -> None:
    """Register an entry point with its default cfgs, by name and tag."""
    default_cfgs.update(generate_default_cfgs(cfgs))
    register_model(_entry_point(name, plan))


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """Entry points as attributes, as timm's own modules have them.

    They are looked up in timm's registry and not set: a model may be called like a name that this module uses.
    """
    if name not in default_cfgs:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return model_entrypoint(name)


def _entry_point(name: str, plan: Union[Plan, Path]) -> Callable[..., nn.Module]:
    def create(
            pretrained: bool = False,
            pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
            pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
            **kwargs: Any,
    ) -> nn.Module:
        if isinstance(pretrained_cfg, PretrainedCfg):
            pretrained_cfg = pretrained_cfg.to_dict()
        if is_from_config(pretrained_cfg):
            check_config(pretrained_cfg, kwargs.get('pretrained_model_args') or {})
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay).to_dict()
        if pretrained and not has_weights(cfg):
            raise _no_weights(name, plan)
        return epfs_pruned(pretrained, cfg, plan=plan, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{name.rpartition("_epfs")[0] or name}, cut. Arguments are those of the base.'
    return create


def _no_weights(name: str, plan: Union[Plan, Path]) -> PruningError:
    if isinstance(plan, Plan):
        return PruningError(f'{name} has no weights; use pretrained=False, or register it with weights=')
    base = name.rpartition('_epfs')[0]
    return PruningError(
        f"{name} has no published weights; use pretrained=False, or cut the weights of {base}: "
        f"timm.create_model('epfs_pruned', plan=timm_epfs.zoo.variants.plan_path({name!r}), pretrained=True)"
    )


def _describe(plan: Plan, weights: Optional[Union[str, Path]]) -> PretrainedCfg:
    """The default cfg for timm: the folder's own, or the base's, adapted to the plan's arguments."""
    if weights is not None and Path(weights).is_dir():
        with one_line(f'register: weights not read from {weights}'):
            cfg, _, _ = load_model_config_from_path(weights)
            return PretrainedCfg(**cfg)
    cfg = dataclasses.replace(get_pretrained_cfg(plan.base) or PretrainedCfg(), **_OF_THE_WEIGHTS)
    args, (channels, *size) = plan.base_args, cfg.input_size
    cfg.num_classes = args.get('num_classes', cfg.num_classes)
    cfg.input_size = (args.get('in_chans', channels), *to_2tuple(args.get('img_size', size)))
    if weights is None:
        return cfg
    if str(weights).startswith(_HUB):
        return dataclasses.replace(cfg, source='hf-hub', hf_hub_id=str(weights)[len(_HUB):])
    if Path(weights).suffix != '.safetensors' or not Path(weights).is_file():
        raise PruningError(
            f"register: no weights in {str(weights)!r}; give a .safetensors file, a folder written by save_pretrained, "
            "or 'hf-hub:org/name'"
        )
    return dataclasses.replace(cfg, file=str(weights))


_register_folder()
