"""Watches the forwards of a copy of the model on the meta device and labels every tensor in them.

Below autograd every model is a few dozen ATen operations; each is looked up in the table of rules.
"""
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .blocks import Block, Residuals
from .calls import Calls, tensors_in
from .copies import call_site, quiet
from .follow import Follower
from .labels import Label, Labels
from .provenance import CREATES, Provenance, tagged
from .rules import RULES, elementwise, opaque

__all__ = ['Operation', 'Product', 'Recorder', 'TRANSPARENT', 'operation_name', 'same_name']

_NO_LABELS = frozenset({
    'arange', 'linspace', 'eye', 'tril_indices', 'triu_indices', 'scalar_tensor', 'nonzero', 'randperm',
})


# A reshape copies or not depending on strides, which a cut may change: copies are no steps of the road.
TRANSPARENT = frozenset({'clone', 'contiguous', 'alias', 'as_strided_', 'detach', 'lift_fresh', '_to_copy'})


def operation_name(func: Any) -> str:
    """``'view'`` for ATen's, ``'namespace::name'`` for others, which may share a name and nothing else."""
    return func._schema.name.removeprefix('aten::')


def same_name(name: str) -> str:
    """One name for operations that differ in what they copy, not in what they do."""
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
class Product:
    """A matrix product or convolution: lengths and labels of its dims, of those it writes, and the modules around."""
    dims: List[Tuple[int, Label]]
    written: List[Tuple[int, Label]]
    modules: Tuple[str, ...]


