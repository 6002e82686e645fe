"""Pruned models in timm's own registry: one entry point that builds any base, cut to a plan.

``config.json`` carries the plan in its ``model_args``, so that ``timm.create_model('hf-hub:…')`` and
``('local-dir:…')`` need nothing but ``import timm_epfs``.
"""
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Union

from timm.models import PretrainedCfg, register_model
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, download_cached_file, download_from_hf
from torch import Tensor, nn

from ..core import PruningError
from ..plan import Plan
from ..surgery import TORCHVISION, DeferredInit, apply_plan, build_base, inflate_checkpoint
from .config import check_config, is_from_config, saved_tensors
from .features import feature_args
from .origin import note_origin
from .weights import read_weights

__all__ = ['ARCHITECTURE', 'WEIGHT_SOURCES', 'as_plan', 'describe_torchvision', 'epfs_pruned']

ARCHITECTURE = 'epfs_pruned'
Read = Callable[[Optional[Mapping[str, Tensor]]], Mapping[str, Tensor]]
WEIGHT_SOURCES = ('state_dict', 'file', 'hf_hub_id', 'url')  # fields of a pretrained_cfg


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
    names no source they are the base's own dense weights, cut.

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
    cfg = pretrained_cfg.to_dict() if isinstance(pretrained_cfg, PretrainedCfg) else pretrained_cfg
    if is_from_config(cfg):
        check_config(cfg, pretrained_model_args or {})
    plan = as_plan(plan)
    if cfg == PretrainedCfg(architecture=ARCHITECTURE).to_dict():
        # What timm's scripts pass for an architecture without a config of its own: it says nothing about the base.
        cfg = None
    described = {**(cfg if isinstance(cfg, dict) else {}), **(pretrained_cfg_overlay or {})}
    read = None
    if pretrained and any(described.get(source) for source in WEIGHT_SOURCES):
        saved = partial(saved_tensors, plan, cfg, pretrained_model_args or {}) if is_from_config(cfg) else None
        read = partial(_read_weights, described, cache_dir, saved)

    if (plan.base or '').startswith(TORCHVISION):
        return _pruned_torchvision(plan, described, pretrained, read, kwargs)

    described.setdefault('architecture', ARCHITECTURE)
    return _pruned_timm(
        plan,
        described,
        read,
        kwargs,
        pretrained=pretrained,
        pretrained_cfg=cfg,
        pretrained_cfg_overlay={**(pretrained_cfg_overlay or {}), 'architecture': described['architecture']},
        pretrained_model_args={k: v for k, v in (pretrained_model_args or {}).items() if k != 'plan'},
        cache_dir=cache_dir,
    )


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


def _pruned_timm(
        plan: Plan,
        cfg: Mapping[str, Any],
        read: Optional[Read],
        kwargs: Dict[str, Any],
        **create_args: Any,
) -> nn.Module:
    """Build and cut, and load weights.

    Args:
        plan: What stays.
        cfg: Description of the weights, overlay included.
        read: Reads weights of the pruned model; None for none, or for the base's own.
        kwargs: The user's arguments of the base.
        **create_args: Further arguments of ``timm.create_model``.
    """
    with DeferredInit() as deferred:
        kwargs, features = feature_args(plan, kwargs, deferred)

        def build(**more: Any) -> nn.Module:
            model = build_base(plan.base, {**plan.base_args, **kwargs}, **{**create_args, **more}, **features)
            return model if features else apply_plan(model, plan, deferred)

        if read is None:
            model = note_origin(build()) if create_args['pretrained'] else build()
        else:
            model = None if features else build(pretrained=False)
            weights = read(None if features else model.state_dict())
            if features or not _load_as_it_is(model, weights):
                # timm adapts dense weights to classes, channels and image size by rules of each base. It is given dense
                # weights, with zeros in the entries that the plan then cuts.
                dense = {'state_dict': inflate_checkpoint(weights, plan), 'source': None}
                model = build(pretrained_cfg_overlay={**create_args['pretrained_cfg_overlay'], **dense})
                model.pretrained_cfg.pop('state_dict')
                model.pretrained_cfg.update({k: cfg[k] for k in ('source', 'state_dict') if cfg.get(k)})
    if not features:
        model.pruning_plan = plan
    return model


def _pruned_torchvision(
        plan: Plan,
        cfg: Mapping[str, Any],
        pretrained: bool,
        read: Optional[Read],
        kwargs: Mapping[str, Any],
) -> nn.Module:
    if pretrained and read is None:
        raise PruningError(f'no weights are known for {plan.base} cut to a plan; use pretrained=False and load them')
    with DeferredInit() as deferred:
        model = apply_plan(build_base(plan.base, {**plan.base_args, **kwargs}), plan, deferred)
        if read is not None:
            weights = read(model.state_dict())
            try:
                model.load_state_dict(weights)
            except RuntimeError as e:
                reason = str(e).splitlines()[1].strip()
                raise PruningError(f'the weights do not fit {plan.base} with {dict(kwargs)}: {reason[:200]}') from e
    model.pruning_plan = plan
    return describe_torchvision(model, plan, cfg)


def _load_as_it_is(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Load weights that are the model's own in every name and shape, and say whether they are."""
    own = model.state_dict()
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        return False
    model.load_state_dict(weights)
    return True


def _read_weights(
        cfg: Mapping[str, Any],
        cache_dir: Optional[Union[str, Path]],
        saved: Optional[Callable[[], Mapping[str, Tensor]]],
        own: Optional[Mapping[str, Tensor]],
) -> Mapping[str, Tensor]:
    """Read weights from where a pretrained_cfg says, in timm's order of precedence, safetensors only.

    Args:
        cfg: Description of the weights.
        cache_dir: Where downloads go.
        saved: Makes the tensors that a config.json tells of; None where there is none.
        own: The tensors of the model that is being made. Weights like these need no config.json to tell of them.
    """
    if cfg.get('source') == 'local-dir':
        path = Path(cfg['file']) / HF_SAFE_WEIGHTS_NAME
    elif cfg.get('source') == 'hf-hub':
        path = None
    elif cfg.get('state_dict'):
        return cfg['state_dict']
    elif cfg.get('file') or not cfg.get('hf_hub_id'):
        path = Path(cfg.get('file') or cfg['url'])
    else:
        path = None

    name = str(path or cfg.get('hf_hub_filename') or HF_SAFE_WEIGHTS_NAME)
    if not name.endswith('.safetensors'):
        raise PruningError(f'weights in {name} are not read, only safetensors are; convert them')
    if path is None:
        path = download_from_hf(cfg['hf_hub_id'], name, cache_dir=cache_dir)
    elif cfg.get('url') and not cfg.get('file'):
        path = download_cached_file(cfg['url'], cache_dir=cache_dir)
    return read_weights(path, saved and own, saved)
