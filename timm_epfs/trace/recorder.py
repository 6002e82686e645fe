"""Watches the forwards of a copy of the model and labels every tensor in them.

Below autograd every model is a few dozen ATen operations; what each does to labels is looked up in the table of rules.
"""
from contextlib import ExitStack
from typing import Any, Callable, Collection, Dict, FrozenSet, List, Set, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import named_tensors, returned_tensors
from .blocks import Block, BlockFinder
from .calls import Calls, tensors_in
from .copies import call_site, quiet
from .follow import CREATES, Follower, WatchIntegers
from .forwards import decided_by_numbers
from .labels import Label, Labels
from .provenance import tagged
from .records import Dim, Operation, Product, RecordedCall
from .rules import RULES, elementwise, opaque

__all__ = ['RETURNED', 'Recorder', 'TRANSPARENT', 'operation_name', 'same_name']

RETURNED = -1  # stands for the model's output among the numbers of operations

# Operations through which no label could pass: that they have no rule isn't worth a report.
_NO_LABELS = frozenset({
    'arange', 'linspace', 'eye', 'tril_indices', 'triu_indices', 'scalar_tensor', 'nonzero', 'randperm',
})

_PRODUCTS = frozenset({'mm', 'addmm', 'bmm', 'baddbmm', 'convolution', '_convolution'})

# Not recorded: a cut may change strides, and with them whether a reshape copies.
TRANSPARENT = frozenset({'clone', 'contiguous', 'alias', 'as_strided_', 'detach', 'lift_fresh', '_to_copy'})


def operation_name(func: Any) -> str:
    """``'view'`` for an operation of ATen, ``'namespace::name'`` for any other."""
    return func._schema.name.removeprefix('aten::')


def same_name(name: str) -> str:
    """One name for the operations that differ only in whether they copy."""
    return 'view' if name in ('_unsafe_view', '_reshape_alias') else name


def _is_pointwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags:
        return True
    plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith('_') else None
    return plain is not None and any(torch.Tag.pointwise in getattr(plain, o).tags for o in plain.overloads())


