"""Objects that hold a model's settings, such as a dataclass or a dict that its modules have as ``self.config``."""
import copy
from typing import Any, Dict

from torch import Tensor, nn

__all__ = ['changed_settings', 'settings_of']


def settings_of(value: Any) -> Dict[str, Any]:
    """What a dict or an object holds, by name. Empty where it isn't an object that only holds settings.

    An object that can be called, or that holds something that can, does more than that.

    >>> from types import SimpleNamespace
    >>> settings_of(SimpleNamespace(width=8, blocks={'heads': 2}))
    {'width': 8, 'blocks': {'heads': 2}}
    >>> settings_of(nn.Linear(2, 3))
    {}
    """
    held = value if type(value) is dict else getattr(value, '__dict__', None)
    if type(held) is not dict or callable(value) or isinstance(value, Tensor):
        return {}
    if any(isinstance(each, (Tensor, nn.Module)) or callable(each) for each in held.values()):
        return {}
    return {name: each for name, each in held.items() if isinstance(name, str) and name and not name.startswith('_')}


def changed_settings(value: Any, changes: Dict[str, Any]) -> Any:
    """A shallow copy with some settings changed.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(width=8, depth=2)
    >>> changed_settings(config, {'width': 6}), config
    (namespace(width=6, depth=2), namespace(width=8, depth=2))
    """
    if type(value) is dict:
        return {**value, **changes}
    copied = copy.copy(value)
    vars(copied).update(changes)  # a frozen dataclass, too
    return copied
