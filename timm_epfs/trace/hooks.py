"""Which forward hooks take part in a model's computation, and which only watch it.

A trace runs the first and leaves out the others: these are their users', who expect tensors with values in them.
"""
import dis
import inspect
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set

from torch import nn
from torch.nn.modules import module as module_globals
from torch.utils._pytree import tree_leaves

__all__ = ['changes_results', 'drop_hooks_of', 'watching_hooks', 'without_global_hooks']

_KINDS = ('_forward_pre_hooks', '_forward_hooks')
# Calls that give nothing: what a lambda returns of them, ``lambda module, args, out: seen.append(out)``, is None.
_GIVE_NOTHING = frozenset({
    '__setitem__', 'add', 'append', 'appendleft', 'debug', 'extend', 'info', 'insert', 'print', 'put', 'setattr',
    'setdefault', 'update', 'write',
})


def watching_hooks(model: nn.Module) -> List[Any]:
    """The forward hooks on a model's modules that only watch."""
    hooks = [hook for module in model.modules() for kind in _KINDS for hook in getattr(module, kind).values()]
    if not hooks:
        return []
    owned = {id(leaf) for module in model.modules() for leaf in (module, *tree_leaves(_plain(vars(module))))}
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return [hook for hook in hooks if not (_is_the_models(hook, owned, classes) or changes_results(hook))]


def changes_results(hook: Any) -> bool:
    """Whether a forward hook may change what its module takes or gives."""
    return _may_return(_function(hook))


def drop_hooks_of(model: nn.Module, hooks: Sequence[Any]) -> None:
    """Remove some forward hooks, wherever they are on a model's modules."""
    unwanted = {id(hook) for hook in hooks}
    for module in model.modules() if unwanted else ():
        for kind in _KINDS:
            for key in [key for key, hook in getattr(module, kind).items() if id(hook) in unwanted]:
                del getattr(module, kind)[key]


def _plain(attributes: Dict[str, Any]) -> List[Any]:
    """What a module holds, without what torch keeps there."""
    return [value for key, value in attributes.items() if not (key.startswith('_') and key.endswith('_hooks'))]


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Inside the block, hooks on all modules of the process that only watch don't run."""
    before = [(hooks, dict(hooks)) for hooks in (getattr(module_globals, f'_global{kind}') for kind in _KINDS)]
    for hooks, all_hooks in before:
        for key, hook in all_hooks.items():
            if not changes_results(hook):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, all_hooks in before:
            hooks.clear()
            hooks.update(all_hooks)


def _is_the_models(hook: Any, owned: Set[int], classes: Set[type]) -> bool:
    """Whether a hook was put on by torch (a weight norm), by the installed library that the model is from (transformers
    collects hidden states so), or by the model: in a method, or as one of its objects'."""
    hook = _unwrapped(hook)
    owner = hook.__self__ if isinstance(hook, MethodType) else hook
    where = hook if isinstance(hook, (FunctionType, MethodType)) else type(hook)
    library = _package(where)
    if id(owner) in owned or library == 'torch':
        return True
    if _is_installed(library) and any(_package(cls) == library for cls in classes):
        return True
    return isinstance(hook, FunctionType) and any(
        hook.__module__ == cls.__module__ and hook.__qualname__.startswith(f'{cls.__qualname__}.') for cls in classes)


def _package(code: Any) -> str:
    """The outermost package that a function or class is from."""
    return (code.__module__ or '').partition('.')[0]


def _is_installed(package: str) -> bool:
    """Whether a package was installed, unlike what a user is working on."""
    file = getattr(sys.modules.get(package), '__file__', None)
    return file is not None and not {'site-packages', 'dist-packages'}.isdisjoint(Path(file).parts)


def _unwrapped(hook: Any) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return inspect.unwrap(hook)


def _function(hook: Any) -> Optional[FunctionType]:
    """The Python function that a hook runs, if it is one."""
    hook = _unwrapped(hook)
    if not isinstance(hook, (FunctionType, MethodType)):
        hook = inspect.getattr_static(type(hook), '__call__', None)
    hook = inspect.unwrap(hook.__func__ if isinstance(hook, MethodType) else hook)
    return hook if isinstance(hook, FunctionType) else None


def _may_return(function: Optional[FunctionType]) -> bool:
    """Whether a hook may return something, and so change what a module takes or gives.

    >>> def count(module, args, out):
    ...     seen.append(out)
    >>> _may_return(count), _may_return(lambda module, args, out: seen.append(out))
    (False, False)
    >>> _may_return(lambda module, args, out: out[0])
    True
    """
    if function is None:
        return False
    before: Optional[dis.Instruction] = None
    returned = []  # the instruction that made it
    for instruction in dis.get_instructions(function):
        if instruction.opname == 'RETURN_CONST' and instruction.argval is not None:
            returned.append('')
        elif instruction.opname == 'RETURN_VALUE':
            if not (before.opname == 'LOAD_CONST' and before.argval is None):
                returned.append(before.opname)
        before = instruction
    if function.__name__ == '<lambda>' and all(name.startswith('CALL') for name in returned):
        return _call_gives_something(function)
    return bool(returned)


def _call_gives_something(function: FunctionType) -> bool:
    """Whether a lambda that calls something returns what it gives."""
    variables = inspect.getclosurevars(function)
    called = [value for value in {**variables.globals, **variables.nonlocals}.values() if callable(value)]
    functions = [_function(value) for value in called if not isinstance(value, type)]
    if any(function is not None and function.__name__ != '<lambda>' for function in functions):
        return any(_may_return(function) for function in functions)
    return not _GIVE_NOTHING & set(function.__code__.co_names)
