"""What a model's code keeps in the process, such as caches: a trace neither depends on it nor leaves anything there.

einops, for example, keeps in an ``lru_cache`` what it made of a pattern and its integers. So the integers of one trace,
which remember the attributes that they come from, would turn up in the next. A cache of masks would give a later, real
forward a mask without data.

Which code a forward runs is seen by running it once as debuggers do (``sys.settrace``). What that code refers to is
isolated just before it runs: cached functions compute what they would look up, and dicts, lists, sets and plain
variables are put back before each further run and at the end.
"""
import sys
from collections import deque
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch import nn

from .caches import is_cached, uncached
from .calls import tensors_in
from .copies import is_plumbing, meta_copy, quiet

__all__ = ['Isolation', 'isolated']

_SKIPPED = frozenset({'torch', 'numpy', *sys.stdlib_module_names})
# Their models keep nothing in the process, so it isn't looked for: that takes two forwards' time.
_KEEP_NOTHING = frozenset({'timm', 'timm_epfs', 'torch', 'torchvision'})
_DEFINITIONS = (FunctionType, ModuleType, type)
_MISSING = object()
_MAX_DEPTH = 4  # of containers and objects inside each other

Put = Callable[[Any], None]


class Isolation:
    """Isolates what the forwards of a model refer to, until it is left.

    >>> masks = {}
    >>> class Net(nn.Module):
    ...     def forward(self, x):
    ...         return x + masks.setdefault(len(x), torch.ones_like(x))
    >>> with Isolation(Net()) as isolation:
    ...     isolation.explore(torch.empty(3, device='meta'))
    >>> masks
    {}

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._is_needed = any(map(_is_foreign, self._held()))
        self._codes: Dict[int, CodeType] = {}
        self._seen: Dict[int, Any] = {}  # what was seen, by id: an id is taken for as long as its object lives
        self._classes: Set[type] = set()
        self._uncached: Dict[int, Callable] = {}
        self._resets: List[Callable[[], None]] = []
        self._undo: List[Callable[[], None]] = []
        self._hidden: Dict[int, Tuple[Any, Dict, Dict]] = {}  # dicts with hidden entries, all entries, those shown
        self._constants: Set[int] = set()  # ids of dicts in which nothing is hidden
        self._is_over = False

    def __enter__(self) -> 'Isolation':
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over = True
        self.reset()
        for undo in reversed(self._undo):
            undo()

    def _held(self) -> Iterator[Any]:
        """The modules and what they hold."""
        for module in self._model.modules():
            yield from (module, *vars(module).values())

    def explore(self, *args: Any, **kwargs: Any) -> None:
        """Run a forward with some arguments, whether or not it fails, to see what it refers to.

        Entries of dicts that hold tensors are hidden, as earlier forwards may have left them. A forward fills a cache
        anew. Where it fails for want of an entry instead, the dict has the model's constants, and is left as it is.
        """
        for function in self._held() if self._is_needed else ():
            if isinstance(function, (FunctionType, partial)):
                self._see(function)
        while self._is_needed:
            self.reset()
            try:
                copied = meta_copy(self._model).eval()
                with quiet(), self.watching():
                    copied(*args, **kwargs)
                return
            except Exception as e:
                found = self._wanted(e.args[0] if isinstance(e, KeyError) and e.args else _MISSING)
                if not found:
                    return
                self._constants |= found

    def _wanted(self, key: Any) -> Set[int]:
        """Ids of the dicts with hidden entries that a forward didn't fill; only those with the key, if there is one."""
        unfilled = {
            number: contents for number, (container, contents, shown) in self._hidden.items()
            if number not in self._constants and _identities(container) == _identities(shown)
        }
        return {number for number, contents in unfilled.items() if key in [*contents]} or set(unfilled)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, what code refers to is isolated before it runs for the first time."""
        before = sys.gettrace()
        sys.settrace(self._see_call if self._is_needed else before)
        try:
            yield
        finally:
            sys.settrace(before)

    def reset(self) -> None:
        """Put everything back, before another run."""
        for put_back in self._resets:
            put_back()

    # -- what code refers to ----------------------------------------------------------------------------------------

    def _see_call(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if id(code) in self._codes:
            return
        self._codes[id(code)] = code
        if is_plumbing(code.co_filename) or _is_skipped(frame.f_globals.get('__name__')):
            return
        names = set(code.co_names)
        for name in names:
            self._see_variable(frame.f_globals, name, names)
        if code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            self._see_class(owner if isinstance(owner, type) else type(owner))

    def _see_variable(self, variables: Dict[str, Any], name: str, attributes: Set[str]) -> None:
        """Isolate a variable that code refers to; of a module, the attributes that it may refer to."""
        value = variables.get(name, _MISSING)
        if isinstance(value, ModuleType):
            if not _is_skipped(value.__name__):
                for attribute in attributes & vars(value).keys():
                    if not isinstance(vars(value)[attribute], ModuleType):
                        self._see_variable(vars(value), attribute, set())
            return
        self._see(value, partial(variables.__setitem__, name))
        if not isinstance(value, _DEFINITIONS):
            self._resets.append(partial(_put_back_variable, variables, name, variables.get(name, _MISSING)))

    def _see(self, value: Any, put: Optional[Put] = None, depth: int = 0) -> None:
        """Isolate a value.

        Args:
            value: The value.
            put: Puts another one in its place.
            depth: Number of objects and containers that it is in.
        """
        if is_cached(value):
            if put is not None and not _is_skipped(getattr(value, '__module__', None)):
                self._replace(value, put)
        elif isinstance(value, (staticmethod, classmethod)):
            self._see(value.__func__, put and (lambda function: put(type(value)(function))), depth)
        elif isinstance(value, property):
            self._see(value.fget, put and (lambda function: put(value.getter(function))), depth)
        elif isinstance(value, partial):
            self._see(value.func, put and (lambda f: put(partial(f, *value.args, **value.keywords))), depth)
        elif id(value) not in self._seen:
            self._seen[id(value)] = value
            if isinstance(value, type):
                self._see_class(value)
            elif isinstance(value, FunctionType):
                self._see_function(value, depth)
            elif depth < _MAX_DEPTH:
                self._see_object(value, depth + 1)

    def _replace(self, cached: Callable, put: Put) -> None:
        if id(cached) not in self._uncached:
            function = self._uncached[id(cached)] = uncached(cached)
            self._seen[id(function)] = function
            self._see(cached.__wrapped__)
            if not cached.cache_info().currsize:
                self._undo.append(cached.cache_clear)
        put(self._uncached[id(cached)])
        self._undo.append(partial(put, cached))

    def _see_function(self, function: FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
            self._see(value, partial(setattr, cell, 'cell_contents'), depth)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), vars(function)):
            self._see(value, None, depth)

    def _see_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if _is_skipped(base.__module__) or base in self._classes:
                continue
            self._classes.add(base)
            for name, value in list(vars(base).items()):
                if not name.startswith('__') or isinstance(value, _DEFINITIONS):
                    self._see(value, partial(setattr, base, name))
            self._resets.append(partial(_put_back_class, base, dict(vars(base))))

    def _see_object(self, value: Any, depth: int) -> None:
        if isinstance(value, (dict, list, set, deque)):
            for key, inner in _entries(value):
                self._see(inner, partial(value.__setitem__, key) if isinstance(value, (dict, list)) else None, depth)
            self._resets.append(partial(self._put_back, value, _contents(value)))
            self._resets[-1]()
        elif not isinstance(value, (nn.Module, torch.Tensor)) and not _is_skipped(type(value).__module__):
            self._see_class(type(value))
            if isinstance(getattr(value, '__dict__', None), dict):
                self._see(vars(value), None, depth)

    def _put_back(self, container: Any, contents: Any) -> None:
        """Make a container hold what it held, but for hidden entries."""
        if isinstance(contents, dict) and not self._is_over and id(container) not in self._constants:
            shown = {key: value for key, value in contents.items() if not tensors_in(value)}
            if len(shown) < len(contents):
                self._hidden[id(container)] = container, contents, shown
            contents = shown
        if _identities(container) != _identities(contents):
            container.clear()
            for key, value in contents.items() if isinstance(contents, dict) else ():
                container[key] = value
            if not isinstance(contents, dict):
                (container.update if isinstance(contents, set) else container.extend)(contents)


@contextmanager
def isolated(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> Iterator[None]:
    """Inside the block, a forward of a copy of the model, with these arguments, runs in isolation."""
    with Isolation(model) as isolation:
        isolation.explore(*args, **kwargs)
        isolation.reset()
        yield


def _is_foreign(value: Any) -> bool:
    """Whether a module, a function or another object runs code that may keep something in the process."""
    while isinstance(value, partial):
        value = value.func
    definition = value if isinstance(value, (FunctionType, MethodType, type)) or is_cached(value) else type(value)
    root = (getattr(definition, '__module__', None) or '').partition('.')[0]
    return root not in _KEEP_NOTHING and not _is_skipped(root)


def _is_skipped(module: Optional[str]) -> bool:
    return (module or '').partition('.')[0] in _SKIPPED


def _put_back_variable(variables: Dict[str, Any], name: str, value: Any) -> None:
    present = variables.get(name, _MISSING)
    if present is value or isinstance(present, _DEFINITIONS):  # what code imports or defines when it first runs stays
        return
    if value is _MISSING:
        del variables[name]
    else:
        variables[name] = value


def _put_back_class(cls: type, held: Dict[str, Any]) -> None:
    for name in [*vars(cls)]:
        if name not in held and not name.startswith('__'):
            delattr(cls, name)
    for name, value in held.items():
        if vars(cls).get(name) is not value and not name.startswith('__'):
            setattr(cls, name, value)


# Subclasses of dict may do more in their methods than look up; these don't call them.

def _entries(container: Any) -> List[Tuple[Any, Any]]:
    return [*(dict.items(container) if isinstance(container, dict) else enumerate(container))]


def _contents(container: Any) -> Any:
    """A plain copy."""
    return dict(dict.items(container)) if isinstance(container, dict) else container.copy()


def _identities(container: Any) -> Any:
    if isinstance(container, set):
        return {id(value) for value in container}
    return [(id(key) if isinstance(container, dict) else key, id(value)) for key, value in _entries(container)]
