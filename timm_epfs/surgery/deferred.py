"""Build first, initialise last: a constructor's random numbers are drawn for the tensors that a plan leaves.

Inside ``DeferredInit`` the in-place initialisers that constructors call on whole tensors (``uniform_``, ``fill_``, …)
are noted, not run, so a dense model costs the memory that is asked for and never touched. A plan is applied to it, and
what was noted runs on what is left. Reading a tensor runs what is pending for it first, so that no code can see the
difference.

The meta device would be simpler and isn't enough: most models have no initialisation that could be run again, and what
constructors compute into buffers would be lost.
"""
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import init
from torch.overrides import TorchFunctionMode

__all__ = ['DeferredInit']

Step = Tuple[Callable[..., Tensor], Tuple, Dict[str, Any]]

# Tensor methods that work entry by entry, with numbers as arguments: the shape of the tensor doesn't matter to them.
_OVERWRITE = {Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_}
_CHANGE = {Tensor.erfinv_, Tensor.mul_, Tensor.div_, Tensor.add_, Tensor.sub_, Tensor.clamp_}
# What neither reads nor writes entries. It may be incomplete: anything else only costs the time saved.
_PASSIVE = {
    *(getattr(Tensor, name).__get__ for name in (
        'shape', 'ndim', 'dtype', 'device', 'layout', 'data', 'requires_grad', 'grad', 'grad_fn', 'is_leaf', 'is_meta',
        'is_sparse', 'is_quantized', 'is_nested', 'is_mkldnn',
    )),
    Tensor.requires_grad.__set__, Tensor.requires_grad_,
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.is_contiguous, Tensor.detach,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.view, Tensor.untyped_storage, Tensor.__hash__,
    torch._C._set_grad_enabled, torch.empty,
}
# (c, fan) of the bound √(c / fan) or deviation √(c / fan) that initialisers derive from a weight's fans, by the method
# that gets the number; of two that give the same, the usual one first. trunc_normal_ scales by √2 · deviation.
_TRUNCATED = 1 / 0.87962566103423978 ** 2
_FORMULAS: Dict[Callable, Tuple[Tuple[float, str], ...]] = {
    Tensor.uniform_: ((1, 'in'), (6, 'in'), (3, 'in'), (1, 'out'), (6, 'sum')),
    Tensor.normal_: ((2, 'out'), (2, 'in'), (1, 'in'), (1, 'out'), (2, 'sum')),
    Tensor.mul_: ((2, 'in'), (4, 'out'), (_TRUNCATED, 'in'), (_TRUNCATED, 'out')),
}


@dataclass
class _Pending:
    """What a tensor's memory is to be filled with, and how to tell whether anyone still holds it."""
    storage: StorageWeakRef
    dtype: torch.dtype
    steps: List[Step]


