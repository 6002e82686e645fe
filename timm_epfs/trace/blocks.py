"""Residual blocks: modules that add what their branches make to a shortcut.

Without its branches such a block is its shortcut, and that is the identity or a chain of its children: a projection
where the shape changes, the activation after the sum. The block is cut by leaving only that.

Blocks are found by following sums. Take the block that begins a stage of a ResNet, with values as in ``Sums``::

    def forward(self, x):                          # x:     value 1
        y = self.conv2(self.conv1(x).relu())       # y:     value 4, made by conv2
        s = self.downsample(x)                     # s:     value 5, made by downsample
        return self.act(y + s)                     # y + s: value 6, terms 4 and 5; returned: value 7, a ReLU of them

1. Is x a term of what is returned? No: the shortcut isn't the identity.
2. Did a child make it of a sum? ``act`` did. Is x a term of that sum? No: the shortcut isn't ``act`` alone.
3. Did a chain of children make one of its terms of x? ``downsample`` made 5. (4 isn't: the ReLU between conv1 and conv2
   is not a module.)

So the shortcut is ``downsample``, then ``act``. The branch is 4, which is zero where conv2's parameters are zero.

>>> from timm.models.resnet import BasicBlock
>>> from timm_epfs.trace.recorder import Recorder
>>> block = BasicBlock(8, 16, downsample=nn.Conv2d(8, 16, 1))
>>> rec = Recorder(nn.Sequential(nn.Conv2d(3, 8, 1), block).to('meta').eval())
>>> rec.run((torch.empty(1, 3, 4, 4, device='meta'),), {})
>>> rec.blocks
(Block(module='1', last=('1.bn2.bias', '1.bn2.weight'), shortcut=('downsample', 'act2'), projects=True),)
"""
from dataclasses import dataclass, field
from typing import Any, Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import nn

from .sums import Key, Sums

