"""What a model runs, with lengths that follow the numbers of units left, so that each call can be timed on its own."""
from dataclasses import dataclass
from math import prod
from typing import Any, Callable, Dict, List, Mapping, Sequence, Set, Tuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ..core import PruningError, Size
from ..trace import Trace, meta_copy
from ..trace.calls import Call, Calls, tensors_in
from ..trace.copies import quiet

__all__ = ['Array', 'Kernel', 'inputs_of', 'kernels']

# A reshape that copies reads one tensor and writes another: its lengths, which a cut changes, don't matter.
_COPIES = frozenset({'reshape', 'flatten', 'contiguous', 'clone', 'repeat_interleave', 'view_copy'})


@dataclass(frozen=True)
class Array:
    """A tensor that a call is given, without its data.

    Attributes:
        sizes: Sizes of its dims.
        order: Its dims from the outermost in memory to the innermost.
        dtype: Its type.
    """
    sizes: Tuple[Size, ...]
    order: Tuple[int, ...]
    dtype: torch.dtype

    def shape(self, left: Mapping[str, int]) -> Tuple[int, ...]:
        return tuple(size(left) for size in self.sizes)

    def make(self, left: Mapping[str, int], device: torch.device) -> torch.Tensor:
        """Random numbers, where there may be fractions: how long pooling takes depends on them."""
        shape = self.shape(left)
        inside = _filled(torch.empty([shape[d] for d in self.order], dtype=self.dtype, device=device))
        return inside.permute([self.order.index(d) for d in range(len(shape))])

    def text(self, left: Mapping[str, int]) -> str:
        order = '' if list(self.order) == sorted(self.order) else f' as {"".join(map(str, self.order))}'
        return f'{str(self.dtype).removeprefix("torch.")}[{",".join(map(str, self.shape(left)))}]{order}'


