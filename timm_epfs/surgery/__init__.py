"""The only package that changes a model.

In: a plan, or masks, and a dense model, checkpoint or optimizer; images. Out: the smaller model or checkpoint, with
weights that make up for the cut; the optimizer of the smaller model; or the masked model.
"""
from .bases import TORCHVISION, build_base
from .batch_norm import recalibrate_bn
from .compensation import compensate
from .copying import cut_copy
from .cutting import apply_plan
from .masks import Masks, is_maskable, is_masked, unmasked_name
from .optimizers import cut_optimizer
from .skeleton import Skeleton, rebuild
from .state_dicts import inflate_checkpoint, slice_checkpoint

__all__ = [
    'TORCHVISION', 'Masks', 'Skeleton', 'apply_plan', 'build_base', 'compensate', 'cut_copy', 'cut_optimizer',
    'inflate_checkpoint', 'is_maskable', 'is_masked', 'rebuild', 'recalibrate_bn', 'slice_checkpoint', 'unmasked_name',
]
