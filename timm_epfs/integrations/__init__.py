"""Learners in the trainers of other libraries: transformers' and Lightning's ``Trainer``, and timm's tasks.

In: a training loop that isn't ours, and a budget. Out: the model that it trained, pruned.

Nothing is imported before it is asked for: none of these libraries has to be installed for the others.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core import PruningError

if TYPE_CHECKING:
    from .lightning_callback import LightningPruningCallback
    from .timm_task import PruningTask, PruningTaskMixin
    from .trainer import PruningCallback, PruningTrainerMixin

__all__ = [
    'LightningPruningCallback', 'PruningCallback', 'PruningTask', 'PruningTaskMixin', 'PruningTrainerMixin',
]

# The module of each name, and the extra that installs what it needs.
_HOMES = {
    'LightningPruningCallback': ('lightning_callback', 'lightning'),
    'PruningCallback': ('trainer', 'hf'),
    'PruningTask': ('timm_task', None),
    'PruningTaskMixin': ('timm_task', None),
    'PruningTrainerMixin': ('trainer', 'hf'),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, extra = _HOMES[name]
    try:
        value = getattr(import_module(f'.{module}', __name__), name)
    except ImportError as e:
        if extra is None:
            raise
        raise PruningError(
            f'{name} needs {e.name or "a package"}, which is not installed; pip install \'timm-epfs[{extra}]\'') from e
    globals()[name] = value
    return value