class Recorder(TorchDispatchMode):
    """Labels the tensors of a model's forwards.

    Args:
        model: A copy, made for this. It gets hooks; its integer attributes are tagged during a run.
        whole_heads: As in ``trace``.
        has_numbers: Whether the copy has data, and what is decided by numbers is to be kept.

    Attributes:
        labels: What is known about the labels.
        follower: What is known about the integers that are lengths.
        operations: The operations of all forwards; the first ``main`` are those of ``run``.
        products: Matrix products and convolutions of ``run``.
        calls: Torch functions that ``run`` called.
        contracted: Labels of the input dims of weights, over which products sum.
        written: Labels of the output dims of weights.
        parameters: Parameters of the model by name.
        params: Those that were used, and buffers that were used, with their labels.
        opaque: Operations without a rule, and where each was met first.
        blocks: Residual blocks of ``run``.
        name: Name of the operation that is running.
    """

    def __init__(self, model: nn.Module, whole_heads: bool = True, has_numbers: bool = False):
        super().__init__()
        self._has_numbers = has_numbers
        self.labels = Labels(whole_heads)
        self.follower = Follower(self.labels)
        self.operations: List[Operation] = []
        self.main = 0
        self.products: List[Product] = []
        self.calls: List[RecordedCall] = []
        self.contracted: List[np.ndarray] = []
        self.written: List[np.ndarray] = []
        self.parameters = dict(model.named_parameters())
        self.params: Dict[str, Tuple[torch.Tensor, List[Label]]] = {}
        self.opaque: Dict[str, Tuple[str, int]] = {}
        self.blocks: Tuple[Block, ...] = ()
        self.name = ''
        self._start: Label = None
        self._counting = False
        self._model = model
        self._block_finder = BlockFinder(model)
        self._known: Dict[int, List[Label]] = {}
        self._repeated: Dict[int, FrozenSet[int]] = {}
        self._inexact_if_read: Dict[int, List[Tuple[Label, str]]] = {}
        self._weights: Set[int] = set()
        self._layer_outputs: Set[int] = set()
        self._alive: List[torch.Tensor] = []
        self._names: Dict[int, str] = {}
        for name, tensor in named_tensors(model).items():
            self._names.setdefault(id(tensor), name)

    # -- what rules use ---------------------------------------------------------------------------------------------

    def tensors(self, args: Any) -> List[torch.Tensor]:
        """The tensors among arguments, nested or not."""
        return tensors_in(args)

    def labels_of(self, tensor: torch.Tensor) -> List[Label]:
        """A label for each dim; ``None`` where nothing can be cut. A parameter gets its labels when it's first met."""
        known = self._known.get(id(tensor))
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
        """Whether this is a parameter, a buffer or computed from nothing else."""
        self.labels_of(tensor)
        return id(tensor) in self._weights

    def is_layer_output(self, tensor: torch.Tensor) -> bool:
        """Whether a product made this of parameters alone, as a layer does of learned queries."""
        return id(tensor) in self._layer_outputs

    def note_repeated(self, tensor: torch.Tensor, dims: Collection[int]) -> None:
        """A tensor repeats one entry in some dims: ``expand`` made it."""
        self._repeated[id(tensor)] = frozenset(dims)

    def repeats(self, tensor: torch.Tensor, dim: int) -> bool:
        """Whether a tensor repeats one entry in a dim."""
        return dim in self._repeated.get(id(tensor), ())

    def mark_inexact_if_read(self, tensors: Any, label: Label, reason: str) -> None:
        """As ``labels.mark_inexact``, once something reads one of these tensors: attention's mean over its heads is
        often left unread."""
        for tensor in self.tensors(tensors):
            self._inexact_if_read.setdefault(id(tensor), []).append((label, reason))

    def constant(self, n: int) -> np.ndarray:
        """A label of ``n`` entries that always stay."""
        return np.zeros(n, dtype=np.int64)

    def mark_input(self, label: Label) -> None:
        """A product sums over this dim of a weight: a zero there takes the unit out of the sum."""
        if label is not None:
            self.contracted.append(label)

    def mark_output(self, label: Label) -> None:
        """A product writes the outputs that this dim of a weight has."""
        if label is not None:
            self.written.append(label)

    def count_product(self, out: torch.Tensor, dims: List[Dim], written: List[Label]) -> None:
        """Count a product in the cost model.

        Args:
            out: Its output.
            dims: The dims whose lengths, multiplied, are its MACs.
            written: Labels of the output.
        """
        if self._counting:
            self.products.append(Product(dims, list(zip(out.shape, written)), self._block_finder.modules))

    def expect_start(self, before: Label) -> None:
        """A slice starts after these entries: in a cut model, after those of them that are left."""
        self._start = before

    def follow(self, argument: str, position: int, label: Label) -> None:
        """The integer that was passed here is the length of a dim; if it is an attribute of a module, it follows."""
        self.follower.argument(argument, position, label)

    # -- recording --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.name, self._start = operation_name(func), None
        inputs = tensors_in((args, kwargs))
        for tensor in inputs:
            self.labels_of(tensor)
            self._read(tensor)
        out = func(*args, **kwargs)
        self._block_finder.see(self.name, args, out)
        outputs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
        from_weights = bool(inputs) and all(id(t) in self._weights for t in inputs)
        from_product = from_weights and (
            self.name in _PRODUCTS or any(id(t) in self._layer_outputs for t in inputs))
        self.labels.among_weights, self.labels.source = from_weights, len(self.operations)
        labels = self._apply_rule(func, args, kwargs, inputs, out, outputs)
        for tensor, dims in zip(outputs, labels):
            self._remember(tensor, dims)
            if from_weights:
                self._weights.add(id(tensor))
            if from_product:
                self._layer_outputs.add(id(tensor))
        if self.name not in TRANSPARENT:
            self.operations.append(Operation(
                same_name(self.name),
                call_site(),
                [self.labels_of(t) for t in inputs],
                [(tuple(t.shape), dims) for t, dims in zip(outputs, labels)],
                self._start,
                decided_by_numbers(func, self.name, args, out) if self._has_numbers else None,
            ))
            self.follower.shaped(self.name, labels, self._start)
        return out

    def _apply_rule(self, func, args, kwargs, inputs, out, outputs: List[torch.Tensor]) -> List[List[Label]]:
        """Labels of the outputs. A rule may leave out the last ones, such as saved statistics, that nobody reads."""
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

    def _read(self, tensor: torch.Tensor) -> None:
        for label, reason in self._inexact_if_read.pop(id(tensor), ()):
            self.labels.mark_inexact(label, reason)

    def _checked(self, n: int, label: Label) -> Label:
        if label is None or n == 1:  # a single entry can't go
            self.labels.pin(label)
            return None
        if len(label) != n:
            raise AssertionError(f'{self.name}: a label of {len(label)} for a dim of {n}')
        return label

    def _remember(self, tensor: torch.Tensor, dims: List[Label]) -> None:
        self._known[id(tensor)] = dims
        self._alive.append(tensor)  # an id is taken for as long as its object lives

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, args: Tuple, kwargs: Dict[str, Any]) -> None:
        """Record the forward that is counted and that a cut model must repeat. Called once, before any other.

        What it returns is pinned, since whoever calls the model relies on it.
        """
        self._counting = True
        with Calls(self._see_call):
            out = self.watch(lambda: self._model(*args, **kwargs))
        self._counting = False
        self._pin(out)
        self.main = len(self.operations)
        self.blocks = self._block_finder.blocks()

    def run_training(self, args: Tuple, kwargs: Dict[str, Any]) -> None:
        """Record another forward, in training mode."""
        self._model.train()
        self._pin(self.watch(lambda: self._model(*args, **kwargs)))

    def watch(self, call: Callable[[], Any]) -> Any:
        """Label the tensors of any call of the model's code."""
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(tagged(self._model))
            stack.enter_context(WatchIntegers(self.follower, self.labels_of))
            stack.enter_context(self)
            return call()

    def _see_call(self, function: Callable, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [(tuple(t.shape), self.labels_of(t)) for t in tensors_in((args, kwargs))]
        self.calls.append(RecordedCall(function, tensors, self._block_finder.modules))

    def _pin(self, out: Any) -> None:
        self.labels.source = RETURNED
        for tensor in returned_tensors(out):
            self._read(tensor)
            for label in self.labels_of(tensor):
                self.labels.pin(label)
