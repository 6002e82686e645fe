"""What a config.json may decide: how a saved model is built and described. Not which files are read, nor how."""
from dataclasses import fields
from functools import partial
from typing import Any, Dict, Mapping

from timm.models import PretrainedCfg
from torch import Tensor

from ..core import PruningError
from ..plan import Plan, check_arguments, check_size
from ..surgery import Skeleton, build_base

__all__ = ['check_config', 'is_from_config', 'saved_tensors']

_FIELDS = frozenset(field.name for field in fields(PretrainedCfg))
# timm itself sets the place that a config came from; a config that names another reads what it likes.
_PLACES = {'local-dir': 'file', 'hf-hub': 'hf_hub_id'}
_FORBIDDEN = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load')
# How weights are built, not what is saved of them.
_OF_FEATURES = ('features_only', 'feature_cls', 'out_indices')


def is_from_config(cfg: Any) -> bool:
    """Whether a pretrained_cfg is what timm read from a config.json: it adds the place to it."""
    return isinstance(cfg, dict) and cfg.get('source') in tuple(_PLACES)


def check_config(cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> None:
    """Check what timm read from a config.json, before anything is built or opened.

    Args:
        cfg: Its ``pretrained_cfg``, with the place that timm added.
        model_args: Its ``model_args``.

    Raises:
        PruningError: They decide what is not theirs, or are no description of a model.
    """
    if not isinstance(model_args, Mapping):
        raise PruningError('config.json: model_args is to be an object; save the model again')
    check_size([dict(cfg), {**model_args, 'plan': None}], 'config.json')  # a plan is measured when it's read
    unknown = [str(name)[:40] for name in cfg if name not in _FIELDS]
    if unknown:
        raise PruningError(f'config.json, pretrained_cfg: unknown field {unknown[0]!r}; remove it')
    for name in _FORBIDDEN:
        if cfg.get(name) and name != _PLACES.get(cfg.get('source')):
            raise PruningError(f'config.json, pretrained_cfg: {name!r} is not for a config to set; remove it')
    size = cfg.get('input_size', [3, 224, 224])
    if not isinstance(size, (list, tuple)) or len(size) != 3 or type(cfg.get('num_classes', 0)) is not int:
        raise PruningError('config.json, pretrained_cfg: num_classes is to be an integer and input_size to be three')
    check_arguments({'num_classes': cfg.get('num_classes', 0), 'input_size': size}, 'config.json, pretrained_cfg')
    if not isinstance(model_args.get('plan', {}), Mapping):
        raise PruningError("config.json, model_args: 'plan' is no plan but the name of one; save the model again")
    check_arguments(_arguments(model_args), 'config.json, model_args')


def saved_tensors(plan: Plan, cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> Dict[str, Tensor]:
    """The tensors of a model as it was saved, on the meta device, by its own config.json.

    Raises:
        PruningError: There is no such model.
    """
    described = {name: value for name, value in cfg.items() if name not in (*_FORBIDDEN, 'source')}
    args = {**plan.base_args, **_arguments(model_args)}
    if 'num_classes' in args and 'num_classes' in cfg:
        args['num_classes'] = cfg['num_classes']  # a head may have been changed since it was built
    return Skeleton(plan, partial(build_base, plan.base, args, pretrained_cfg=described)).tensors()


def _arguments(model_args: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in model_args.items() if name not in ('plan', *_OF_FEATURES)}