__all__ = ['Block', 'BlockFinder']


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        module: Its path.
        last: Parameters of the last layer of each branch: with zeros there the block is its shortcut.
        shortcut: Names of the children that its shortcut is, in the order they run. Empty: the identity.
        projects: Whether the shortcut is more than the block's input and an activation after the sum.
    """
    module: str
    last: Tuple[str, ...]
    shortcut: Tuple[str, ...] = ()
    projects: bool = False


@dataclass
class _Run:
    """One run of a module.

    Attributes:
        path: Path of the module.
        source: What it was given; None if that isn't a single tensor.
        start: Number of values before it ran: those above were made inside.
        result: What it gave.
        children: Runs of its children, each from one tensor to one tensor.
    """
    path: str
    source: Optional[Key]
    start: int
    result: Optional[Key] = None
    children: List['_Run'] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.rpartition('.')[2]


class BlockFinder:
    """Watches the forwards of a model for residual blocks.

    Args:
        model: The recorder's copy; its modules get hooks.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._sums = Sums(model)
        self._running = [_Run('', None, 0)]
        self._found: Dict[str, Optional[Block]] = {}  # None for what isn't a block or ran more than once
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._enter(name, args, kwargs), with_kwargs=True)
                module.register_forward_hook(lambda _, args, out, name=name: self._leave(out))

    @property
    def modules(self) -> Tuple[str, ...]:
        """Paths of the modules that are running, the outermost first, without the model itself."""
        return tuple(run.path for run in self._running[1:])

    def see(self, name: str, args: Sequence[Any], out: Any) -> None:
        """Follow one ATen operation: its name, positional arguments and output."""
        self._sums.see(name, args, out)

    def blocks(self) -> Tuple[Block, ...]:
        """The blocks, none inside another: inner ones win, and those without a projection win over those with one."""
        found = [block for block in self._found.values() if block is not None]
        plain = _innermost([block for block in found if not block.projects])
        projected = _innermost([block for block in found if block.projects])
        kept = plain + [block for block in projected if not any(_nested(block, other) for other in plain)]
        return tuple(block for block in found if block in kept)

    def _enter(self, name: str, args: Tuple, kwargs: Dict) -> None:
        single = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        self._running.append(_Run(name, self._sums.key(args[0]) if single else None, self._sums.count))

    def _leave(self, out: Any) -> None:
        run = self._running.pop()
        block = None
        if run.source is not None and isinstance(out, torch.Tensor):
            run.result = self._sums.key(out)
            if self._running[-1].path == run.path.rpartition('.')[0]:
                self._running[-1].children.append(run)
            if run.path not in self._found and run.source != run.result:
                block = next(self._candidates(run), None)
        self._found[run.path] = block

    def _candidates(self, run: _Run) -> Iterator[Block]:
        """What blocks a module can be, the simplest first. The numbers are those of the questions at the top."""
        total = self._sums.terms(run.result[1])
        under_relu = any(total.values())
        if not under_relu or self._sums.is_nonnegative(run.source[1]):  # a ReLU leaves a non-negative input as it is
            yield from self._identity(run, total, ())  # 1.
        for child in run.children:
            if child.result == run.result and child.source != run.source:
                before = self._sums.terms(child.source[1])
                if not any(before.values()):
                    yield from self._identity(run, before, (child.name,))  # 2.
                    yield from self._projection(run, before, (child.name,))  # 3., with an activation after the sum
        if not under_relu:
            yield from self._projection(run, total, ())  # 3., without one

    def _identity(self, run: _Run, total: Mapping[int, bool], after: Tuple[str, ...]) -> Iterator[Block]:
        """The block whose shortcut is its input and the children ``after`` the sum, if it is one."""
        source = self._sums.terms(run.source[1])
        if source.keys() <= total.keys() and (last := self._ends(run, total, source)):
            yield Block(run.path, last, after)

    def _projection(self, run: _Run, total: Mapping[int, bool], after: Tuple[str, ...]) -> Iterator[Block]:
        """The block whose shortcut is a chain of children, the one with the fewest parameter tensors, if it is one."""
        chains = {term: chain for term in total if (chain := _chain(run, term))}
        if len(total) < 2 or not chains:
            return
        sizes = {term: self._parameter_tensors(run, chain) for term, chain in chains.items()}
        term = min(sizes, key=sizes.__getitem__)
        if list(sizes.values()).count(sizes[term]) > 1:
            return  # branches that are alike: none of them is the shortcut
        shortcut = (*chains[term], *after)
        last = self._ends(run, total, (term,))
        if last and len(set(shortcut)) == len(shortcut):
            yield Block(run.path, last, shortcut, projects=True)

    def _parameter_tensors(self, run: _Run, children: Sequence[str]) -> int:
        module = self._model.get_submodule(run.path)
        return sum(len([*module.get_submodule(child).parameters()]) for child in children)

    def _ends(self, run: _Run, total: Mapping[int, bool], shortcut: Collection[int]) -> Tuple[str, ...]:
        """Parameters of the layers that end the branches, which are all terms but the shortcut's.

        Empty if a branch was made outside of the block, or by no layer with parameters.
        """
        branches = [term for term in total if term not in shortcut]
        if any(term <= run.start or not self._sums.layer(term) for term in branches):
            return ()
        return tuple(sorted({name for term in branches for name in self._sums.layer(term)}))


def _chain(run: _Run, term: int) -> Tuple[str, ...]:
    """Names of the children that make a term of the module's input, each of what the one before it made."""
    made_by = {child.result: child for child in reversed(run.children) if child.result != child.source}
    child = next((child for key, child in made_by.items() if key[1] == term), None)
    chain: List[str] = []
    while child is not None and len(chain) < len(made_by):
        chain.insert(0, child.name)
        if child.source == run.source:
            return tuple(chain)
        child = made_by.get(child.source)
    return ()


def _innermost(blocks: Sequence[Block]) -> List[Block]:
    return [block for block in blocks if not any(other.module.startswith(f'{block.module}.') for other in blocks)]


def _nested(one: Block, other: Block) -> bool:
    return one.module.startswith(f'{other.module}.') or other.module.startswith(f'{one.module}.')
