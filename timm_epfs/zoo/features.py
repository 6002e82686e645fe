"""``features_only`` for pruned models: timm's feature extractors, put around the model once it is cut."""
from functools import partial
from typing import Any, Callable, Dict, Type

from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from ..core import PruningError

__all__ = ['FeatureExtraction']

_EXTRACTORS = {
    'list': FeatureListNet,
    'dict': FeatureDictNet,
    'hook': FeatureHookNet,
    'fx': FeatureGraphNet,
    'getter': FeatureGetterNet,
}


class FeatureExtraction:
    """timm's feature extraction in two steps, so that the model can be cut in between: build it, then wrap it.

    ::

        features = FeatureExtraction(partial(timm.create_model, 'resnet18'), out_indices=(1, 2))
        dense = features.build()                       # the whole ResNet; timm's settings are stored
        net = features.wrap(apply_plan(dense, plan))   # a FeatureListNet around the cut model

    Args:
        build: Builds the model with timm, given further arguments of ``timm.create_model``.
        feature_cls: The extractor, by name or as a class; None: the one that timm uses for this model.
        **feature_args: Further arguments of feature extraction (``out_indices``).
    """

    def __init__(self, build: Callable[..., nn.Module], feature_cls: Any = None, **feature_args: Any):
        self._build_extractor = partial(build, features_only=True, **feature_args)
        self._extractor = self._default() if feature_cls is None else _by_name(feature_cls)
        self._unwrapped: Any = None

    def build(self, **create_args: Any) -> nn.Module:
        """The dense model."""
        self._unwrapped = self._build_extractor(feature_cls=_unwrapping(self._extractor), **create_args)
        return self._unwrapped.model

    def wrap(self, model: nn.Module) -> nn.Module:
        """Put around ``model`` the extractor that timm would have put around the model from the last ``build``."""
        extractor = self._extractor(model, **self._unwrapped.settings)
        for name, value in self._unwrapped.set_by_timm().items():
            setattr(extractor, name, value)
        extractor.pretrained_cfg = extractor.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
        return extractor

    def _default(self) -> Type[nn.Module]:
        extractor = type(self._build_extractor(device='meta'))
        # Model classes of features alone (EfficientNetFeatures, …) lack tensors that the plan names.
        return extractor if issubclass(extractor, tuple(_EXTRACTORS.values())) else FeatureGetterNet


def _by_name(feature_cls: Any) -> Type[nn.Module]:
    if not isinstance(feature_cls, str):
        return feature_cls
    if feature_cls not in _EXTRACTORS:
        raise PruningError(f'feature_cls={feature_cls!r} is unknown; give one of {", ".join(_EXTRACTORS)}')
    return _EXTRACTORS[feature_cls]


def _unwrapping(extractor: Type[nn.Module]) -> Type[nn.Module]:
    """A subclass of an extractor that timm builds in its place: it stores the model and the settings without wrapping.

    It is a subclass because timm chooses settings by ``issubclass``.
    """

    class Unwrapped(extractor):
        """Holds the model that it should wrap, and its settings."""

        def __init__(self, model: nn.Module, **settings: Any):
            nn.Module.__init__(self)
            self.model, self.settings = model, settings
            self._own = {'_own', *vars(self)}

        def set_by_timm(self) -> Dict[str, Any]:
            """Attributes that were set since."""
            return {name: value for name, value in vars(self).items() if name not in self._own}

    return Unwrapped
