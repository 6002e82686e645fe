"""The integers by which modules describe themselves: read and set by path, and brought in line with cut tensors."""
import inspect
from functools import reduce
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

from timm.models import FeatureInfo
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..core import PrunedMultiheadAttention, changed_settings, refresh_attention, settings_of

__all__ = ['attribute_misfits', 'refresh_encoders', 'refresh_shapes', 'repeated_sizes', 'set_attribute']

# What a layer says about its own shape, read off its tensors after a cut. What can't be read off a shape (groups,
# num_heads, splits, …) is listed in the plan.
_SHAPES: Tuple[Tuple[type, Callable[[nn.Module], Dict[str, Any]]], ...] = (
    (nn.Linear, lambda m: dict(out_features=m.weight.shape[0], in_features=m.weight.shape[1])),
    (_ConvTransposeNd, lambda m: dict(in_channels=m.weight.shape[0], out_channels=m.weight.shape[1] * m.groups)),
    (_ConvNd, lambda m: dict(out_channels=m.weight.shape[0], in_channels=m.weight.shape[1] * m.groups)),
    (_NormBase, lambda m: dict(num_features=len(m.weight if m.running_mean is None else m.running_mean))),
    (nn.GroupNorm, lambda m: dict(num_channels=len(m.weight))),
    (nn.Embedding, lambda m: dict(num_embeddings=m.weight.shape[0], embedding_dim=m.weight.shape[1])),
    (nn.PReLU, lambda m: dict(num_parameters=len(m.weight))),
)

# Hooks that set an attribute, the weight, before each forward.
_COMPUTES_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)

# What timm's modules that can be reparameterised call the sizes of their convolutions.
_REPEATED = {
    'dim': 'in_channels', 'in_channels': 'in_channels', 'in_chs': 'in_channels', 'dim_out': 'out_channels',
    'out_channels': 'out_channels', 'out_chs': 'out_channels', 'groups': 'groups',
}


def attribute_misfits(model: nn.Module, attributes: Mapping[str, int]) -> List[str]:
    """What stands in the way of setting these attributes, one line each. A plan may only make them smaller."""
    problems = []
    for path, value in attributes.items():
        try:
            present = reduce(_entry, path.split('.'), model)
        except (AttributeError, IndexError, KeyError, ValueError):
            problems.append(f'attribute {path} is missing')
            continue
        if type(present) is not int:
            problems.append(f'attribute {path} is not an integer that can be set')
        elif not 0 <= value <= present:
            problems.append(f'attribute {path} is {present} and the plan says {value}')
    return problems


def set_attribute(model: nn.Module, path: str, value: int) -> None:
    """Set the integer at a path: ``'blocks.0.attn.num_heads'``, ``'feature_info.2.num_chs'``.

    Lists, tuples, dicts and configs on the way are replaced, because a model may share them with its copies or its
    class, and its modules with each other:

    >>> class Net(nn.Module):
    ...     widths = (4, 8)
    >>> net = Net()
    >>> set_attribute(net, 'widths.1', 6)
    >>> net.widths, Net.widths
    ((4, 6), (4, 8))
    """
    _with_entry(model, path.split('.'), value)


def _entry(owner: Any, part: str) -> Any:
    """One step of a path: to a submodule, to what a module holds itself, or to an entry of that.

    A plan goes no other way: not to methods, classes or tensors, nor to anything that modules keep for torch.
    """
    if isinstance(owner, FeatureInfo):
        owner = owner.info
    if isinstance(owner, (list, tuple)) and part.isdecimal():
        return owner[int(part)]
    if isinstance(owner, dict):
        return owner[part]
    if not isinstance(owner, nn.Module):
        return settings_of(owner)[part]
    if part in owner._modules:
        return owner._modules[part]
    if part.startswith('_'):
        raise KeyError(part)
    return inspect.getattr_static(owner, part)


def _with_entry(owner: Any, path: Sequence[str], value: int) -> Any:
    """The owner with this entry: itself where it is a module, a new one where it is a list, tuple, dict or config."""
    part, rest = path[0], path[1:]
    present = _entry(owner, part)
    entry = _with_entry(present, rest, value) if rest else value
    if entry is present:
        return owner
    if isinstance(owner, FeatureInfo):
        owner.info = _with_entry(owner.info, path, value)
        return owner
    if isinstance(owner, (list, tuple)):
        return type(owner)(entry if i == int(part) else item for i, item in enumerate(owner))
    if isinstance(owner, dict):
        return {**owner, part: entry}
    if not isinstance(owner, nn.Module):
        return changed_settings(owner, {part: entry})
    setattr(owner, part, entry)
    return owner


def refresh_shapes(module: nn.Module) -> None:
    """Set a layer's size attributes from the shapes of its tensors."""
    _compute_weights(module)
    if isinstance(module, nn.MultiheadAttention):
        refresh_attention(module)
        return
    for kind, read in _SHAPES:
        if isinstance(module, kind):
            for name, value in read(module).items():
                setattr(module, name, value)
            return
    if hasattr(module, 'normalized_shape') and getattr(module, 'weight', None) is not None:
        module.normalized_shape = tuple(module.weight.shape)


def refresh_encoders(model: nn.Module) -> None:
    """Keep torch's encoders from packing padded sequences for a kernel that doesn't run with heads cut."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            if any(isinstance(layer, PrunedMultiheadAttention) for layer in module.modules()):
                module.use_nested_tensor = False


def _compute_weights(module: nn.Module) -> None:
    """Compute the weights again that hooks compute before each forward (weight norm, spectral norm, pruning masks)."""
    training = module.training
    module.training = False  # spectral norm then leaves its estimate alone
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _COMPUTES_WEIGHTS):
            hook(module, ())
    module.training = training


def repeated_sizes(model: nn.Module) -> List[Tuple[nn.Module, str, nn.Module, str]]:
    """Attributes of modules that repeat a size of a layer inside, for ``reparameterize()``; no forward reads them.

    Several layers of a module may have that size before a cut and differ after it. The module's sizes are taken to be
    those of the one layer that agrees with most of them.

    Returns:
        Module, name of its attribute, layer, name of the layer's attribute.
    """
    found = []
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name in _REPEATED and type(value) is int}
        if not own or not hasattr(module, 'reparameterize'):
            continue
        agreeing = []
        for layer in module.modules():
            if isinstance(layer, (_ConvNd, _NormBase)):
                theirs = {name: _REPEATED[name] if isinstance(layer, _ConvNd) else 'num_features' for name in own}
                agreeing.append([(module, n, layer, a) for n, a in theirs.items() if getattr(layer, a) == own[n]])
        found += max(agreeing, key=len, default=[])
    return found
