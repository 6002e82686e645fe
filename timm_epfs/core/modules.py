"""What torch has no function for: a module's mode for a while, and where it is."""
from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

__all__ = ['device_of', 'eval_mode']


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode inside the block, every module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device('cpu'))
