"""``features_only`` for pruned models: timm's feature wrappers, put around the model that is already cut."""
from typing import Any, Dict, Tuple, Type

import torch
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from ..core import PruningError
from ..plan import Plan
from ..surgery import DeferredInit, apply_plan, build_base

__all__ = ['feature_args']

_FEATURE_CLASSES = {
    'list': FeatureListNet,
    'dict': FeatureDictNet,
    'hook': FeatureHookNet,
    'fx': FeatureGraphNet,
    'getter': FeatureGetterNet,
}


def feature_args(
        plan: Plan,
        kwargs: Dict[str, Any],
        deferred: DeferredInit,
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Split off the arguments of feature extraction, and have its wrapper cut the model that it is about to wrap.

    Args:
        plan: What stays.
        kwargs: Arguments of ``timm.create_model``; with ``features_only`` the model comes back wrapped and cut.
        deferred: Where the model is built.

    Returns:
        The other arguments, and those of feature extraction: none without ``features_only``.
    """
    kwargs = dict(kwargs)
    if not kwargs.pop('features_only', False):
        return kwargs, {}
    args = {'features_only': True, **{k: kwargs.pop(k) for k in ('out_indices',) if k in kwargs}}
    feature_cls = kwargs.pop('feature_cls', None)
    if feature_cls is None:
        feature_cls = type(build_base(plan.base, {**plan.base_args, **kwargs}, torch.device('meta'), **args))
        if not issubclass(feature_cls, tuple(_FEATURE_CLASSES.values())):
            # Model classes of features alone (EfficientNetFeatures, …) lack tensors that the plan names.
            feature_cls = FeatureGetterNet
    elif isinstance(feature_cls, str):
        if feature_cls not in _FEATURE_CLASSES:
            raise PruningError(f'feature_cls={feature_cls!r} is unknown; one of {", ".join(_FEATURE_CLASSES)}')
        feature_cls = _FEATURE_CLASSES[feature_cls]
    return kwargs, {**args, 'feature_cls': _cut_then_wrap(feature_cls, plan, deferred)}


def _cut_then_wrap(feature_cls: Type[nn.Module], plan: Plan, deferred: DeferredInit) -> Type[nn.Module]:
    class CutThenWrap(feature_cls):
        """Stands in for ``feature_cls`` in timm's builder, which asks for its base classes and then calls it."""

        def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            return feature_cls(apply_plan(model, plan, deferred), *args, **kwargs)

    return CutThenWrap
