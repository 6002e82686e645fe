"""Helpers for torch modules: evaluation mode for a block of code, a model's device and its tensors by name."""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, Tuple

import torch
from torch import nn

__all__ = ['device_of', 'eval_mode', 'named_tensors', 'set_modes']


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set a model to evaluation mode inside the block. After it, every module has the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        set_modes(modes)


def set_modes(modes: Iterable[Tuple[nn.Module, bool]]) -> None:
    """Set modules to training or evaluation mode, each by its own ``train()``.

    That method may do more than set a flag: torchvision's feature extractors change their graph in it. It passes the
    mode on to the module's children, so children have to come after their parents.

    Args:
        modes: Modules, each with whether it trains.
    """
    for module, training in modes:
        if module.training != training:
            module.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's parameters. The CPU where it has no parameters."""
    return next((p.device for p in model.parameters()), torch.device('cpu'))


def named_tensors(model: nn.Module, remove_duplicate: bool = True) -> Dict[str, torch.Tensor]:
    """A model's parameters and buffers by name.

    Args:
        model: The model.
        remove_duplicate: Whether tied ones appear under their first name only.
    """
    parameters = model.named_parameters(remove_duplicate=remove_duplicate)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=remove_duplicate))}
