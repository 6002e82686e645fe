"""Residual blocks: modules that add what their branches make to a shortcut.

Without its branches such a block is its shortcut: the identity, so that it can be taken out whole, or a chain of its
children (a projection where the shape changes, the activation after the sum). They are found by following sums: every
tensor is known as a sum of *terms*, and a block is a module of whose output its input, or what a chain of its children
makes of its input, is one.
"""
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

__all__ = ['Block', 'Residuals']

_PASS = frozenset({'view', '_unsafe_view', 'clone', 'contiguous', 'detach', 'alias', '_to_copy', 'native_dropout', 't',
                   'unsqueeze', 'squeeze', 'expand'})
_MAKES = frozenset({'convolution', 'addmm', 'mm', 'mul', 'mul_', 'native_batch_norm', 'cudnn_batch_norm',
                    '_native_batch_norm_legit_no_training', 'native_layer_norm'})
_WEIGHT_AT = {'convolution': 1, 'addmm': 2, 'mm': 1}  # which tensor of a product is its weight
_MOVES = frozenset({'permute', 'transpose', 'roll', 'slice', 'index', 'constant_pad_nd'})  # zeros stay zeros


Key = Tuple[int, int]   # a tensor at one point of the forward: its id and its term, which in-place operations change


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        module: Its path.
        last: Parameters of the last layer of each branch: with zeros there the block is its shortcut.
        shortcut: Names of the block's children that its shortcut is, in the order they run. None: the identity.
        projects: Whether the shortcut is more than the block's input and an activation after the sum.
    """
    module: str
    last: Tuple[str, ...]
    shortcut: Tuple[str, ...] = ()
    projects: bool = False


@dataclass(frozen=True)
class _Call:
    """One run of a child: its name in its parent, what entered and what left."""
    name: str
    entered: Key
    left: Key


class Residuals:
    """Follows sums through the forward of a model.

    Args:
        model: The recorder's copy; its modules get hooks.
    """

    def __init__(self, model: nn.Module):
        self.stack: List[str] = []
        self._entered: List[Tuple[Optional[Key], int]] = []     # of each module of the stack: its input, terms so far
        self._calls: Dict[str, List[_Call]] = {}                # of each module: those of its children
        self._found: Dict[str, Optional[Block]] = {}
        self._model = model
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
                module.register_forward_hook(lambda _, args, out, name=name: self._leave(name, out))

    def blocks(self) -> List[Block]:
        """Innermost blocks, each run once. Those that their input goes through unchanged come before any other."""
        found = [block for block in self._found.values() if block is not None]
        plain = _innermost([block for block in found if not block.projects])
        others = _innermost([block for block in found if block.projects])
        apart = [block for block in others if not any(_nested(block.module, other.module) for other in plain)]
        kept = {block.module for block in (*plain, *apart)}
        return [block for block in found if block.module in kept]

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
        self._calls[name] = []
        alone = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        self._entered.append((self._key(args[0]) if alone else None, self._count))

    def _leave(self, name: str, out: Any) -> None:
        self.stack.pop()
        source, count = self._entered.pop()
        block = None
        if source is not None and isinstance(out, torch.Tensor):
            parent, _, own = name.rpartition('.')
            result = self._key(out)
            self._calls.setdefault(parent, []).append(_Call(own, source, result))
            if name not in self._found and source != result:
                block = next(self._blocks(name, source, result, count), None)
        self._found[name] = block

    def _key(self, tensor: torch.Tensor) -> Key:
        return id(tensor), self._term(tensor)

    def _blocks(self, name: str, source: Key, result: Key, count: int) -> Iterator[Block]:
        """What the module can be, the simplest first."""
        parts = self._parts(result[1])
        if source[1] in self._positive or not any(parts.values()):  # on positive inputs a ReLU is the identity
            yield from self._identity(name, source, parts, count, ())
        for call in self._calls[name]:
            if call.left == result and call.entered != source:
                parts = self._parts(call.entered[1])
                if not any(parts.values()):
                    yield from self._identity(name, source, parts, count, (call.name,))
                    yield from self._projection(name, source, parts, count, (call.name,))
        yield from self._projection(name, source, self._parts(result[1]), count, ())

    def _identity(self, name: str, source: Key, parts: Dict[int, bool], count: int, tail: Tuple) -> Iterator[Block]:
        kept = self._parts(source[1])
        if kept.keys() <= parts.keys() and (last := self._branches(parts, kept, count)):
            yield Block(name, last, tail)

    def _projection(self, name: str, source: Key, parts: Dict[int, bool], count: int, tail: Tuple) -> Iterator[Block]:
        if any(parts.values()) or len(parts) < 2:
            return
        chains = [(part, chain) for part in parts if (chain := self._chain(name, source, part))]
        block = self._model.get_submodule(name)
        costs = [sum(len([*block.get_submodule(child).parameters()]) for child in chain) for _, chain in chains]
        if not chains or costs.count(min(costs)) > 1:
            return  # none, or branches that are all alike
        part, chain = chains[costs.index(min(costs))]
        last = self._branches(parts, {part: False}, count)
        if last and len({*chain, *tail}) == len(chain) + len(tail):
            yield Block(name, last, (*chain, *tail), projects=True)

    def _branches(self, parts: Dict[int, bool], kept: Dict[int, bool], count: int) -> Tuple[str, ...]:
        """Parameters of the layers that end the branches; none if one is from outside, or of a layer without any."""
        branches = [part for part in parts if part not in kept]
        if any(part <= count or not self._last.get(part) for part in branches):
            return ()
        return tuple(sorted({p for part in branches for p in self._last[part]}))

    def _chain(self, name: str, source: Key, part: int) -> Tuple[str, ...]:
        """Children that make a part of the sum of the module's input, each of what the one before it makes."""
        chain: List[str] = []
        made = {call.left: call for call in reversed(self._calls[name]) if call.left != call.entered}
        call = next((call for key, call in made.items() if key[1] == part), None)
        while call is not None and len(chain) < len(made):
            chain.insert(0, call.name)
            if call.entered == source:
                return tuple(chain)
            call = made.get(call.entered)
        return ()


def _innermost(blocks: Sequence[Block]) -> List[Block]:
    return [block for block in blocks if not any(other.module.startswith(f'{block.module}.') for other in blocks)]


def _nested(one: str, other: str) -> bool:
    return one.startswith(f'{other}.') or other.startswith(f'{one}.')
