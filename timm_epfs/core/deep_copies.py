"""Deep copies of models, also of those that ``copy.deepcopy`` alone doesn't copy, or copies by half."""
import copy
import copyreg
import threading
from contextlib import ExitStack, contextmanager
from functools import _lru_cache_wrapper, lru_cache, partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Set, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .errors import PruningError
from .modules import set_modes

__all__ = ['clone_tensor', 'deep_copy']

CopyTensor = Callable[[Tensor], Tensor]

# What can't be pickled, and so not be copied, but needn't be: how a copy gets its own, or that it shares the object.
_REDUCERS: Dict[type, Callable[[Any], Any]] = {
    type(threading.Lock()): lambda lock: (threading.Lock, ()),
    type(threading.RLock()): lambda lock: (threading.RLock, ()),
    threading.Condition: lambda condition: (threading.Condition, (condition._lock,)),
    ModuleType: lambda module: module.__name__,  # a string means that the object stays itself
    torch.jit.ScriptFunction: lambda function: function.name,
}
_REGISTERED = threading.Lock()  # held while the reducers are in Python's table, which is the process's


def deep_copy(model: nn.Module, copy_tensor: CopyTensor, share: Iterable[Any] = ()) -> nn.Module:
    """A deep copy of a model, in which every module has the mode that it has in the model.

    It differs from ``copy.deepcopy`` in this: tensors that an earlier forward left on the modules may have a graph.
    Locks are made anew. Functions that a module holds, such as hooks or a forward that somebody replaced, refer to the
    copy's modules where they referred to the model's.

    Args:
        model: The model. It isn't touched.
        copy_tensor: Copies a parameter, a buffer or any other tensor.
        share: Objects that the copy shares with the model.

    Raises:
        PruningError: The model can't be copied; the error names the attribute.
    """
    _refuse_without_copy(model)
    memo = {**_copied_tensors(model, copy_tensor), **{id(each): each for each in share}}
    try:
        with _copying(copy_tensor):
            _rebind_functions(model, memo)
            copied = copy.deepcopy(model, memo)
    except PruningError:
        raise
    except Exception as e:
        raise _uncopyable(model, copy_tensor, e) from e
    modes = {name: module.training for name, module in model.named_modules()}
    set_modes((module, modes.get(name, module.training)) for name, module in copied.named_modules())
    return copied


