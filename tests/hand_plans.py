"""Plans written by hand, so that surgery and saving are tested without a tracer."""
from typing import Callable, Sequence

import numpy as np
from torch import nn

from timm_epfs.core import Member, Structure
from timm_epfs.plan import Cut, Plan

NORM_TENSORS = ('weight', 'bias', 'running_mean', 'running_var')

VIT = 'vit_tiny_patch16_224'
VIT_ARGS = {'depth': 2, 'img_size': 32, 'num_classes': 5}


def identity(tensor: str, dim: int, role: str, units: int) -> Member:
    return Member(tensor, dim, role, np.arange(units)[:, None])


def half(units: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(units)[:units // 2])


def channels(conv: str, norm: str, after: str, units: int) -> Structure:
    """The channels between two convolutions."""
    members = [identity(f'{conv}.weight', 0, 'out', units)]
    members += [identity(f'{norm}.{name}', 0, 'per', units) for name in NORM_TENSORS]
    members += [identity(f'{after}.weight', 1, 'in', units)]
    return Structure(conv, 'channels', units, tuple(members))


def resnet_plan(model: nn.Module, base: str, keep: Callable[[int, int], Sequence[int]] = half, **base_args) -> Plan:
    """Half of the channels inside each block of a ResNet."""
    cuts = []
    for name, block in model.named_modules():
        inner = [i for i in (1, 2) if hasattr(block, f'conv{i + 1}') and hasattr(block, 'downsample')]
        for i in inner:
            units = getattr(block, f'conv{i}').out_channels
            structure = channels(f'{name}.conv{i}', f'{name}.bn{i}', f'{name}.conv{i + 1}', units)
            cuts.append(Cut(structure, np.asarray(keep(units, len(cuts)))))
    recipe = {'method': 'by hand', 'target': {'macs': 0.5}}
    return Plan(base, base_args, tuple(cuts), {}, recipe, {'macs': (2e9, 1e9), 'params': (1.5, 0.5)})


def vit_plan(model: nn.Module, keep: Sequence[int] = (0, 2)) -> Plan:
    """Some heads of each attention of a ViT."""
    cuts, attributes = [], {}
    for name, attn in model.named_modules():
        if not hasattr(attn, 'qkv'):
            continue
        heads, width = attn.num_heads, attn.head_dim
        rows = np.arange(3 * heads * width).reshape(3, heads, width).swapaxes(0, 1).reshape(heads, -1)
        columns = np.arange(heads * width).reshape(heads, width)
        members = (
            Member(f'{name}.qkv.weight', 0, 'out', rows),
            Member(f'{name}.qkv.bias', 0, 'per', rows),
            Member(f'{name}.proj.weight', 1, 'in', columns),
        )
        cuts.append(Cut(Structure(f'{name}.qkv', 'heads', heads, members), np.asarray(keep)))
        attributes.update({f'{name}.num_heads': len(keep), f'{name}.attn_dim': len(keep) * width})
    return Plan(VIT, VIT_ARGS, tuple(cuts), attributes)
