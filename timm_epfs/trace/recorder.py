"""Watches one forward of a copy of the model on the meta device and labels every tensor in it.

Two levels are watched. Below autograd, where every model is a few dozen ATen operations, ``Recorder`` applies the rules.
Above, where Python's integers are still objects, ``_Provenance`` sees which of them were read from a module's attributes:
``x.view(b, n, self.num_heads, -1)`` tells that ``num_heads`` is the length of a dim, so that it follows when the dim is
cut. No table of architectures is needed for that.
"""
import copy
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .labels import Label, Labels
from .rules import RULES, elementwise, opaque

__all__ = ['Recorder', 'Operation', 'Attribute', 'meta_copy', 'quiet']

_CREATES = frozenset({'zeros', 'ones', 'empty', 'full', 'new_zeros', 'new_ones', 'new_empty', 'new_full', 'rand', 'randn',
                      'empty_strided', 'new_empty_strided'})
_NO_LABELS = frozenset({'arange', 'linspace', 'eye', 'tril_indices', 'triu_indices', 'scalar_tensor', 'nonzero', 'randperm'})


# A reshape copies or not depending on strides, which a cut may change: copies are no steps of the road.
TRANSPARENT = frozenset({'clone', 'contiguous', 'alias', 'as_strided_', 'detach', 'lift_fresh', '_to_copy'})


def same_name(name: str) -> str:
    return 'view' if name in ('_unsafe_view', '_reshape_alias') else name


def _is_pointwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags:
        return True
    plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith('_') else None
    return plain is not None and any(torch.Tag.pointwise in getattr(plain, o).tags for o in plain.overloads())


@dataclass
class Operation:
    """One ATen call: what a cut model must repeat, with every length as predicted."""
    name: str
    site: Tuple[str, int]
    inputs: List[List[Label]]
    outputs: List[Tuple[Tuple[int, ...], List[Label]]]
    start: Label = None


@dataclass
class Attribute:
    """An integer attribute of a module and the dims whose length it was seen to be, times a scale."""
    path: str
    value: int
    seen: List[Tuple[Label, Fraction]] = field(default_factory=list)