def clone_tensor(tensor: Tensor) -> Tensor:
    """A tensor of the same values, without a graph."""
    clone = tensor.detach().clone()
    return nn.Parameter(clone, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone


def _refuse_without_copy(model: nn.Module) -> None:
    for name, module in model.named_modules():
        place = name or 'the model'
        if isinstance(module, torch.jit.ScriptModule):
            raise PruningError(
                f'{place} is a TorchScript module, which can\'t be traced; give the module that it was made from, and '
                f'script the pruned one')
        for key, parameter in module._parameters.items():
            if nn.parameter.is_lazy(parameter):
                raise PruningError(
                    f'{f"{name}.{key}" if name else key} of a lazy {type(module).__name__} has no shape yet; run the '
                    f'model once before it is pruned')


# -- tensors --------------------------------------------------------------------------------------------------------

def _copied_tensors(model: nn.Module, copy_tensor: CopyTensor) -> Dict[int, Any]:
    """Copies of the tensors that modules hold, by the tensor's ``id``: the memo that a deep copy starts with."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for leaf in tree_leaves(value) if isinstance(value, (list, tuple, dict, Tensor)) else ():
                if isinstance(leaf, Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = copy_tensor(leaf)
    return memo


class _CopyTensors(TorchFunctionMode):
    """Copies parameters, and tensors with a graph, that objects hold out of sight of ``_copied_tensors``.

    All other tensors there are copied as they are: the object may be no part of the computation, and need their values.
    """

    def __init__(self, copy_tensor: CopyTensor):
        super().__init__()
        self._copy_tensor = copy_tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo[id(tensor)] if id(tensor) in memo else self._copy_tensor(tensor)
        if getattr(func, '__self__', None) is Tensor.data:  # how a parameter copies itself
            return self._copy_tensor(args[0]).detach()
        return func(*args, **(kwargs or {}))


@contextmanager
def _copying(copy_tensor: CopyTensor) -> Iterator[None]:
    """Inside the block, ``copy.deepcopy`` copies tensors by a function, and renews or shares what it refuses."""
    with ExitStack() as stack:
        stack.enter_context(_REGISTERED)
        for kind, reducer in _REDUCERS.items():
            if kind not in copyreg.dispatch_table:
                copyreg.pickle(kind, reducer)
                stack.callback(copyreg.dispatch_table.pop, kind)
        stack.enter_context(_CopyTensors(copy_tensor))
        yield


# -- functions ------------------------------------------------------------------------------------------------------

def _rebind_functions(model: nn.Module, memo: Dict[int, Any]) -> None:
    """Copy the functions on modules whose variables refer to modules. Python itself shares functions among copies."""
    modules = {id(module) for module in model.modules()}
    variables: List[Tuple[CellType, CellType]] = []  # of the copies and of the functions
    for module in model.modules():
        for value in vars(module).values():
            _rebind((value, *value.values()) if isinstance(value, dict) else (value,), modules, memo, variables)
    for ours, theirs in variables:  # once all functions are copied, since a module may hold any of them
        ours.cell_contents = copy.deepcopy(theirs.cell_contents, memo)


def _rebind(
        values: Iterable[Any],
        modules: Set[int],
        memo: Dict[int, Any],
        variables: List[Tuple[CellType, CellType]],
) -> None:
    """Copy the functions among some values, and those that they refer to, without the contents of their variables."""
    for value in values:
        while isinstance(value, partial):
            value = value.func
        if id(value) in memo or not _refers(value, modules, set()):
            continue
        if isinstance(value, _lru_cache_wrapper):
            memo[id(value)], theirs = _cached_alike(value)
            variables.append(theirs)
            _rebind([value.__wrapped__], modules, memo, variables)
        if not isinstance(value, FunctionType):
            continue
        theirs = value.__closure__ or ()
        ours = tuple(CellType() if _refers(_content(cell), modules, set()) else cell for cell in theirs)
        bound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, ours)
        bound.__kwdefaults__ = value.__kwdefaults__
        bound.__qualname__, bound.__module__ = value.__qualname__, value.__module__
        bound.__dict__.update(value.__dict__)
        memo[id(value)] = bound
        variables += [pair for pair in zip(ours, theirs) if pair[0] is not pair[1]]
        _rebind(map(_content, theirs), modules, memo, variables)


def _cached_alike(cached: Any) -> Tuple[Any, Tuple[CellType, CellType]]:
    """A function with a cache like another's, and the variables of the functions that the two run."""
    function = None

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return lru_cache(**cached.cache_parameters())(call), (call.__closure__[0], CellType(cached.__wrapped__))


def _refers(value: Any, modules: Set[int], seen: Set[int]) -> bool:
    """Whether a value is one of the modules or a function, or a collection of these, that leads to one."""
    if id(value) in modules:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, FunctionType):
        inside = [_content(cell) for cell in value.__closure__ or ()]
    elif isinstance(value, MethodType):
        inside = [value.__self__]
    elif isinstance(value, _lru_cache_wrapper):
        inside = [value.__wrapped__]
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple, dict)):
        inside = list(value.values() if isinstance(value, dict) else value)
    else:
        return False
    return any(_refers(each, modules, seen) for each in inside)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


# -- errors ---------------------------------------------------------------------------------------------------------

def _uncopyable(model: nn.Module, copy_tensor: CopyTensor, error: Exception) -> PruningError:
    """The error that names the attribute that can't be copied."""
    memo = {**_copied_tensors(model, copy_tensor), **{id(module): module for module in model.modules()}}

    def fails(value: Any) -> bool:
        try:
            with _copying(copy_tensor):
                copy.deepcopy(value, dict(memo))
        except Exception:
            return True
        return False

    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key != '_modules' and fails(value):
                path, value = _innermost(f'{name}.{key}' if name else key, value, fails)
                return PruningError(
                    f'this {type(model).__name__} can\'t be copied: its {path} is a {type(value).__name__} ({error}); '
                    f'remove the attribute while the model is pruned, or give its class a __deepcopy__')
    return PruningError(f'this {type(model).__name__} can\'t be copied ({error}); make copy.deepcopy(model) work')


def _innermost(path: str, value: Any, fails: Callable[[Any], bool]) -> Tuple[str, Any]:
    """The innermost attribute or entry below a value that can't be copied, and its path."""
    seen: Set[int] = set()
    while id(value) not in seen:
        seen.add(id(value))
        inside = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        inside = inside if isinstance(inside, dict) else getattr(value, '__dict__', {})
        for key, each in inside.items():
            if fails(each):
                path, value = f'{path}.{key}', each
                break
    return path, value
