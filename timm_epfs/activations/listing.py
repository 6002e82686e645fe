"""Lists the calls of one forward that read the model's own weights and BatchNorm statistics."""
from collections import Counter
from dataclasses import dataclass, replace
from typing import Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from .linear_calls import LinearCall
from .watch import Call, NormCall, Watch

__all__ = ['Reader', 'list_readers']


@dataclass(frozen=True)
class Reader:
    """A weight or a running mean that a forward reads in one place.

    Attributes:
        call: The call that reads it, without its input.
        norm: For a weight: name of the running mean of the BatchNorm that reads what the call returns. Empty if
            something else does.
        bias: For a weight: name of the bias that the call adds. Empty if it adds none, one that is computed (as in
            BEiT), or one that another call adds, too.
    """
    call: Call
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
    outputs: Dict[int, Tuple[str, Tensor]] = {}  # by id, while they exist

    def note(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        if name in readers:
            shared.append(name)
        output = run()
        if isinstance(call, LinearCall):
            readers[name] = Reader(call.without_input())
            outputs[id(output)] = name, output
            return output
        before, tensor = outputs.get(id(call.input), ('', None))
        if tensor is call.input:
            readers[before] = replace(readers[before], norm=name)
        readers[name] = Reader(NormCall(call.input[:0], call.running_mean, call.running_var))
        return output

    with torch.no_grad(), Watch(model, len(images), note):
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