class _Tracked(int):
    """An integer that knows what it was computed from: ``scale · Π source``, inverted sources included.

    Attributes:
        scale: Rational factor.
        sources: Pairs (source, power): a source is an attribute's path, or the label of a dim whose length was read.
    """

    def __new__(cls, value: int, sources: Tuple[Tuple[Union[str, '_Length'], int], ...], scale: Fraction = Fraction(1)):
        self = super().__new__(cls, value)
        self.sources = sources
        self.scale = scale
        return self

    @property
    def path(self) -> Optional[str]:
        """The attribute's path, if it is one attribute times a scale."""
        (source, power), = self.sources if len(self.sources) == 1 else ((None, 0),)
        return source if power == 1 and isinstance(source, str) else None

    @property
    def label(self) -> Label:
        """The label, if it is the length of one dim."""
        (source, power), = self.sources if len(self.sources) == 1 else ((None, 0),)
        return source.label if power == 1 and isinstance(source, _Length) and self.scale == 1 else None

    def __mul__(self, other):
        return self._combined(int(self) * other, other, 1) if isinstance(other, int) and other else int(self) * other

    __rmul__ = __mul__

    def __floordiv__(self, other):
        exact = isinstance(other, int) and other and int(self) % other == 0
        return self._combined(int(self) // other, other, -1) if exact else int(self) // other

    def _combined(self, value: int, other: int, power: int) -> '_Tracked':
        if not isinstance(other, _Tracked):
            return _Tracked(value, self.sources, self.scale * Fraction(int(other)) ** power)
        powers = dict(self.sources)
        for source, p in other.sources:
            powers[source] = powers.get(source, 0) + power * p
        sources = tuple((source, p) for source, p in powers.items() if p)
        return _Tracked(value, sources, self.scale * other.scale ** power)

    def __reduce__(self):
        return int, (int(self),)


@dataclass(frozen=True, eq=False)
class _Length:
    """A dim whose length was read."""
    label: np.ndarray


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, without ever allocating its weights twice. The model isn't touched."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
        for value in vars(module).values():
            for leaf in tree_leaves(value) if isinstance(value, (list, tuple, dict, torch.Tensor)) else ():
                if isinstance(leaf, torch.Tensor) and id(leaf) not in memo:
                    memo[id(leaf)] = _to_meta(leaf)
    return copy.deepcopy(model, memo)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device='meta', requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Fused paths off and no gradients, so that the forward is the one that its source says."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class Recorder(TorchDispatchMode):
    """Labels the tensors of the forwards that run inside it.

    Args:
        model: A copy on the meta device, made for this; its integer attributes are tagged for the time of the trace.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.labels = Labels()
        self.operations: List[Operation] = []
        self.attributes: Dict[str, Attribute] = {}
        self.products: List[Tuple[List[Tuple[int, Label]], List[Tuple[int, Label]]]] = []
        self.params: Dict[str, Tuple[torch.Tensor, List[Label]]] = {}
        self.inputs_of_products: List[np.ndarray] = []
        self.opaque: Dict[str, Tuple[str, int]] = {}
        self.counting = True
        self.hints: Dict[str, Sequence[Any]] = {}
        self.name = ''
        self._model = model
        self._infos: Dict[int, List[Label]] = {}
        self._weights: set = set()
        self._alive: List[torch.Tensor] = []
        self._names: Dict[int, str] = {}
        self._lengths: Dict[int, _Length] = {}
        self.parameters = dict(model.named_parameters())
        self.main = 0
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)

    # -- what rules use ---------------------------------------------------------------------------------------------

    def tensors(self, args: Any) -> List[torch.Tensor]:
        return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]

    def labels_of(self, tensor: torch.Tensor) -> List[Label]:
        known = self._infos.get(id(tensor))
        if known is None:
            name = self._names.get(id(tensor))
            known = [None] * tensor.ndim
            if name is not None:
                if tensor.is_floating_point():
                    known = [self.labels.fresh(n) for n in tensor.shape]
                self.params[name] = (tensor, known)
                self._weights.add(id(tensor))
            self._remember(tensor, known)
        return known

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """True for parameters, buffers and what is computed from nothing else."""
        self.labels_of(tensor)
        return id(tensor) in self._weights

    def atoms(self, n: int) -> np.ndarray:
        """``n`` new atoms, also for ``n`` of 0 and 1."""
        start = self.labels.size
        self.labels.size += n
        return np.arange(start, start + n, dtype=np.int64)

    def constant(self, n: int) -> np.ndarray:
        return np.zeros(n, dtype=np.int64)

    def mark_input(self, label: Label) -> None:
        if label is not None:
            self.inputs_of_products.append(label)

    def count_product(self, out: torch.Tensor, dims: List[Tuple[int, Label]], written: List[Label]) -> None:
        if self.counting:
            self.products.append((dims, list(zip(out.shape, written))))

    def expect_start(self, before: Label) -> None:
        """A slice starts after these entries: in the cut model it must start after what is left of them."""
        self._start = before

    def follow(self, argument: str, position: int, label: Label) -> None:
        """The integer that was passed here is the length of this label, if it came from a module's attribute."""
        given = self.hints.get(argument, ())
        if position < len(given) and isinstance(given[position], _Tracked):
            self._see(given[position], label)

    # -- recording --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split('::')[1]
        for tensor in self.tensors((args, kwargs)):
            self.labels_of(tensor)
        out = func(*args, **kwargs)
        self.name, self._start = name, None
        outputs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        labels = self._apply(func, name, args, kwargs, out, outputs)
        weights = all(id(t) in self._weights for t in self.tensors((args, kwargs))) and bool(self.tensors((args, kwargs)))
        for tensor, dims in zip(outputs, labels):
            if func._schema.name.endswith('_') and args and tensor is args[0]:
                self._infos[id(tensor)] = dims
                continue
            self._remember(tensor, dims)
            if weights:
                self._weights.add(id(tensor))
        if name in TRANSPARENT:
            return out
        self.operations.append(Operation(
            same_name(name),
            _call_site(),
            [self.labels_of(t) for t in self.tensors((args, kwargs))],
            [(tuple(t.shape), self.labels_of(t)) for t, _ in zip(outputs, labels)],
            self._start,
        ))
        self._follow_shape(name, outputs)
        return out

    def _apply(self, func, name: str, args, kwargs, out, outputs: List[torch.Tensor]) -> List[List[Label]]:
        """Labels of every output tensor."""
        fn = RULES.get(name) or RULES.get(name.rstrip('_'))
        if fn is None and name in _CREATES:
            return [[self.labels.fresh(n) for n in t.shape] for t in outputs]
        if fn is None and _is_pointwise(func, name):
            result = elementwise(self, (args, kwargs), outputs[0])
        elif fn is not None:
            result = fn(self, out, *args, **kwargs)
        else:
            if name not in _NO_LABELS and self.tensors((args, kwargs)):
                if any(label is not None for t in self.tensors((args, kwargs)) for label in self.labels_of(t)):
                    self.opaque.setdefault(name, _call_site())
                opaque(self, (args, kwargs), out)
            result = None
        if result is None:
            result = [[None] * t.ndim for t in outputs]
        elif not isinstance(out, (tuple, list)):
            result = [result]
        return [[self._checked(name, n, label) for n, label in zip(t.shape, dims, strict=True)]
                for t, dims in zip(outputs, result)]  # what a rule leaves out, such as saved statistics, nobody reads

    def _checked(self, name: str, n: int, label: Label) -> Label:
        if label is None or n == 1:  # a single entry can't go
            self.labels.pin(label)
            return None
        if len(label) != n:
            raise AssertionError(f'{name}: a label of {len(label)} for a dim of {n}')
        return label

    def _follow_shape(self, name: str, outputs: List[torch.Tensor]) -> None:
        sizes = self.hints.get('size')
        if sizes and (name in ('view', '_unsafe_view', 'expand', 'reshape') or name in _CREATES) and len(sizes) == outputs[0].ndim:
            labels = self.labels_of(outputs[0])
            for i, label in enumerate(labels):
                self.follow('size', i, label)
            self._follow_quotients(sizes, labels)
        pieces, dim = self.hints.get('split', ((), 0))
        pieces = [pieces] * len(outputs) if isinstance(pieces, int) else pieces
        if pieces and name in ('split_with_sizes', 'split') and len(pieces) == len(outputs):
            for piece, tensor in zip(pieces, outputs):
                if isinstance(piece, _Tracked):
                    self._see(piece, self.labels_of(tensor)[dim % tensor.ndim])
        if name == 'slice' and self._start is not None and not len(self._start):
            for stop in self.hints.get('stop', ()):
                for label in self.labels_of(outputs[0]):
                    if isinstance(stop, _Tracked) and label is not None and len(label) == int(stop):
                        self._see(stop, label)

    def note_normalized(self, out: Any) -> None:
        """``out`` comes from a layer norm or one of its kin, in one operation or in many."""
        shape = self.hints.get('normalized_shape', ())
        for i in range(len(shape)):
            label = self.labels_of(out)[out.ndim - len(shape) + i]
            self.labels.mark_inexact(label, 'normalised over the channels')
            self.follow('normalized_shape', i, label)

    def _follow_quotients(self, sizes: Sequence[Any], labels: List[Label]) -> None:
        """``x.view(b, n, heads, c // heads)``: entries of the dim that ``c`` is the length of are cut as whole heads."""
        for j, size in enumerate(sizes):
            if not isinstance(size, _Tracked) or size.scale != 1 or len(size.sources) != 2:
                continue
            (whole, up), (by, down) = sorted(size.sources, key=lambda pair: -pair[1])
            if (up, down) != (1, -1) or not isinstance(whole, _Length):
                continue
            for i, other in enumerate(sizes):
                if isinstance(other, _Tracked) and other.sources == ((by, 1),) and other.scale == 1:
                    self._tie_quotient(whole.label, labels[i], labels[j], int(other))

    def _tie_quotient(self, whole: np.ndarray, heads: Label, inner: Label, n: int) -> None:
        if heads is None or inner is None:
            entries = np.repeat(heads, len(whole) // n) if inner is None and heads is not None else inner
            entries = self.constant(len(whole)) if entries is None else np.resize(entries, len(whole))
        else:
            entries = self.labels.merge([heads, inner]).ravel()
        self.labels.tie_counts(whole, entries)

    def _see(self, given: '_Tracked', label: Label) -> None:
        if given.path is not None:
            attribute = self.attributes.setdefault(given.path, Attribute(given.path, int(int(given) / given.scale)))
            attribute.seen.append((label, given.scale))
        elif given.label is not None and label is not None:
            self.labels.tie_counts(given.label, label)

    def length(self, tensor: torch.Tensor, dim: int) -> int:
        """Length of a dim, which remembers whose it is."""
        label = self.labels_of(tensor)[dim] if tensor.ndim else None
        n = tensor.shape[dim]
        return n if label is None else _Tracked(n, ((self._lengths.setdefault(id(label), _Length(label)), 1),))

    def _remember(self, tensor: torch.Tensor, dims: List[Label]) -> None:
        self._infos[id(tensor)] = dims
        self._alive.append(tensor)  # an id is good as long as its object lives

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, args: Tuple, kwargs: Dict[str, Any], count: bool = True, training: bool = False) -> Any:
        """One forward; the outputs' dims are pinned, since others rely on them."""
        self.counting = count
        self._model.train(training)
        with ExitStack() as stack:
            stack.enter_context(quiet(self._model))
            stack.enter_context(_tagged(self._model))
            stack.enter_context(_Provenance(self))
            stack.enter_context(self)
            out = self._model(*args, **kwargs)
        if count:
            self.main = len(self.operations)
        for tensor in self.tensors(_leaves(out)):
            for label in self.labels_of(tensor):
                self.labels.pin(label)
        return out


def _leaves(out: Any) -> List[Any]:
    if hasattr(out, '__dict__') and not isinstance(out, (torch.Tensor, dict, list, tuple)):
        return tree_leaves(dict(vars(out)))
    return tree_leaves(out)


@contextmanager
def _tagged(model: nn.Module) -> Iterator[None]:
    """Integer attributes, and those inside tuples and lists, know their paths for the time being."""
    before = []
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        for key, value in list(vars(module).items()):
            if key.startswith('_') or key == 'training':
                continue
            if type(value) is int:
                tagged: Any = _Tracked(value, ((prefix + key, 1),))
            elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
                tagged = type(value)(_Tracked(v, ((f'{prefix}{key}.{i}', 1),)) for i, v in enumerate(value))
            else:
                continue
            before.append((module, key, value))
            vars(module)[key] = tagged
    try:
        yield
    finally:
        for module, key, value in before:
            vars(module)[key] = value


def _flat_ints(args: Iterable[Any]) -> List[Any]:
    args = list(args)
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return list(args[0])
    return args


class _Provenance(TorchFunctionMode):
    """Keeps the integer arguments of the calls that shape tensors, as objects, for the rules below."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, '__self__', None) is torch.Tensor.shape or (func is torch.Tensor.size and not kwargs):
            return self._shape(args[0], *args[1:2])
        before, self._recorder.hints = self._recorder.hints, self._hints(func, args, kwargs) or self._recorder.hints
        try:
            out = func(*args, **kwargs)
            self._recorder.note_normalized(out)
            return out
        finally:
            self._recorder.hints = before

    def _shape(self, tensor: torch.Tensor, dim: Any = None) -> Any:
        if type(dim) is int:
            return self._recorder.length(tensor, dim)
        return torch.Size([self._recorder.length(tensor, d) for d in range(tensor.ndim)])

    def _hints(self, func, args, kwargs) -> Dict[str, Any]:
        name = getattr(func, '__name__', '')
        if name in ('view', 'reshape', 'expand'):
            return {'size': _flat_ints(args[1:]) or list(kwargs.get('shape', kwargs.get('size', ())))}
        if name in _CREATES:
            return {'size': _flat_ints(args[1:] if name.startswith('new_') else args[:1] if name == 'full' else args)}
        if name in ('split', 'split_with_sizes'):
            sizes = args[1] if len(args) > 1 else kwargs.get('split_size_or_sections', kwargs.get('split_size', ()))
            dim = args[2] if len(args) > 2 else kwargs.get('dim', 0)
            return {'split': (list(sizes) if isinstance(sizes, (tuple, list)) else sizes, dim)}
        if name == '__getitem__':
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return {'stop': [s.stop for s in index if isinstance(s, slice)]}
        if name == 'pad':
            return {'pad': list(args[1] if len(args) > 1 else kwargs.get('pad', ()))}
        if name == 'layer_norm' or name == 'rms_norm':
            return {'normalized_shape': list(args[1] if len(args) > 1 else kwargs.get('normalized_shape', ()))}
        if name == 'group_norm':
            return {'num_groups': [args[1] if len(args) > 1 else kwargs.get('num_groups')]}
        if name.startswith('conv'):
            at = {'conv1d': 6, 'conv2d': 6, 'conv3d': 6}.get(name, 6)
            return {'groups': [args[at] if len(args) > at else kwargs.get('groups')]}
        return {}


_HERE = __file__.rsplit('/', 1)[0]


def _call_site() -> Tuple[str, int]:
    """File and line of the model's code that called the operation."""
    frame: Optional[Any] = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if '/torch/' not in path and not path.startswith(_HERE) and '<' not in path:
            return path, frame.f_lineno
        frame = frame.f_back
    return '?', 0
