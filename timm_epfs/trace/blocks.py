"""Residual blocks: modules that give back their input plus what their branches make.

Without its branches such a block is the identity, so it can be taken out whole. They are found by following sums: every
tensor is known as a sum of *terms*, and a block is a module of whose output its input is one.
"""
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

__all__ = ['Block', 'Residuals']

_PASS = frozenset({'view', '_unsafe_view', 'clone', 'contiguous', 'detach', 'alias', '_to_copy', 'native_dropout', 't',
                   'unsqueeze', 'squeeze', 'expand'})
_MAKES = frozenset({'convolution', 'addmm', 'mm', 'mul', 'mul_', 'native_batch_norm', 'cudnn_batch_norm',
                    '_native_batch_norm_legit_no_training', 'native_layer_norm'})
_WEIGHT_AT = {'convolution': 1, 'addmm': 2, 'mm': 1}  # which tensor of a product is its weight
_MOVES = frozenset({'permute', 'transpose', 'roll', 'slice', 'index', 'constant_pad_nd'})  # zeros stay zeros


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        module: Its path.
        last: Parameters of the last layer of each branch: with zeros there the block is the identity.
    """
    module: str
    last: Tuple[str, ...]


class Residuals:
    """Follows sums through the forward of a model.

    Args:
        model: The recorder's copy; its modules get hooks.
    """

    def __init__(self, model: nn.Module):
        self.stack: List[str] = []
        self._entered: List[Tuple[Optional[int], Tuple[int, ...], int]] = []
        self._found: Dict[str, Optional[Block]] = {}
        self._names = {id(p): name for name, p in model.named_parameters() if p.ndim}
        self._count = 0
        self._of: Dict[int, int] = {}                       # term of a tensor, by id
        self._terms: Dict[int, Dict[int, bool]] = {}        # term → its parts; True: a ReLU came after
        self._positive: set = set()                         # terms that are outputs of a ReLU
        self._last: Dict[int, Tuple[str, ...]] = {}         # term → parameters of the layer that made it
        self._parameter: Dict[int, str] = {}                # term → name, for parameters and views of them
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._enter(name, args, kwargs), with_kwargs=True)
                module.register_forward_hook(lambda _, args, out, name=name: self._leave(name, args, out))

    def blocks(self) -> List[Block]:
        """Innermost blocks, each run once."""
        found = [block for block in self._found.values() if block is not None]
        return [
            block for block in found
            if not any(other.module.startswith(f'{block.module}.') for other in found)
        ]

    def see(self, name: str, args: Sequence[Any], out: Any) -> None:
        """One operation."""
        out = out[0] if isinstance(out, (tuple, list)) else out
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if not isinstance(out, torch.Tensor):
            return
        ins = [self._term(t) for t in tensors]
        if name in _PASS and ins:
            self._of[id(out)] = ins[0]
            return
        term = self._fresh()
        if name in ('add', 'add_') and len(ins) == 2 and tensors[0].shape == tensors[1].shape == out.shape:
            left, right = self._parts(ins[0]), self._parts(ins[1])
            if not left.keys() & right.keys():
                self._terms[term] = {**left, **right}
        elif name.rstrip('_') in ('relu', 'clamp_min') and ins:
            self._terms[term] = dict.fromkeys(self._parts(ins[0]), True)
            self._positive.add(term)
        elif name.startswith('max_pool') and ins and ins[0] in self._positive:
            self._positive.add(term)
        elif name in _MAKES:
            own = tuple(self._parameter[i] for i in ins if i in self._parameter)
            weight = ins[min(_WEIGHT_AT.get(name, 0), len(ins) - 1)]
            # A weight that is computed (standardised, say) isn't scaled by scaling what it's computed from.
            computed = name in _WEIGHT_AT and weight not in self._parameter
            self._last[term] = () if computed else own or self._last.get(ins[0], ())
        elif name in _MOVES and ins:
            self._last[term] = self._last.get(ins[0], ())
        self._of[id(out)] = term

    def _fresh(self) -> int:
        self._count += 1
        return self._count

    def _term(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self._of:
            self._of[id(tensor)] = self._fresh()
            if id(tensor) in self._names:
                self._parameter[self._of[id(tensor)]] = self._names[id(tensor)]
        return self._of[id(tensor)]

    def _parts(self, term: int) -> Dict[int, bool]:
        return self._terms.get(term, {term: False})

    def _enter(self, name: str, args: Tuple, kwargs: Dict) -> None:
        self.stack.append(name)
        alone = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        self._entered.append((self._term(args[0]), tuple(args[0].shape), self._count) if alone else (None, (), 0))

    def _leave(self, name: str, args: Tuple, out: Any) -> None:
        self.stack.pop()
        term, shape, count = self._entered.pop()
        block = None
        if term is not None and isinstance(out, torch.Tensor) and tuple(out.shape) == shape and name not in self._found:
            block = self._block(name, term, self._term(out), count)
        self._found[name] = block

    def _block(self, name: str, source: int, result: int, count: int) -> Optional[Block]:
        kept, parts = self._parts(source), self._parts(result)
        branches = [part for part in parts if part not in kept]
        if source == result or not branches or not kept.keys() <= parts.keys():
            return None
        if any(parts[part] for part in branches) and source not in self._positive:
            return None  # a ReLU after the sum is the identity on what came out of one only
        if any(part <= count or not self._last.get(part) for part in branches):
            return None  # something from outside is added, or by a layer without parameters
        return Block(name, tuple(sorted({p for part in branches for p in self._last[part]})))
