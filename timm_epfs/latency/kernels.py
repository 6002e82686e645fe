"""The calls of a model's forward, with lengths that follow the units left, so that each can be timed by itself.

``kernels`` reads them off one forward on the meta device. A ``Kernel`` is one call as plain data. For any numbers of
units left, it can name the call that a cut model would make (``signature``), and make it by itself (``bind``).
"""
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Sequence, Set, Tuple, Union

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from ..core import PruningError, Size
from ..trace import Call, Calls, Forward, Trace, isolated, quiet, tensors_in

__all__ = ['Array', 'Kernel', 'inputs_of', 'kernels']

# A reshape that copies reads one tensor and writes another of the same data, however it is shaped: it is timed as this.
_COPIES = frozenset({'reshape', 'flatten', 'contiguous', 'clone', 'repeat_interleave', 'view_copy'})
# Positions of the arguments, beside tensors, that change with a cut:
_GROUPS = 6             # conv2d(input, weight, bias, stride, padding, dilation, groups), conv_transpose2d likewise
_NORMALIZED_SHAPE = 1   # layer_norm(input, normalized_shape, weight, bias, eps)


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
        """Its shape where these numbers of units are left."""
        return tuple(size(left) for size in self.sizes)

    def make(self, left: Mapping[str, int], device: torch.device) -> torch.Tensor:
        """Such a tensor, filled with random numbers, since pooling takes longer for these than for equal ones."""
        shape = self.shape(left)
        in_memory = _filled(torch.empty([shape[d] for d in self.order], dtype=self.dtype, device=device))
        return in_memory.permute([self.order.index(d) for d in range(len(shape))])

    def text(self, left: Mapping[str, int]) -> str:
        """Type, shape and order, as in ``float32[1,64,8,8] as 0231``."""
        order = '' if list(self.order) == sorted(self.order) else f' as {"".join(map(str, self.order))}'
        return f'{str(self.dtype).removeprefix("torch.")}[{",".join(map(str, self.shape(left)))}]{order}'


@dataclass(frozen=True)
class _Groups:
    """The number of groups of a convolution, as a function of the units left."""
    channels: Size
    channels_per_group: Size

    def __call__(self, left: Mapping[str, int]) -> int:
        return self.channels(left) // self.channels_per_group(left)


