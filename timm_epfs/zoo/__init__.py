"""Names in timm: the pruned variants, the CIFAR models, and whatever was saved.

In: a name, a folder or a repo. Out: the model, pruned models built from the plan that was saved with them.
"""
from . import cifar, variants  # noqa: F401, registered by their import
from .dense_checkpoint import check_readable, load_weights
from .description import ARCHITECTURE
from .entry_point import as_plan, epfs_pruned
from .loading import base_of, create_model, load_model, model_args, plan_of, present_base_of
from .origin import note_origin, origin_of
from .own_models import load_pretrained
from .saving import check_free, save_pretrained

__all__ = [
    'ARCHITECTURE', 'as_plan', 'base_of', 'check_free', 'check_readable', 'create_model', 'epfs_pruned', 'load_model',
    'load_pretrained', 'load_weights', 'model_args', 'note_origin', 'origin_of', 'plan_of', 'present_base_of',
    'save_pretrained', 'variants',
]