class Recorder(TorchDispatchMode):
    """Labels the tensors of the forwards that run inside it.

    Args:
        model: A copy on the meta device, made for this; its integer attributes are tagged for the time of the trace.
        whole_heads: As in ``trace``.
        with_calls: Whether to note the torch functions that the counted forward calls.
    """

    def __init__(self, model: nn.Module, whole_heads: bool = True, with_calls: bool = False):
        super().__init__()
        self.labels = Labels(whole_heads)
        self.follower = Follower(self.labels)
        self.operations: List[Operation] = []
        self.main = 0                                                   # operations of the counted forward
        self.products: List[Product] = []
        self.calls: List[Tuple[Callable, List[List[Tuple[int, Label]]], Tuple[str, ...]]] = []
        self.inputs_of_products: List[np.ndarray] = []
        self.parameters = dict(model.named_parameters())
        self.params: Dict[str, Tuple[torch.Tensor, List[Label]]] = {}   # parameters and buffers seen, with labels
        self.opaque: Dict[str, Tuple[str, int]] = {}                    # operations without a rule, and where
        self.blocks: List[Block] = []
        self.name = ''                                                  # of the operation that is running
        self._start: Label = None
        self._counting = True
        self._with_calls = with_calls
        self._model = model
        self._residuals = Residuals(model)
        self._infos: Dict[int, List[Label]] = {}
        self._weights: set = set()
        self._alive: List[torch.Tensor] = []
        self._names: Dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), name)

    # -- what rules use ---------------------------------------------------------------------------------------------

    def tensors(self, args: Any) -> List[torch.Tensor]:
        """The tensors among arguments, nested or not."""
        found: List[torch.Tensor] = []
        _collect(args, found)
        return found

    def labels_of(self, tensor: torch.Tensor) -> List[Label]:
        """A label for each dim; ``None`` where nothing can be cut. A parameter's are made when it's first met."""
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

    def constant(self, n: int) -> np.ndarray:
        """``n`` entries that always stay."""
        return np.zeros(n, dtype=np.int64)

    def mark_input(self, label: Label) -> None:
        """This dim is contracted: a zero there silences the unit."""
        if label is not None:
            self.inputs_of_products.append(label)

    def count_product(self, out: torch.Tensor, dims: List[Tuple[int, Label]], written: List[Label]) -> None:
        """Add a product's lengths to the cost model."""
        if self._counting:
            self.products.append(Product(dims, list(zip(out.shape, written)), tuple(self._residuals.stack)))

    def expect_start(self, before: Label) -> None:
        """A slice starts after these entries: in the cut model it must start after what is left of them."""
        self._start = before

    def follow(self, argument: str, position: int, label: Label) -> None:
        """The integer that was passed here is the length of this label, if it came from a module's attribute."""
        self.follower.argument(argument, position, label)

    # -- recording --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.name, self._start = operation_name(func), None
        inputs = self.tensors((args, kwargs))
        for tensor in inputs:
            self.labels_of(tensor)
        out = func(*args, **kwargs)
        self._residuals.see(self.name, args, out)
        outputs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        labels = self._apply(func, args, kwargs, inputs, out, outputs)
        weights = bool(inputs) and all(id(t) in self._weights for t in inputs)
        for tensor, dims in zip(outputs, labels):
            self._remember(tensor, dims)
            if weights:
                self._weights.add(id(tensor))
        if self.name not in TRANSPARENT:
            self.operations.append(Operation(
                same_name(self.name),
                call_site(),
                [self.labels_of(t) for t in inputs],
                [(tuple(t.shape), dims) for t, dims in zip(outputs, labels)],
                self._start,
            ))
            self.follower.shaped(self.name, labels, self._start)
        return out

    def _apply(self, func, args, kwargs, inputs, out, outputs: List[torch.Tensor]) -> List[List[Label]]:
        """Labels of the outputs; what a rule leaves out at the end, such as saved statistics, nobody reads."""
        fn = RULES.get(self.name) or RULES.get(self.name.rstrip('_'))
        if fn is not None:
            result = fn(self, out, *args, **kwargs)
            result = list(result) if isinstance(out, (tuple, list)) else [result]
        elif self.name in CREATES:
            result = [[self.labels.fresh(n) for n in t.shape] for t in outputs]
        elif _is_pointwise(func, self.name):
            result = [elementwise(self, (args, kwargs), outputs[0])]
        else:
            if self.name not in _NO_LABELS and any(label is not None for t in inputs for label in self.labels_of(t)):
                self.opaque.setdefault(self.name, call_site())
            opaque(self, inputs, out)
            result = [[None] * t.ndim for t in outputs]
        return [
            [self._checked(n, label) for n, label in zip(t.shape, dims, strict=True)]
            for t, dims in zip(outputs, result)
        ]

    def _checked(self, n: int, label: Label) -> Label:
        if label is None or n == 1:  # a single entry can't go
            self.labels.pin(label)
            return None
        if len(label) != n:
            raise AssertionError(f'{self.name}: a label of {len(label)} for a dim of {n}')
        return label

    def _remember(self, tensor: torch.Tensor, dims: List[Label]) -> None:
        self._infos[id(tensor)] = dims
        self._alive.append(tensor)  # an id is good as long as its object lives

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, args: Tuple, kwargs: Dict[str, Any]) -> Any:
        """The forward that is counted and that a cut model must repeat. Its outputs' dims are pinned: others rely on
        them. Returns the outputs."""
        out = self.also(lambda: self._model(*args, **kwargs), counting=True)
        self._pin(out)
        self.main = len(self.operations)
        self.blocks = self._residuals.blocks()
        return out

    def run_training(self, args: Tuple, kwargs: Dict[str, Any]) -> None:
        """Another forward, in training mode."""
        self._model.train()
        self._pin(self.also(lambda: self._model(*args, **kwargs)))

    def also(self, call: Callable[[], Any], counting: bool = False) -> Any:
        """Label the tensors of any call of the model's code."""
        self._counting = counting
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(tagged(self._model))
            stack.enter_context(Provenance(self.follower, self.labels_of))
            if counting and self._with_calls:
                stack.enter_context(Calls(self._see_call))
            stack.enter_context(self)
            return call()

    def _see_call(self, function: Callable, args: Any, kwargs: Any, out: Any) -> None:
        dims = [list(zip(t.shape, self.labels_of(t))) for t in tensors_in((args, kwargs))]
        self.calls.append((function, dims, tuple(self._residuals.stack)))

    def _pin(self, out: Any) -> None:
        for tensor in self.tensors(_leaves(out)):
            for label in self.labels_of(tensor):
                self.labels.pin(label)


def _collect(value: Any, found: List[torch.Tensor]) -> None:
    """Arguments of an operation hold tensors, lists of them and a dict: pytree is slow for so little."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _leaves(out: Any) -> List[Any]:
    if hasattr(out, '__dict__') and not isinstance(out, (torch.Tensor, dict, list, tuple)):
        return tree_leaves(dict(vars(out)))
    return tree_leaves(out)
