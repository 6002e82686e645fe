"""What several test files share: random weights that hide nothing, masking, and the table of small models."""
import copy
import multiprocessing
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from typing import Any, Dict, Iterable, Mapping, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from timm_epfs.core import Structure
from timm_epfs.zoo import create_model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw norm parameters, statistics, biases, scales and what is nearly constant: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for name, p in model.named_parameters():
        if name.endswith('bias') and p.ndim == 1:
            uniform(p, -0.5, 0.5)
        elif p.ndim <= 1:
            uniform(p, 0.5, 1.0)
        elif p.numel() > 1 and p.std() < 1e-4:
            uniform(p, -0.2, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            uniform(buffer, -0.5, 0.5)
        elif name.endswith('running_var'):
            uniform(buffer, 0.5, 1.0)
    return model


@torch.no_grad()
def masked(model: nn.Module, structures: Iterable[Structure], keep: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy in which consumers read the units that go by zeros, and blocks that go add zero. Nothing is cut."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for s in structures:
        gone = np.setdiff1d(np.arange(s.units), keep[s.name])
        for member in s.members:
            if member.role == 'in' or s.kind == 'blocks':
                tensors[member.tensor].index_fill_(member.dim, torch.from_numpy(member.index[gone].ravel()), 0)
    return model


def drop(structures: Iterable[Structure], share: float = 0.3, exact: bool = True) -> Dict[str, np.ndarray]:
    """Units that stay when a random share of every structure goes, of the exact ones or of the others. Blocks stay."""
    rng = np.random.default_rng(0)
    keep = {}
    for s in structures:
        gone = max(1, round(share * s.units)) if s.exact == exact and s.kind != 'blocks' else 0
        keep[s.name] = np.sort(rng.permutation(s.units)[gone:])
    return keep


def flat(out: Any) -> torch.Tensor:
    """Every tensor of an output, as one vector."""
    return torch.cat([x.flatten() for x in tree_leaves(out) if isinstance(x, torch.Tensor)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of ``a``."""
    return ((a - b).abs().max() / a.abs().max()).item()


def forkserver(*modules: str) -> BaseContext:
    """Starts processes that share one import of all that they need, further modules included."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_epfs.cli', 'timm_epfs.training.run', 'sklearn.model_selection', *modules])
    return context


@dataclass(frozen=True)
class Row:
    """A small model.

    Attributes:
        coupling: Which way of coupling it is here for.
        name: timm name or ``'torchvision/<name>'``.
        size: Height and width of the input.
        args: Arguments that make it smaller.
        exact: Whether anything in it can be cut exactly.
    """
    coupling: str
    name: str
    size: int
    args: Dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    @property
    def id(self) -> str:
        return self.name.replace('/', '.')

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise(create_model(self.name, **self.args))

    def images(self, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))


_ONE_EACH = (1, 1, 1, 1)
_FEW = {'layers': (1, 2, 1, 1)}
MODELS: Tuple[Row, ...] = (
    # convolutions
    Row('residual add, 1x1 shortcut', 'test_resnet', 64),
    Row('residual add, identity padded with zero channels (option A)', 'resnet20_cifar', 32),
    Row('plain chain into a flattened linear layer', 'vgg16_bn_cifar', 32),
    Row('concatenation of everything before', 'densenet121', 64, {'block_config': (2, 3, 2, 2)}),
    Row('split, concatenation and channel shuffle', 'torchvision/shufflenet_v2_x0_5', 64),
    Row('squeeze-and-excitation gate', 'legacy_seresnet18', 64),
    Row('depthwise convolution in an inverted bottleneck', 'mobilenetv2_035', 64),
    Row('depthwise with a gate', 'mobilenetv3_small_050', 64),
    Row('groups of one width', 'regnetx_002', 64),
    Row('cardinality (ResNeXt)', 'resnext26ts', 64),
    Row('efficient channel attention', 'ecaresnet26t', 64),
    Row('selective kernel: softmax over branches', 'skresnet18', 64, _FEW),
    Row('split attention: radix times groups', 'resnest14d', 64),
    Row('Res2Net: slices that feed each other', 'res2net50_48w_2s', 64, _FEW),
    Row('dual path: a residual and a dense slice', 'dpn48b', 64, {'k_sec': (1, 2, 1, 1)}),
    Row('cross-stage partial: chunk and concatenation', 'cs3darknet_focus_s', 64),
    Row('ghost: half of the channels made from the other', 'ghostnet_050', 64),
    Row('mixed convolution: splits of unequal widths', 'mixnet_s', 64),
    Row('conditional convolution: flat experts', 'efficientnet_cc_b0_4e', 64),
    Row('fixed blur filters', 'resnetblur18', 64),
    Row('residual of part of the channels', 'rexnet_100', 64, {'depth_mult': 0.5}),
    Row('convolution of part of the channels', 'fasternet_t0', 64),
    Row('element-wise product of two branches', 'starnet_s050', 64),
    Row('branches at four resolutions', 'hrnet_w18_small', 64),
    Row('aggregation trees', 'dla46_c', 64),
    Row('parallel convolutions summed', 'repvgg_a0', 64),
    Row('concatenation with gate (one-shot aggregation)', 'ese_vovnet19b_slim_dw', 64),
    Row('standardised weights', 'test_nfnet', 64),
    Row('standardised weights, GroupNorm', 'resnetv2_50x1_bit', 64, exact=False),
    Row('GroupNorm', 'test_efficientnet_gn', 64),
    Row('LayerNorm over channels, layer scale', 'test_convnext', 64),
    Row('global response normalisation', 'convnextv2_atto', 64, {'depths': _ONE_EACH}, exact=False),
    Row('gated convolution (GLU)', 'test_mambaout', 64),
    Row('auxiliary heads', 'torchvision/googlenet', 64, {'aux_logits': True, 'init_weights': False}),
    # attention
    Row('fused qkv', 'test_vit', 64, {'img_size': 64}),
    Row('relative position table', 'test_vit_relpos', 64, {'img_size': 64}),
    Row('RoPE; SwiGLU', 'eva02_tiny_patch14_224', 56, {'img_size': 56, 'depth': 4, 'num_classes': 10}),
    Row('separate q, k, v; SwiGLU with a norm inside', 'eva02_base_patch14_224', 56, {
        'img_size': 56, 'depth': 4, 'embed_dim': 128, 'num_heads': 8, 'num_classes': 10}, exact=False),
    Row('packed kv of reduced tokens', 'pvt_v2_b0', 64),
    Row('windows with a relative position table', 'swin_tiny_patch4_window7_224', 56, {
        'img_size': 56, 'embed_dim': 48, 'depths': (2, 1, 1, 1)}),
    Row('windows (torchvision)', 'torchvision/swin_t', 64),
    Row('grid and block attention between convolutions', 'test_maxvit', 64, {'img_size': 64}),
    Row('talking heads, class attention', 'cait_xxs24_224', 64, {'img_size': 64, 'depth': 4}),
    Row('cross-covariance', 'xcit_nano_12_p16_224', 64, {'img_size': 64, 'depth': 4}),
    Row('unequal widths of key and value', 'levit_128s', 64, {'img_size': 64, 'depth': (1, 2, 1)}),
    Row('linear attention', 'efficientvit_b0', 64),
    Row('bottleneck attention', 'botnet26t_256', 64, {'img_size': 64}),
    Row('halo attention', 'eca_halonext26ts', 256),
    Row('lambda layers', 'lambda_resnet26t', 64),
    Row('outlook attention', 'volo_d1_224', 64, {'img_size': 64}),
    Row('tokens mixed by an MLP', 'mixer_s32_224', 64, {'img_size': 64}),
    Row('tokens mixed by a gate', 'gmlp_ti16_224', 64, {'img_size': 64}, exact=False),
    Row('bidirectional LSTM', 'sequencer2d_s', 64, {'layers': _ONE_EACH, 'img_size': 64}),
)
