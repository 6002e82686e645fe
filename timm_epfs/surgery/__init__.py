"""The only package that changes a model.

In: a plan, or masks, and a dense model or checkpoint. Out: the smaller model or checkpoint, or the masked model.
"""
from .copying import cut_copy
from .cutting import TORCHVISION, apply_plan, build_base, inflate_checkpoint, rebuild, slice_checkpoint
from .deferred import DeferredInit
from .masks import Masks, is_maskable, is_masked

__all__ = [
    'TORCHVISION', 'DeferredInit', 'Masks', 'apply_plan', 'build_base', 'cut_copy', 'inflate_checkpoint', 'is_maskable',
    'is_masked', 'rebuild', 'slice_checkpoint',
]