class DeferredInit(TorchFunctionMode):
    """Models built inside the block are initialised at its end, each tensor in the shape it has by then.

    >>> with DeferredInit() as deferred:
    ...     layer = nn.Linear(64, 8)
    ...     layer.weight = nn.Parameter(deferred.resized(layer.weight, (8, 16)))
    ...     deferred.refit(layer, {'weight': (8, 64)})
    >>> 0.2 < layer.weight.abs().max() <= 0.25
    tensor(True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._pending: Dict[int, _Pending] = {}

    def __exit__(self, exc_type: Any, *exc: Any) -> None:
        super().__exit__(exc_type, *exc)
        if exc_type is None:
            self._run(list(self._pending))

    def __torch_function__(self, func: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None) -> Any:
        kwargs = kwargs or {}
        if func in _PASSIVE:
            return func(*args, **kwargs)
        tensor, step = _initialiser(func, args, kwargs)
        if step and tensor.is_meta:
            return tensor
        key = tensor.untyped_storage()._cdata if step and _whole(tensor) else None
        if key is not None and (step[0] in _OVERWRITE or key in self._pending):
            self._note(key, tensor, step)
            return tensor
        if func is Tensor.copy_ and _whole(args[0]):
            self._pending.pop(args[0].untyped_storage()._cdata, None)
        if self._pending:
            self._run([t.untyped_storage()._cdata for t in _tensors((args, kwargs)) if t.layout is torch.strided])
        return func(*args, **kwargs)

    def resized(self, tensor: Tensor, shape: Sequence[int]) -> Optional[Tensor]:
        """An empty tensor of another shape that will be initialised as ``tensor`` would; None if that has values."""
        pending = self._pending.get(tensor.untyped_storage()._cdata)
        if pending is None and not tensor.is_meta:
            return None
        other = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if pending is not None:
            storage = other.untyped_storage()
            self._pending[storage._cdata] = _Pending(StorageWeakRef(storage), other.dtype, list(pending.steps))
        return other

    def refit(self, module: nn.Module, dense: Mapping[str, Sequence[int]]) -> None:
        """Draw a module's parameters, biases too, by the fans that its weights have now.

        A number counts as derived from a fan where it is what a usual formula gives for a dense weight of this module.

        Args:
            module: A layer whose weights were cut.
            dense: Their shapes before, by name within the layer.
        """
        now = {name: tensor.shape for name, tensor in module._parameters.items() if tensor is not None}
        fans = [(_fans(shape), _fans(now[name])) for name, shape in dense.items() if len(shape) > 1 and name in now]
        for tensor in module._parameters.values():
            pending = None if tensor is None else self._pending.get(tensor.untyped_storage()._cdata)
            if pending is not None:
                pending.steps = [_refitted(step, fans) for step in pending.steps]

    def _note(self, key: int, tensor: Tensor, step: Step) -> None:
        if step[0] in _OVERWRITE:
            self._pending[key] = _Pending(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, [step])
        else:
            self._pending[key].steps.append(step)

    @torch.no_grad()
    def _run(self, keys: Iterable[int]) -> None:
        for key in keys:
            pending = self._pending.pop(key, None)
            storage = None if pending is None else torch.UntypedStorage._new_with_weak_ptr(pending.storage.cdata)
            if storage is not None:
                entries = torch.empty(0, dtype=pending.dtype, device=storage.device).set_(storage)
                for method, args, kwargs in pending.steps:
                    method(entries, *args, **kwargs)


def _initialiser(func: Callable, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[Optional[Tensor], Optional[Step]]:
    """The tensor and the step that a call stands for, where it is one that can be noted."""
    if func in _OVERWRITE or func in _CHANGE:
        tensor, *args = args
        plain = not any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        return (tensor, (func, tuple(args), kwargs)) if plain else (None, None)
    # torch.nn.init's own functions arrive whole, with every argument by name.
    rest = {name: value for name, value in kwargs.items() if name == 'generator' and value is not None}
    if func is init.uniform_:
        return kwargs['tensor'], (Tensor.uniform_, (kwargs['a'], kwargs['b']), rest)
    if func is init.normal_:
        return kwargs['tensor'], (Tensor.normal_, (kwargs['mean'], kwargs['std']), rest)
    if func is init.constant_:
        return kwargs['tensor'], (Tensor.fill_, (kwargs['val'],), {})
    if func is init.kaiming_uniform_:
        fan = init._calculate_correct_fan(kwargs['tensor'], kwargs['mode'])
        bound = math.sqrt(3 / fan) * init.calculate_gain(kwargs['nonlinearity'], kwargs['a'])
        return kwargs['tensor'], (Tensor.uniform_, (-bound, bound), rest)
    return None, None


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that there is in its memory."""
    return (
        tensor.layout is torch.strided and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _fans(shape: Sequence[int]) -> Dict[str, int]:
    area = math.prod(shape[2:])
    return {'in': shape[1] * area, 'out': shape[0] * area, 'sum': (shape[0] + shape[1]) * area}


def _refitted(step: Step, fans: Sequence[Tuple[Dict[str, int], Dict[str, int]]]) -> Step:
    method, args, kwargs = step

    def refit(value: Any) -> Any:
        if not isinstance(value, float) or not 0 < abs(value) < 0.9:  # 1 is a number of its own
            return value
        for constant, fan in _FORMULAS.get(method, ()):
            for dense, now in fans:
                if math.isclose(value ** 2 * dense[fan], constant, rel_tol=1e-6):
                    return value * math.sqrt(dense[fan] / now[fan])
        return value

    return method, tuple(map(refit, args)), {name: refit(value) for name, value in kwargs.items()}
