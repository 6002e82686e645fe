"""Pruned timm models: any zoo model smaller in one call, shared as an ordinary timm model.

``import timm_epfs`` adds its models to timm's registry; the rest is loaded when it's first used.

The packages, in the order in which data flows; each knows only those before it:

``core`` → ``trace`` → ``activations`` → ``importance`` → ``latency`` → ``allocate`` → ``plan`` → ``surgery`` → ``zoo``
→ ``pruner`` → ``learn`` → ``report`` → ``hub`` → ``training`` → ``integrations`` → ``deploy`` → ``cli``
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any, List

from . import zoo  # noqa: F401, registered by its import
from .core import Budget, PruningError
from .version import __version__

if TYPE_CHECKING:
    from .hub import push_to_hub
    from .importance import CRITERIA
    from .learn import BNSFP, EPFS, SFP, SSS, OneShot, Scratch
    from .plan import Plan, PrunedModel
    from .pruner import Pruner, inspect, prune
    from .report import html_report, plot
    from .surgery import compensate, cut_optimizer, rebuild, recalibrate_bn, slice_checkpoint
    from .zoo import load_pretrained, save_pretrained
    from .zoo.variants import register

__all__ = [
    'BNSFP', 'Budget', 'CRITERIA', 'EPFS', 'OneShot', 'Plan', 'PrunedModel', 'Pruner', 'PruningError', 'SFP', 'SSS',
    'Scratch', '__version__', 'compensate', 'cut_optimizer', 'html_report', 'inspect', 'load_pretrained', 'plot',
    'prune', 'push_to_hub', 'rebuild', 'recalibrate_bn', 'register', 'save_pretrained', 'slice_checkpoint',
]

# Where each name that is loaded on first use lives.
_HOMES = {
    'BNSFP': 'learn',
    'CRITERIA': 'importance',
    'EPFS': 'learn',
    'OneShot': 'learn',
    'Plan': 'plan',
    'PrunedModel': 'plan',
    'Pruner': 'pruner',
    'SFP': 'learn',
    'SSS': 'learn',
    'Scratch': 'learn',
    'compensate': 'surgery',
    'cut_optimizer': 'surgery',
    'html_report': 'report',
    'inspect': 'pruner',
    'load_pretrained': 'zoo',
    'plot': 'report',
    'prune': 'pruner',
    'push_to_hub': 'hub',
    'rebuild': 'surgery',
    'recalibrate_bn': 'surgery',
    'register': 'zoo.variants',
    'save_pretrained': 'zoo',
    'slice_checkpoint': 'surgery',
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'.{_HOMES[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(set(globals()) | set(__all__))
