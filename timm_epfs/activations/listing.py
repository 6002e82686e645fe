"""Lists the calls of one forward that read the model's own weights and BatchNorm statistics."""
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .linear_calls import LinearCall, empty
from .watch import Call, NormCall, Watch

__all__ = ['Reader', 'list_readers']


@dataclass(frozen=True)
class Reader:
    """A weight or a running mean that a forward reads in one place.

    Attributes:
        call: The call that reads it, without its input.
        held: Bytes of all tensors that the forward holds when the call is made, for one image.
        norm: For a weight: name of the running mean of the BatchNorm that reads what the call returns. Empty if
            something else does.
        bias: For a weight: name of the bias that the call adds. Empty if it adds none, one that is computed (as in
            BEiT), or one that another call adds, too.
    """
    call: Call
    held: float
    norm: str = ''
    bias: str = ''

    @property
    def has_intercept(self) -> bool:
        """Whether a constant can be added to what the call returns."""
        return bool(self.norm or self.bias)

    @property
    def is_norm(self) -> bool:
        """Whether it is a running mean."""
        return isinstance(self.call, NormCall)


def list_readers(model: nn.Module, images: Tensor) -> Tuple[Dict[str, Reader], List[str]]:
    """What one forward reads, in its order.

    Args:
        model: The model, in evaluation mode.
        images: A batch of one image or more.

    Returns:
        The readers by the name of what they read, and the names of what is read in several places, which aren't among
        them.
    """
    readers: Dict[str, Reader] = {}
    shared: List[str] = []
    outputs: Dict[int, Tuple[str, weakref.ref]] = {}  # by id

    def note(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if name in readers:
            shared.append(name)
        held = results.bytes() / len(images)
        output = run()
        if isinstance(call, LinearCall):
            readers[name] = Reader(call.without_input(), held)
            outputs[id(output)] = name, weakref.ref(output)
            return output
        before, tensor = outputs.get(id(call.input), ('', lambda: None))
        if tensor() is call.input:
            readers[before] = replace(readers[before], norm=name)
        readers[name] = Reader(NormCall(empty(call.input), call.running_mean, call.running_var), held)
        return output

    with torch.no_grad(), Watch(model, len(images), note), _Results() as results:
        model(images)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    biases = Counter(names.get(id(reader.call.bias)) for reader in readers.values() if not reader.is_norm)
    own = {
        name: replace(
            reader,
            norm='' if reader.norm in shared else reader.norm,
            bias=_once(names.get(id(reader.call.bias)), biases) if not reader.is_norm else '')
        for name, reader in readers.items() if name not in shared
    }
    return own, list(dict.fromkeys(shared))


def _once(name: Optional[str], counts: Mapping[Optional[str], int]) -> str:
    return name if name and counts[name] == 1 else ''


class _Results(TorchFunctionMode):
    """Remembers what functions returned, as long as it exists."""

    def __init__(self):
        super().__init__()
        self._tensors: List[weakref.ref] = []

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Optional[Dict] = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._tensors += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def bytes(self) -> int:
        """Bytes of all that exists. What shares its memory counts once."""
        self._tensors = [tensor for tensor in self._tensors if tensor() is not None]
        storages = [tensor().untyped_storage() for tensor in self._tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
