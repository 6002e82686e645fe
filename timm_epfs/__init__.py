"""Pruned timm models: any zoo model smaller in one call, shared as an ordinary timm model.

``import timm_epfs`` adds its models to timm's registry; the rest is loaded when it's first used.
"""
from typing import TYPE_CHECKING, Any, List

from . import models, registry, variants  # noqa: F401, registered by their import
from .errors import PruningError
from .version import __version__

if TYPE_CHECKING:
    from .api import prune
    from .calibrate import recalibrate_bn
    from .criteria import CRITERIA
    from .hub import save_pretrained
    from .methods import BNSFP, EPFS, SFP, SSS, OneShot, Scratch
    from .pictures import plot
    from .plan import Plan
    from .push import push_to_hub
    from .report import inspect
    from .surgery import rebuild, slice_checkpoint
    from .variants import register

__all__ = [
    'BNSFP', 'CRITERIA', 'EPFS', 'OneShot', 'Plan', 'PruningError', 'SFP', 'SSS', 'Scratch', '__version__', 'inspect',
    'plot', 'prune', 'push_to_hub', 'rebuild', 'recalibrate_bn', 'register', 'save_pretrained', 'slice_checkpoint',
]

_HOMES = {
    'BNSFP': 'methods',
    'CRITERIA': 'criteria',
    'EPFS': 'methods',
    'OneShot': 'methods',
    'Plan': 'plan',
    'SFP': 'methods',
    'SSS': 'methods',
    'Scratch': 'methods',
    'inspect': 'report',
    'plot': 'pictures',
    'prune': 'api',
    'push_to_hub': 'push',
    'rebuild': 'surgery',
    'recalibrate_bn': 'calibrate',
    'register': 'variants',
    'save_pretrained': 'hub',
    'slice_checkpoint': 'surgery',
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import importlib
    value = getattr(importlib.import_module(f'.{_HOMES[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))
