"""What a model's code keeps in the process: a trace neither depends on it nor leaves anything there.

einops, for example, keeps in an ``lru_cache`` what it made of a pattern and its integers. So the integers of one trace,
which remember the attributes that they come from, would turn up in the next. A cache of masks would give a later, real
forward a mask without data.

The caches that the model's code uses are emptied before each torch function, and the variables of the files and classes
that it comes from are put back before each run and at the end.
"""
import gc
import sys
from collections import OrderedDict, defaultdict, deque
from contextlib import contextmanager, nullcontext
from functools import _lru_cache_wrapper
from inspect import signature
from types import FunctionType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, TypeVar

from torch import nn
from torch.overrides import TorchFunctionMode

from .calls import tensors_in

__all__ = ['Isolation', 'isolated']

_KEEP_NOTHING = frozenset({'numpy', 'timm', 'timm_epfs', 'torch', 'torchvision', *sys.stdlib_module_names})
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # and no others, which may do more than hold
_DEFINITIONS = (FunctionType, ModuleType, type)
_MISSING = object()

Result = TypeVar('Result')


class Isolation:
    """Isolates the forwards of a model's copies from the process, and the process from them, until it is left.

    >>> with Isolation(nn.Linear(2, 3)) as isolation:
    ...     isolation.run(lambda: 5)
    5

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if _may_keep(cls.__module__)}
        files = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
        owners = [*files, *classes]
        self._variables = [(owner, _variables(owner)) for owner in owners]
        self._contents = [
            (value, value.copy()) for _, variables in self._variables for value in variables.values()
            if type(value) in _CONTAINERS
        ]
        self._unused: List[Tuple[Any, Tuple]] = [] if not classes else [
            (cache, cache.cache_info()) for cache in gc.get_objects()
            if type(cache) is _lru_cache_wrapper and _may_keep(cache.__module__) and _takes_arguments(cache)
        ]
        self._used: List[Any] = []
        self._shown: Set[int] = set()  # ids of dicts of which nothing is hidden
        self._is_over = False

    def __enter__(self) -> 'Isolation':
        return self

    def __exit__(self, *error: Any) -> None:
        self._uses_more_caches()
        self._is_over = True
        self._reset()

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function, again if it used caches, or failed where something was hidden from it."""
        while True:
            try:
                with self.fresh():
                    result = function()
            except Exception as e:
                if not (self._uses_more_caches() or self._show(e)):
                    raise
            else:
                if not self._uses_more_caches():
                    return result

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Inside the block, a forward finds nothing that another one left, nor its first layer left for its second."""
        self._reset()
        with _Emptying(self._used) if self._used else nullcontext():
            yield

    def _uses_more_caches(self) -> bool:
        """Whether caches were used that weren't before."""
        used = [cache for cache, before in self._unused if cache.cache_info() != before]
        self._unused = [(cache, before) for cache, before in self._unused if not any(cache is each for each in used)]
        self._used += used
        return bool(used)

    def _show(self, error: Exception) -> bool:
        """Hide nothing of the dicts in which, as an error says, something is missing. Returns whether there are any."""
        hidden = {
            id(container): before for container, before in self._contents
            if id(container) not in self._shown and self._without_tensors(before) is not None
        }
        key = error.args[0] if isinstance(error, KeyError) and error.args else _MISSING
        self._shown |= {number for number, before in hidden.items() if key in [*before]} or set(hidden)
        return bool(hidden)

    def _reset(self) -> None:
        """Empty the caches that were used, and put back variables and what they hold.

        What dicts hold of tensors is hidden until the end, as earlier forwards may have left it.
        """
        for cache in self._used:
            cache.cache_clear()
        for owner, before in self._variables:
            _put_back(owner, before)
        for container, before in self._contents:
            if not (self._is_over or id(container) in self._shown):
                shown = self._without_tensors(before)
                before = before if shown is None else shown
            if _identities(container) != _identities(before):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before)

    @staticmethod
    def _without_tensors(contents: Any) -> Optional[Dict]:
        """A dict without the entries that hold tensors. None for one that has no such entries, or what isn't a dict."""
        if not isinstance(contents, dict):
            return None
        left = {key: value for key, value in contents.items() if not tensors_in(value)}
        return left if len(left) < len(contents) else None


class _Emptying(TorchFunctionMode):
    """Empties caches before each torch function."""

    def __init__(self, caches: Sequence[Any]):
        super().__init__()
        self._caches = caches

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for cache in self._caches:
            cache.cache_clear()
        return func(*args, **(kwargs or {}))


def isolated(model: nn.Module, run: Callable[[], Result]) -> Result:
    """Run a forward of a copy of a model in isolation. Returns what ``run`` returns; it may be called twice."""
    with Isolation(model) as isolation:
        return isolation.run(run)


def _may_keep(module: Any) -> bool:
    """Whether the code of a module may keep something in the process. torch's and timm's own is known not to."""
    return (module or '').partition('.')[0] not in _KEEP_NOTHING


def _takes_arguments(cache: Any) -> bool:
    """Whether a function takes arguments. One that doesn't makes a single object, such as a registry."""
    try:
        return bool(signature(cache).parameters)
    except ValueError:  # not a function of Python's
        return True


def _variables(owner: Any) -> Dict[str, Any]:
    """Variables of a file or a class, without what it imports and defines."""
    return {
        name: value for name, value in vars(owner).items()
        if not name.startswith('__') and not isinstance(value, _DEFINITIONS)}


def _put_back(owner: Any, before: Dict[str, Any]) -> None:
    present = _variables(owner)
    for name in [*present, *before]:
        if name not in before:
            delattr(owner, name)
        elif present.get(name, _MISSING) is not before[name]:
            setattr(owner, name, before[name])


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(id(key), id(value)) for key, value in container.items()]
    found = [id(value) for value in container]
    return set(found) if isinstance(container, set) else found
