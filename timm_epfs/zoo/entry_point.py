"""Pruned models in timm's own registry: one entry point that builds any base, cut to a plan.

``config.json`` carries the plan in its ``model_args``, so that ``timm.create_model('hf-hub:…')`` and
``('local-dir:…')`` need nothing but ``import timm_epfs``.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Union

from timm.models import PretrainedCfg, register_model
from torch import Tensor, nn

from ..core import PruningError, first_few
from ..plan import Plan
from ..surgery import TORCHVISION, Skeleton, apply_plan, build_base, inflate_checkpoint
from .description import ARCHITECTURE, Description
from .features import FeatureExtraction
from .origin import note_origin
from .weights import shape_misfits

__all__ = ['as_plan', 'describe_torchvision', 'epfs_pruned']

_FEATURE_ARGS = ('feature_cls', 'out_indices')
_DROP_RATE = ('drop_rate', 'drop_path_rate', 'drop_block_rate')  # for training, no part of a model's description
_PLAIN = (bool, int, float, str, list, tuple, dict)


@register_model
def epfs_pruned(
        pretrained: bool = False,
        pretrained_cfg: Optional[Union[str, Dict[str, Any], PretrainedCfg]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        plan: Optional[Union[Plan, Mapping[str, Any], str, Path]] = None,
        cache_dir: Optional[Union[str, Path]] = None,
        pretrained_model_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """A pruned model: the plan's base, cut. Arguments mean what they mean for the base.

    With ``pretrained=True``, weights come from where ``pretrained_cfg`` says (a pushed repo, a local folder). Where it
    doesn't say, they are the base's own dense weights, cut.

    Args:
        pretrained: Load weights.
        pretrained_cfg: As in ``timm.create_model``.
        pretrained_cfg_overlay: As in ``timm.create_model``.
        plan: A plan, its dict, or the path of its JSON.
        cache_dir: Where downloads go.
        pretrained_model_args: Arguments that the saved weights' model was built with; timm passes them.
        **kwargs: Further arguments of the base (``num_classes``, ``in_chans``, ``features_only``, …).

    Raises:
        PruningError: The plan can't be read or applied, or the weights don't fit.
    """
    description = Description.checked(pretrained_cfg, pretrained_cfg_overlay, pretrained_model_args, cache_dir)
    plan = _of_this_model(as_plan(plan), description, kwargs)
    make = _pruned_torchvision if (plan.base or '').startswith(TORCHVISION) else _pruned_timm
    return make(plan, description, pretrained, kwargs)


def as_plan(plan: Optional[Union[Plan, Mapping[str, Any], str, Path]]) -> Plan:
    """A plan from itself, its dict, or the path of its JSON.

    Raises:
        PruningError: It is none of these, or can't be read.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    raise PruningError(f'{ARCHITECTURE} needs a plan, found {plan!r:.40}; pass plan=<path of a plan.json>')


def describe_torchvision(model: nn.Module, plan: Plan, cfg: Optional[Mapping[str, Any]] = None) -> nn.Module:
    """Set on a torchvision model the attributes that timm's own helpers read, where they are missing."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    num_classes = plan.base_args.get('num_classes', linears[-1].out_features if linears else 1000)
    fields = {'interpolation': 'bilinear', 'num_classes': num_classes, 'architecture': ARCHITECTURE, **(cfg or {})}
    pretrained_cfg = PretrainedCfg(**fields).to_dict()
    defaults = {
        'num_classes': num_classes,
        'num_features': linears[-1].in_features if linears else 0,
        'pretrained_cfg': pretrained_cfg,
        'default_cfg': pretrained_cfg,
    }
    for name, value in defaults.items():
        if not hasattr(model, name):
            setattr(model, name, value)
    return model


def _of_this_model(plan: Plan, description: Description, kwargs: Mapping[str, Any]) -> Plan:
    """The plan with the arguments that this model is built with, where they aren't those of the plan."""
    saved, classes = description.model_args, description.num_classes
    args = dict(plan.base_args)
    if classes is not None and 'num_classes' in args:
        args['num_classes'] = classes
    args |= {
        name: value for name, value in kwargs.items()
        if name not in (*_FEATURE_ARGS, 'features_only') and not name.endswith(_DROP_RATE)
        and isinstance(value, _PLAIN) and (name not in saved or value != saved[name])
    }
    return replace(plan, base_args=args)


def _pruned_torchvision(plan: Plan, description: Description, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    if pretrained and not description.has_weights:
        raise PruningError(f'no weights are known for {plan.base} cut to a plan; use pretrained=False and load them')
    skeleton = Skeleton(plan, partial(build_base, plan.base, {**plan.base_args, **kwargs}))
    if pretrained:
        weights = description.read_weights(plan, skeleton.tensors())
        misfits = shape_misfits(weights, skeleton.tensors())
        if misfits:
            raise PruningError(f'the weights do not fit {plan.base} with {dict(kwargs)}: {first_few(misfits)}')
        model = skeleton.with_weights(weights)
    else:
        model = skeleton.initialised()
    model.pruning_plan = plan
    return describe_torchvision(model, plan, description.fields)


def _pruned_timm(plan: Plan, description: Description, pretrained: bool, kwargs: Mapping[str, Any]) -> nn.Module:
    args = dict(kwargs)
    features_only = args.pop('features_only', False)
    feature_args = {name: args.pop(name) for name in _FEATURE_ARGS if features_only and name in args}
    build = partial(build_base, plan.base, {**plan.base_args, **args}, **description.create_args())
    if features_only:
        features = FeatureExtraction(build, **feature_args)
        return features.wrap(_cut_timm(plan, description, pretrained, features.build))
    model = _cut_timm(plan, description, pretrained, build)
    model.pruning_plan = plan
    return model


def _cut_timm(plan: Plan, description: Description, pretrained: bool, build: Callable[..., nn.Module]) -> nn.Module:
    """The model of a plan, with the weights that its description names; those of the base where it names none.

    Args:
        plan: What stays.
        description: What is known of the model's weights.
        pretrained: Load weights.
        build: Builds the base, dense, given further arguments of ``timm.create_model``.
    """
    if pretrained and not description.has_weights:
        return note_origin(apply_plan(build(pretrained=True), plan))
    skeleton = Skeleton(plan, build)
    if not pretrained:
        return skeleton.initialised()
    weights = description.read_weights(plan, skeleton.tensors())
    if not shape_misfits(weights, skeleton.tensors()):
        return skeleton.with_weights(weights)
    return _adapted(plan, description, weights, build)


def _adapted(
        plan: Plan,
        description: Description,
        weights: Mapping[str, Tensor],
        build: Callable[..., nn.Module],
) -> nn.Module:
    """The model of a plan, with weights of the same plan that are for other classes, channels or image sizes.

    timm adapts dense weights by rules of each base. It is given dense weights, with zeros in the entries that the plan
    then cuts.
    """
    # timm looks at 'source' before 'state_dict'; None makes it take the tensors given here.
    dense = {'state_dict': inflate_checkpoint(weights, plan), 'source': None}
    overlay = {**description.create_args()['pretrained_cfg_overlay'], **dense}
    model = apply_plan(build(pretrained=True, pretrained_cfg_overlay=overlay), plan)
    # Describe the model as it was saved, without the dense tensors.
    model.pretrained_cfg.pop('state_dict')
    fields = description.fields
    model.pretrained_cfg.update({name: fields[name] for name in ('source', 'state_dict') if fields.get(name)})
    return model
