"""Sums in a forward: which values a tensor is the sum of, and which layers made them."""
from typing import Any, Dict, Mapping, Sequence, Set, Tuple

import torch
from torch import nn

__all__ = ['Key', 'Sums']

_SAME_VALUE = frozenset({
    'view', '_unsafe_view', 'clone', 'contiguous', 'detach', 'alias', '_to_copy', 'native_dropout', 't', 'unsqueeze',
    'squeeze', 'expand',
})
_LAYERS = frozenset({
    'convolution', 'addmm', 'mm', 'mul', 'mul_', 'native_batch_norm', 'cudnn_batch_norm',
    '_native_batch_norm_legit_no_training', 'native_layer_norm',
})
_WEIGHT_AT = {'convolution': 1, 'addmm': 2, 'mm': 1}  # which tensor of a product is its weight
_ZERO_STAYS_ZERO = frozenset({'permute', 'transpose', 'roll', 'slice', 'index', 'constant_pad_nd'})

Key = Tuple[int, int]  # id of a tensor, and its value


class Sums:
    """Follows sums through the forward of a model, operation by operation.

    What a tensor holds at one moment is a *value*, and values are numbered in the order in which they are made. An
    operation in place gives its tensor a new value; a view or a copy has the value of what it was made of. Adding two
    tensors of one shape gives a value with *terms*; every other value is its own, only term::

        y = conv(x)            # x: value 1, y: value 2
        y += x                 # y: value 3, terms 1 and 2
        z = y.relu()           # z: value 4, terms 1 and 2, under a ReLU
        w = z + x              # w: value 5, its own term: 1 would count twice

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self.count = 0                                      # of the values so far
        self._names = {id(p): name for name, p in model.named_parameters() if p.ndim}
        self._value: Dict[int, int] = {}                    # by the id of a tensor, which the recorder keeps alive
        self._terms: Dict[int, Dict[int, bool]] = {}        # of a value: its terms, and whether under a ReLU
        self._nonnegative: Set[int] = set()
        self._layer: Dict[int, Tuple[str, ...]] = {}        # of a value: parameters of the layer that made it
        self._parameter: Dict[int, str] = {}                # the name of each value that is a parameter

    def key(self, tensor: torch.Tensor) -> Key:
        """What a tensor holds now."""
        return id(tensor), self._value_of(tensor)

    def terms(self, value: int) -> Mapping[int, bool]:
        """The terms of a value, and whether each went through a ReLU after it was added."""
        return self._terms.get(value, {value: False})

    def is_nonnegative(self, value: int) -> bool:
        """Whether a value is known to have no negative numbers."""
        return value in self._nonnegative

    def layer(self, value: int) -> Tuple[str, ...]:
        """Parameters of the layer that made a value: with zeros there, the value is zero. Empty if unknown."""
        return self._layer.get(value, ())

    def see(self, name: str, args: Sequence[Any], out: Any) -> None:
        """Follow one ATen operation.

        Args:
            name: Its name.
            args: Its positional arguments.
            out: What it gave.
        """
        out = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(out, torch.Tensor):
            return
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        given = [self._value_of(t) for t in tensors]
        if name in _SAME_VALUE and given:
            self._value[id(out)] = given[0]
            return
        value = self._new_value()
        if name in ('add', 'add_') and len(given) == 2 and tensors[0].shape == tensors[1].shape == out.shape:
            self._add(value, *given)
        elif name.rstrip('_') in ('relu', 'clamp_min') and given:
            self._terms[value] = dict.fromkeys(self.terms(given[0]), True)
            self._nonnegative.add(value)
        elif name.startswith('max_pool') and given and given[0] in self._nonnegative:
            self._nonnegative.add(value)
        elif name in _LAYERS and given:
            self._layer[value] = self._layer_of(name, given)
        elif name in _ZERO_STAYS_ZERO and given:
            self._layer[value] = self.layer(given[0])
        self._value[id(out)] = value

    def _value_of(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._value:
            self._value[id(tensor)] = self._new_value()
            if id(tensor) in self._names:
                self._parameter[self._value[id(tensor)]] = self._names[id(tensor)]
        return self._value[id(tensor)]

    def _new_value(self) -> int:
        self.count += 1
        return self.count

    def _add(self, value: int, left: int, right: int) -> None:
        if not self.terms(left).keys() & self.terms(right).keys():
            self._terms[value] = {**self.terms(left), **self.terms(right)}

    def _layer_of(self, name: str, given: Sequence[int]) -> Tuple[str, ...]:
        weight = given[min(_WEIGHT_AT.get(name, 0), len(given) - 1)]
        if name in _WEIGHT_AT and weight not in self._parameter:
            return ()  # the weight is computed, standardised say: scaling its parameter doesn't scale the output
        return tuple(self._parameter[v] for v in given if v in self._parameter) or self.layer(given[0])
