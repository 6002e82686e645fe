"""What a model's constructor does to its parameters: watched, changed, or left out."""
from contextlib import contextmanager
from math import inf
from threading import get_ident
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

__all__ = ['SkipInit', 'parameters_as_they_are_made']

_OVERWRITE = {
    Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, init.uniform_, init.normal_, init.constant_,
    init.kaiming_uniform_,
}
_CHANGE = {Tensor.erfinv_, Tensor.add_, Tensor.mul_, Tensor.clamp_}


class SkipInit(TorchFunctionMode):
    """Inside the block, initialisers of some tensors do nothing. Their values are whatever was in their memory.

    Those of meta tensors are always skipped: they change nothing, and torch takes up to a millisecond each to do so.

    >>> layer = nn.Linear(2, 2)
    >>> before = layer.weight.detach().clone()
    >>> with SkipInit() as skipped:
    ...     skipped.add(layer.weight)
    ...     layer.reset_parameters()
    >>> layer.weight.equal(before), skipped.overwrites(layer.weight)
    (True, 1)
    """

    def __init__(self) -> None:
        super().__init__()
        # By address. While the tensors exist, nothing else is there.
        self._tensors: Dict[int, Tensor] = {}
        self._overwrites: Dict[int, int] = {}
        self._last: Dict[int, float] = {}

    def add(self, tensor: Tensor, last: float = inf) -> None:
        """Skip the initialisers of a tensor, under whatever view of it.

        Args:
            tensor: The tensor.
            last: Which overwrite of the whole tensor is the first to run, from 1. Those before it are skipped; it runs,
                and so does everything after it. ``inf``: skip all. For example, ``Conv2d`` runs ``kaiming_uniform_``,
                then timm's ``init_weights`` runs ``kaiming_normal_``: two overwrites, so with ``last=2`` only the
                second runs.
        """
        address = tensor.data_ptr()
        self._tensors[address], self._overwrites[address], self._last[address] = tensor, 0, last

    def overwrites(self, tensor: Tensor) -> int:
        """How many initialisers would have overwritten all of a tensor."""
        return self._overwrites[tensor.data_ptr()]

    def __torch_function__(self, func: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None) -> Any:
        kwargs = kwargs or {}
        if func in _OVERWRITE or func in _CHANGE:
            tensor = args[0] if args else kwargs['tensor']
            if tensor.is_meta or self._tensors and self._skips(func, tensor):
                return tensor
        return func(*args, **kwargs)

    def _skips(self, func: Callable, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        if address not in self._tensors:
            return False
        if func in _OVERWRITE and tensor.numel() == self._tensors[address].numel():
            self._overwrites[address] += 1
        return self._overwrites[address] < self._last[address]


@contextmanager
def parameters_as_they_are_made(
        change: Callable[[nn.Module, nn.Parameter], Optional[nn.Parameter]],
) -> Iterator[None]:
    """Inside the block, ``change`` sees every parameter that a module of this thread is given.

    Args:
        change: Takes the module and the parameter; may return another parameter for the module to hold.
    """
    thread = get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> Optional[nn.Parameter]:
        return change(module, parameter) if get_ident() == thread else None

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
