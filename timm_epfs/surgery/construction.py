"""What a model's constructor does to its parameters: watched, changed, or left out."""
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Callable, Dict, Iterator, Optional, Set, Tuple

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

    >>> weight = nn.Linear(2, 2).weight
    >>> before = weight.detach().clone()
    >>> with SkipInit() as skipped:
    ...     skipped.add(weight)
    ...     values = init.normal_(weight)
    >>> weight.equal(before)
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: Dict[int, Tensor] = {}  # by address; while they exist, nothing else is there
        self._overwritten: Set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Skip the initialisers of a tensor, under whatever view of it."""
        self._tensors[tensor.data_ptr()] = tensor

    def would_overwrite(self, tensor: Tensor) -> bool:
        """Whether an initialiser that was skipped would have written to all entries of a tensor."""
        return tensor.data_ptr() in self._overwritten

    def __torch_function__(self, func: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None) -> Any:
        kwargs = kwargs or {}
        if func in _OVERWRITE or func in _CHANGE:
            tensor = args[0] if args else kwargs['tensor']
            if tensor.is_meta:
                return tensor
            whole = self._tensors.get(tensor.data_ptr()) if self._tensors else None
            if whole is not None:
                if func in _OVERWRITE and tensor.numel() == whole.numel():
                    self._overwritten.add(tensor.data_ptr())
                return tensor
        return func(*args, **kwargs)


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