@dataclass(frozen=True)
class Kernel:
    """One call of a torch function.

    Attributes:
        name: What is called, as torch names it.
        function: What is called.
        args: Its arguments, with an ``Array`` for each tensor.
        kwargs: Its keyword arguments, likewise.
        gates: Numbers of units left of the blocks around it.
    """
    name: str
    function: Callable
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    gates: Tuple[Size, ...] = ()

    @property
    def arrays(self) -> List[Array]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Array)]

    @property
    def names(self) -> Set[str]:
        """Names of the structures that it depends on."""
        return {name for array in self.arrays for size in array.sizes for name, _ in size.coefs}

    def signature(self, left: Mapping[str, int]) -> str:
        """The call as text, by which its time is remembered.

        Args:
            left: Units left, by name, of the structures that it depends on.
        """
        args, kwargs = self._at(left)
        given = [_text(value, left) for value in args]
        given += [f'{name}={_text(value, left)}' for name, value in kwargs.items()]
        return f'{self.name}({", ".join(given)})'

    def bind(self, left: Mapping[str, int], device: torch.device) -> Callable[[], Any]:
        """The call with tensors of its own.

        Raises:
            Exception: It can't run with these lengths: it has been given others by number.
        """
        args, kwargs = tree_map(lambda x: x.make(left, device) if isinstance(x, Array) else x, self._at(left))
        out = self.function(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            if tensor is out:
                tensor.zero_()  # which calls in place leave as it is, where others run off to denormals or infinity
        return lambda: self.function(*args, **kwargs)

    def elements(self, left: Mapping[str, int]) -> int:
        """Number of elements of its largest tensor."""
        return max(prod(array.shape(left)) for array in self.arrays)

    def _at(self, left: Mapping[str, int]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """The arguments, with the integers that follow from lengths."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if self.name.rpartition('.')[2].startswith('conv') and len(args) > 6 and args[6] != 1:  # groups
            args[6] = args[0].sizes[1](left) // args[1].sizes[1](left)
        elif self.name == 'torch.nn.functional.layer_norm':
            shape = args[0].shape(left)
            if len(args) > 1:
                args[1] = shape[-len(args[1]):]
            else:
                kwargs['normalized_shape'] = shape[-len(kwargs['normalized_shape']):]
        return tuple(args), kwargs


def kernels(model: nn.Module, traced: Trace, args: Tuple, kwargs: Dict[str, Any], batch_size: int = 1) -> List[Kernel]:
    """What one forward runs.

    Args:
        model: The model that was traced; it isn't touched.
        traced: Its trace.
        args: Positional arguments of the forward that was traced, batch 1.
        kwargs: Keyword arguments of it.
        batch_size: Images a batch.

    Raises:
        PruningError: The forward takes another course at this batch size.
    """
    args, kwargs = inputs_of(model, (args, kwargs), batch_size, torch.device('meta'))
    found: List[Tuple[Callable, Any, Any]] = []

    def see(function, args, kwargs, out):
        found.append((function, *tree_map(lambda x: _Seen(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))))

    copy = meta_copy(model).eval()
    with quiet(), _KeepFormats(), Calls(see):
        copy(*args, **kwargs)
    if [call.function for call in traced.calls] != [function for function, _, _ in found]:
        raise PruningError(
            f'latency: with {batch_size} images a batch the model\'s forward runs other operations than with one; '
            f'give another batch size')
    dense = {s.name: s.units for s in traced.structures}
    return [_kernel(call, args, kwargs, dense) for call, (_, args, kwargs) in zip(traced.calls, found)]


class _Seen:
    """Lengths and layout of a tensor at the time of a call, which an operation in place may change later."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.order = tuple(sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d)))

    def array(self, sizes: Sequence[Size], dense: Mapping[str, int]) -> Array:
        return Array(tuple(_scaled(size, n, dense) for size, n in zip(sizes, self.shape)), self.order, self.dtype)


def _scaled(size: Size, length: int, dense: Mapping[str, int]) -> Size:
    """The size of a dim that was traced at batch 1 and has this length at the batch size."""
    if not size.coefs:
        return Size(length)
    times = length // size(dense)
    return Size(size.const * times, tuple((name, coef * times) for name, coef in size.coefs))


def _kernel(call: Call, args: Any, kwargs: Any, dense: Mapping[str, int]) -> Kernel:
    sizes = iter(call.sizes)
    args, kwargs = tree_map(lambda x: x.array(next(sizes), dense) if isinstance(x, _Seen) else x, (args, kwargs))
    name = resolve_name(call.function) or getattr(call.function, '__name__', 'unknown')
    if name.rpartition('.')[2] in _COPIES:
        return Kernel('torch.Tensor.clone', _copy, (args[0],), {}, call.gates)
    return Kernel(name, call.function, args, kwargs, call.gates)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def inputs_of(model: nn.Module, example: Any, batch_size: int, device: torch.device) -> Any:
    """Arguments of a forward, in the precision and memory format of the model's weights: random numbers.

    Args:
        model: What takes them.
        example: Arguments for a single image, taken for their shapes and types only.
        batch_size: Images a batch.
        device: Where they are to be.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    format_ = torch.channels_last if any(map(_channels_last, weights)) else torch.contiguous_format

    def batch(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = weights[0].dtype if weights and value.is_floating_point() else value.dtype
        made = _filled(torch.empty(batch_size, *value.shape[1:], dtype=dtype, device=device))
        return made.contiguous(memory_format=format_) if made.ndim == 4 else made

    return tree_map(batch, example)


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    """Random numbers, where there may be fractions, that leave the program's own as they are."""
    if tensor.is_meta or not tensor.is_floating_point():
        return tensor.zero_()
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


class _KeepFormats(TorchFunctionMode):
    """Convolutions pass channels last on, as they do on every device but meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, '__name__', '') == 'conv2d' and any(map(_channels_last, args[:2])):
            return out.contiguous(memory_format=torch.channels_last)
        return out


def _channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _text(value: Any, left: Mapping[str, int]) -> str:
    if isinstance(value, Array):
        return value.text(left)
    if isinstance(value, (list, tuple)):
        return f'({", ".join(_text(item, left) for item in value)})'
    return str(value)