@dataclass(frozen=True)
class Kernel:
    """One call of a torch function.

    Attributes:
        name: What is called, as torch names it.
        function: What is called.
        args: Its arguments, with an ``Array`` for each tensor, and a function of the units left for each integer that
            a cut changes.
        kwargs: Its keyword arguments, likewise.
        enclosing_blocks: Units left of the residual blocks around it: it runs where none of them is zero.
    """
    name: str
    function: Callable
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    enclosing_blocks: Tuple[Size, ...] = ()

    @property
    def arrays(self) -> List[Array]:
        """Its tensors."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Array)]

    @property
    def names(self) -> Set[str]:
        """Names of the structures that its lengths depend on."""
        return {name for array in self.arrays for size in array.sizes for name, _ in size.coefs}

    def signature(self, left: Mapping[str, int]) -> str:
        """The call as text, by which its time is remembered.

        Args:
            left: Units left, by name, of the structures that it depends on.
        """
        args, kwargs = self._given(left, lambda array: array)
        given = [_text(value, left) for value in args]
        given += [f'{name}={_text(value, left)}' for name, value in kwargs.items()]
        return f'{self.name}({", ".join(given)})'

    def bind(self, left: Mapping[str, int], device: torch.device) -> Callable[[], Any]:
        """The call with tensors of its own. It has run once.

        Args:
            left: Units left, by name, of the structures that it depends on.
            device: Where the tensors are made.

        Raises:
            Exception: It can't run with these lengths, because a number that it is given would have to change too.
        """
        args, kwargs = self._given(left, lambda array: array.make(left, device))
        out = self.function(*args, **kwargs)
        for tensor in tensors_in((args, kwargs)):
            if tensor is out:  # changed in place: from zero, it doesn't grow to infinity when the call is repeated
                tensor.zero_()
        return lambda: self.function(*args, **kwargs)

    def _given(
            self,
            left: Mapping[str, int],
            tensor: Callable[[Array], Any],
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """The arguments where these numbers of units are left, with ``tensor(array)`` for each ``Array``."""
        def value(leaf: Any) -> Any:
            if isinstance(leaf, Array):
                return tensor(leaf)
            return leaf(left) if isinstance(leaf, (Size, _Groups)) else leaf

        return tree_map(value, (self.args, self.kwargs))


def kernels(model: nn.Module, traced: Trace, args: Tuple, kwargs: Dict[str, Any], batch_size: int = 1) -> List[Kernel]:
    """The calls of one forward, in the order in which they run.

    Args:
        model: The model that was traced; it isn't touched.
        traced: Its trace.
        args: Positional arguments of the forward that was traced, batch 1.
        kwargs: Keyword arguments of that forward.
        batch_size: Images per batch.

    Raises:
        PruningError: At this batch size the forward makes other calls than the traced one.
    """
    args, kwargs = inputs_of(model, (args, kwargs), batch_size, torch.device('meta'))
    found: List[Tuple[Callable, Any, Any]] = []

    def see(function, args, kwargs, out):
        found.append((function, *tree_map(lambda x: _Seen(x) if isinstance(x, torch.Tensor) else x, (args, kwargs))))

    forward = (Forward.on_numbers if traced.on_numbers else Forward.without_data)(model, args, kwargs)

    def run() -> None:
        found.clear()
        copy, (args, kwargs) = forward.copy(), forward.inputs()
        with quiet(), _KeepFormats(), Calls(see):
            copy(*args, **kwargs)

    isolated(model, run)
    if [call.function for call in traced.calls] != [function for function, _, _ in found]:
        raise PruningError(
            f'latency: with {batch_size} images per batch the model\'s forward runs other operations than with one; '
            f'give another batch size')
    dense = {s.name: s.units for s in traced.structures}
    return [_kernel(call, args, kwargs, dense) for call, (_, args, kwargs) in zip(traced.calls, found)]


class _Seen:
    """Lengths and layout of a tensor at the time of a call, which an operation in place may change later."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.order = tuple(sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d)))

    def array(self, sizes: Sequence[Size], dense: Mapping[str, int]) -> Array:
        """The same with lengths that follow the units left, given the sizes that were traced at batch 1."""
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
    short = name.rpartition('.')[2]
    if short in _COPIES:
        return Kernel('torch.Tensor.clone', _copy, (args[0],), {}, call.enclosing_blocks)
    if re.fullmatch('conv(_transpose)?[123]d', short):
        args, kwargs = _replace(args, kwargs, _GROUPS, 'groups', lambda groups: _groups(args, groups, dense))
    elif short == 'layer_norm':
        args, kwargs = _replace(
            args, kwargs, _NORMALIZED_SHAPE, 'normalized_shape', lambda shape: args[0].sizes[-len(shape):])
    return Kernel(name, call.function, args, kwargs, call.enclosing_blocks)


def _replace(
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
        position: int,
        name: str,
        new: Callable[[Any], Any],
) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
    """The arguments with ``new(value)`` in place of one of them, which is given by position, by name or not at all."""
    if len(args) > position:
        return (*args[:position], new(args[position]), *args[position + 1:]), kwargs
    return args, {**kwargs, name: new(kwargs[name])} if name in kwargs else kwargs


def _groups(args: Tuple[Any, ...], groups: int, dense: Mapping[str, int]) -> Union[int, _Groups]:
    """The number of groups of a convolution, which follows from its image and the second dim of its weight.

    That of a transposed convolution holds output channels: its groups follow where each has as many channels as it
    makes, as in a depthwise one, and are left as they are elsewhere.
    """
    image, weight = args[:2]
    follows = _Groups(image.sizes[1], weight.sizes[1])
    return follows if groups != 1 and follows(dense) == groups else groups


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def inputs_of(model: nn.Module, example: Any, batch_size: int, device: torch.device) -> Any:
    """Arguments of a forward, in the precision and memory format of the model's weights, filled with random numbers.

    Args:
        model: What takes them.
        example: Arguments for a single image, taken for their shapes and types only.
        batch_size: Images per batch.
        device: Where they are made.
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
    """Fill a tensor with random numbers, of integers or bools with zeros, and leave torch's own generator alone."""
    if tensor.is_meta or not tensor.is_floating_point():
        return tensor.zero_()
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


class _KeepFormats(TorchFunctionMode):
    """Let convolutions pass ``channels_last`` on, as they do on every device but meta."""

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
