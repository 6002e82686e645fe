"""torch-pruning's own one-shot, as its examples for timm and torchvision do it: what ours is compared with."""
from typing import Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch_pruning as tp
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ['DrawnMagnitude', 'NoInit', 'nearest', 'one_shot']

T = TypeVar('T')


class DrawnMagnitude(tp.importance.GroupMagnitudeImportance):
    """The importance of the recipe where weights have no values: it is run for its errors, then values are drawn."""

    def __call__(self, group):
        importance = super().__call__(group)
        return None if importance is None else torch.rand(importance.shape)


class NoInit(TorchFunctionMode):
    """Inside, random initialisation costs nothing: weights are what the memory holds, zeros mostly."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, '__name__', '') in ('normal_', 'uniform_', 'erfinv_'):
            return args[0] if args else kwargs['tensor']
        return func(*args, **kwargs)


def one_shot(
        model: nn.Module,
        example: torch.Tensor,
        importance: tp.importance.Importance,
        entered: Callable[[str], None] = lambda stage: None,
        ratio: float = 0.5,
        round_to: Optional[int] = None,
        ignored: Sequence[nn.Module] = (),
) -> nn.Module:
    """Cut ``ratio`` of all channels in place: L2 over groups, classifier left alone, numbers of heads given.

    Args:
        model: The model, in evaluation mode.
        example: One input.
        importance: How channels are ranked.
        entered: Told ``'cut'`` when the tracing is done.
        ratio: Share of channels to remove.
        round_to: Widths are rounded to multiples of this.
        ignored: Layers whose outputs aren't cut, besides the classifier.
    """
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False  # a fused attention hides the graph
    num_heads: Dict[nn.Module, int] = {
        m.qkv: m.num_heads for m in model.modules()
        if isinstance(getattr(m, 'qkv', None), nn.Linear) and isinstance(getattr(m, 'num_heads', None), int)
    }
    # Fresh dicts: the pruner updates its shared default arguments.
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance, pruning_ratio=ratio, ignored_layers=[*_classifier(model), *ignored],
        num_heads=num_heads, in_channel_groups={}, out_channel_groups={}, round_to=round_to,
    )
    entered('cut')
    pruner.step()
    for module in model.modules():
        if getattr(module, 'qkv', None) in num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            if hasattr(module, 'attn_dim'):
                module.attn_dim = module.num_heads * module.head_dim
    if hasattr(model, 'conv_proj') and hasattr(model, 'hidden_dim'):  # torchvision's ViT
        model.hidden_dim = model.conv_proj.out_channels
    return model


def nearest(cut: Callable[[float], Tuple[T, float]], macs: float) -> Tuple[T, float]:
    """The cut whose share of the MACs comes nearest to ``macs``, and that share: a budget can't be asked for.

    Args:
        cut: Takes the share of the channels to remove; returns a cut and the share of the MACs that it leaves.
        macs: The share of the MACs that is wanted.
    """
    low, high = 0.0, 0.9
    for _ in range(12):
        ratio = (low + high) / 2
        low, high = (ratio, high) if cut(ratio)[1] > macs else (low, ratio)
    return min((cut(low), cut(high)), key=lambda found: abs(found[1] - macs))


def _classifier(model: nn.Module) -> List[nn.Module]:
    classes = getattr(model, 'num_classes', 1000)
    return [
        m for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features == classes)
        or (isinstance(m, nn.Conv2d) and m.out_channels == classes)
    ]
