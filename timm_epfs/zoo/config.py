"""What a config.json may decide: how a saved model is built and described. Not which files are read, nor how."""
from dataclasses import fields
from functools import partial
from typing import Any, Dict, Mapping

from timm.models import PretrainedCfg
from torch import Tensor

from ..core import ANYTHING, DICT, INTEGER, PruningError, Rule, check
from ..plan import Plan, check_arguments, check_size
from ..surgery import Skeleton, build_base

__all__ = ['check_config', 'is_from_config', 'saved_tensors']

# timm itself sets the place that a config came from; a config that names another reads what it likes.
_PLACES = {'local-dir': 'file', 'hf-hub': 'hf_hub_id'}
_FORBIDDEN = ('url', 'file', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'custom_load')
# Arguments that ask for a feature extractor; the saved tensors don't depend on them.
_OF_FEATURES = ('features_only', 'feature_cls', 'out_indices')

_IN_CFG = 'config.json: pretrained_cfg'
_IN_ARGS = 'config.json: model_args'
_CFG = {
    **{field.name: ANYTHING for field in fields(PretrainedCfg)},
    'num_classes': INTEGER,
    'input_size': Rule('three numbers', lambda size: isinstance(size, (list, tuple)) and len(size) == 3),
}
_PLAN = Rule('a plan itself, not the name of one', DICT.holds)


def is_from_config(cfg: Any) -> bool:
    """Whether a pretrained_cfg is what timm read from a config.json: it adds the place to it."""
    return isinstance(cfg, dict) and cfg.get('source') in tuple(_PLACES)


def check_config(cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> None:
    """Check what timm read from a config.json, before anything is built or opened.

    Args:
        cfg: Its ``pretrained_cfg``, with the place that timm added.
        model_args: Its ``model_args``.

    Raises:
        PruningError: They decide what isn't theirs to decide, or don't describe a model.
    """
    check(model_args, DICT, _IN_ARGS)
    check_size([dict(cfg), {**model_args, 'plan': None}], 'config.json')  # a plan is measured when it's read
    cfg = check(cfg, _CFG, _IN_CFG)
    for name in _FORBIDDEN:
        if cfg.get(name) and name != _PLACES.get(cfg.get('source')):
            raise PruningError(f'{_IN_CFG}: {name!r} is not for a config to set; remove it')
    check_arguments({name: cfg[name] for name in ('num_classes', 'input_size') if name in cfg}, _IN_CFG)
    if 'plan' in model_args:
        check(model_args['plan'], _PLAN, f'{_IN_ARGS}.plan')
    check_arguments(_arguments(model_args), _IN_ARGS)


def saved_tensors(plan: Plan, cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> Dict[str, Tensor]:
    """The tensors of a model as it was saved, on the meta device, by its own config.json.

    Raises:
        PruningError: There is no such model.
    """
    described = {name: value for name, value in cfg.items() if name not in (*_FORBIDDEN, 'source')}
    args = {**plan.base_args, **_arguments(model_args)}
    if 'num_classes' in args and 'num_classes' in cfg:
        args['num_classes'] = cfg['num_classes']  # a head may have been changed since it was built
    return Skeleton(plan, partial(build_base, plan.base, args, 'meta', pretrained_cfg=described)).tensors()


def _arguments(model_args: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in model_args.items() if name not in ('plan', *_OF_FEATURES)}
