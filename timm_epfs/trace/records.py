"""Records of a forward: its operations, products and calls."""
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Tuple

import numpy as np

from .labels import Label

__all__ = ['Dim', 'Operation', 'Product', 'RecordedCall']

Dim = Tuple[int, Label]  # a dim's length and its label


@dataclass(frozen=True)
class Operation:
    """One ATen operation. A cut model must repeat it, with lengths as the labels predict.

    Attributes:
        name: Its name.
        site: File and line of the model's code that called it.
        inputs: Labels of the dims of each tensor that it was given.
        outputs: Shape and labels of each tensor that it gave.
        start: Of a slice, the label of what lies before it.
        outcome: What numbers decided (``forwards.py``), so that they decide the same in a cut model. None: nothing.
    """
    name: str
    site: Tuple[str, int]
    inputs: List[List[Label]]
    outputs: List[Tuple[Tuple[int, ...], List[Label]]]
    start: Label = None
    outcome: Any = None

    @property
    def labels(self) -> List[np.ndarray]:
        """The labels that it touches."""
        dims = (*self.inputs, *(labels for _, labels in self.outputs))
        return [label for labels in dims for label in labels if label is not None]


class Product(NamedTuple):
    """A matrix product or a convolution.

    Attributes:
        dims: The dims whose lengths, multiplied, are its MACs.
        written: The dims of its output.
        modules: Paths of the modules that it runs in.
    """
    dims: List[Dim]
    written: List[Dim]
    modules: Tuple[str, ...]


class RecordedCall(NamedTuple):
    """A call of a torch function.

    Attributes:
        function: The function.
        tensors: Shape and labels of each tensor among its arguments.
        modules: Paths of the modules that it runs in.
    """
    function: Callable
    tensors: List[Tuple[Tuple[int, ...], List[Label]]]
    modules: Tuple[str, ...]
