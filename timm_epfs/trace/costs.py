"""What a model costs and what it calls, as functions of how many units are left."""
from typing import List, Sequence, Tuple

from ..core import CostModel, Size, Structure
from .blocks import Block
from .calls import Call
from .labels import Label
from .recorder import Recorder
from .sizes import Sizer

__all__ = ['build_calls', 'build_cost']


class _EnclosingBlocks:
    """Residual blocks as factors of what is inside: 1 while the block stays, 0 once only its shortcut is left.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[Block]):
        self._factors = {block.module: Size(0, ((block.module, 1),)) for block in blocks}
        self._shortcuts = {
            block.module: frozenset(f'{block.module}.{child}' for child in block.shortcut) for block in blocks
        }

    def of_modules(self, modules: Sequence[str]) -> Tuple[Size, ...]:
        """The factors of something that runs in these modules, the outermost first."""
        return tuple(
            self._factors[module] for module in modules
            if module in self._factors and self._shortcuts[module].isdisjoint(modules)
        )

    def of_parameter(self, name: str) -> Tuple[Size, ...]:
        """The factors of a parameter."""
        return tuple(
            factor for module, factor in self._factors.items()
            if name.startswith(f'{module}.')
            and not name.startswith(tuple(f'{child}.' for child in self._shortcuts[module]))
        )


def build_cost(rec: Recorder, structures: Sequence[Structure], sizer: Sizer, blocks: Sequence[Block]) -> CostModel:
    """The cost model.

    Args:
        rec: The recorder.
        structures: What can be cut.
        sizer: Sizes of labels.
        blocks: Those of the structures that are residual blocks.
    """
    enclosing = _EnclosingBlocks(blocks)
    terms: List[Tuple[str, float, Tuple[Size, ...]]] = []
    for product in rec.products:
        factors = enclosing.of_modules(product.modules)
        terms.append(('macs', 1.0, (*(sizer(n, label) for n, label in product.dims), *factors)))
        terms.append(('activations', 1.0, (*(sizer(n, label) for n, label in product.written), *factors)))
    for name, tensor in rec.parameters.items():
        labels: List[Label] = rec.params[name][1] if name in rec.params else [None] * tensor.ndim
        sizes = (sizer(n, label) for n, label in zip(tensor.shape, labels))
        terms.append(('params', 1.0, (*sizes, *enclosing.of_parameter(name))))
    return CostModel([s.name for s in structures], terms)


def build_calls(rec: Recorder, sizer: Sizer, blocks: Sequence[Block]) -> Tuple[Call, ...]:
    """The calls of the counted forward. Arguments are those of ``build_cost``."""
    enclosing = _EnclosingBlocks(blocks)
    return tuple(
        Call(
            call.function,
            tuple(tuple(sizer(n, label) for n, label in zip(shape, labels)) for shape, labels in call.tensors),
            enclosing.of_modules(call.modules),
        )
        for call in rec.calls
    )
