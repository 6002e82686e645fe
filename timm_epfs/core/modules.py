"""Helpers for torch modules: evaluation mode for a block of code, and the device of a model."""
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

__all__ = ['device_of', 'eval_mode']


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Set a model to evaluation mode inside the block. After it, every module has the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's parameters. The CPU where it has no parameters."""
    return next((p.device for p in model.parameters()), torch.device('cpu'))
