"""The CIFAR networks of the pruning literature, as timm models

Papers:
* `Deep Residual Learning for Image Recognition`, section 4.2 - https://arxiv.org/abs/1512.03385
* `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556
* `Pruning Filters for Efficient ConvNets`, section 4.1 (VGG-16 on CIFAR-10) - https://arxiv.org/abs/1608.08710
* `Deep Networks with Stochastic Depth` (drop_path_rate) - https://arxiv.org/abs/1603.09382

No forward holds a channel count of its own: widths live in the weights and in integer attributes of the modules
(`PadShortcut.pad_front`, `PadShortcut.pad_back`), so that surgery changes them in place.
"""
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

__all__ = ['ResNetCifar', 'VggCifar', 'BasicBlock', 'PadShortcut', 'checkpoint_filter_fn']


class PadShortcut(nn.Module):
    """Parameter-free shortcut: subsample in space, zero-pad the channels (option A of He et al., section 3.3)."""

    def __init__(self, stride: int, pad_front: int, pad_back: int) -> None:
        """
        Args:
            stride: Distance between the rows, and columns, that are kept.
            pad_front: Number of zero channels before those of the input.
            pad_back: Number of zero channels after those of the input.
        """
        super().__init__()
        self.stride = stride
        self.pad_front = pad_front
        self.pad_back = pad_back

    def extra_repr(self) -> str:
        return f'stride={self.stride}, pad_front={self.pad_front}, pad_back={self.pad_back}'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, ::self.stride, ::self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad_front, self.pad_back))


def create_shortcut(
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        shortcut: str = 'A',
        norm_layer: LayerType = nn.BatchNorm2d,
        device=None,
        dtype=None,
) -> nn.Module:
    """Create the shortcut of a residual block (He et al., section 3.3).

    Args:
        in_chs: Number of input channels.
        out_chs: Number of output channels.
        stride: Stride of the block.
        shortcut: 'A' for zero padding, 'B' for a projection, wherever the shape changes; the identity elsewhere.
        norm_layer: Normalization layer of the projection.

    Raises:
        ValueError: If the option is unknown, or option A is asked to take channels away.
    """
    if shortcut not in ('A', 'B'):
        raise ValueError(f"Unknown shortcut option {shortcut!r}: use 'A' (zero padding) or 'B' (projection).")
    if stride == 1 and in_chs == out_chs:
        return nn.Identity()
    if shortcut == 'B':
        dd = {'device': device, 'dtype': dtype}
        norm_layer = get_norm_layer(norm_layer)
        return nn.Sequential(
            nn.Conv2d(in_chs, out_chs, kernel_size=1, stride=stride, bias=False, **dd),
            norm_layer(out_chs, **dd),
        )
    extra = out_chs - in_chs
    if extra < 0:
        raise ValueError(f"Shortcut 'A' cannot go from {in_chs} to {out_chs} channels: use shortcut='B'.")
    return PadShortcut(stride, pad_front=extra // 2, pad_back=extra - extra // 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., figure 2)."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            shortcut: str = 'A',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Number of input channels.
            out_chs: Number of output channels.
            stride: Stride of the first convolution and of the shortcut.
            shortcut: Shortcut option where the shape changes, 'A' or 'B'.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_path: Probability that a sample skips the residual branch in training.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        act_layer = get_act_layer(act_layer)
        norm_layer = get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chs, out_chs, kernel_size=3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(out_chs, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, kernel_size=3, padding=1, bias=False, **dd)
        self.bn2 = norm_layer(out_chs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.downsample = create_shortcut(in_chs, out_chs, stride, shortcut, norm_layer=norm_layer, **dd)
        self.act2 = act_layer(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.drop_path(x) + shortcut
        return self.act2(x)


class _CifarNet(nn.Module):
    """The head, and the parts of timm's model interface, that the networks below share."""

    def _init_head(self, num_features: int, global_pool: str, device=None, dtype=None) -> None:
        self.num_features = num_features
        self.global_pool, self.fc = create_classifier(
            num_features,
            self.num_classes,
            pool_type=global_pool,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize the convolutions as in `Delving Deep into Rectifiers` - https://arxiv.org/abs/1502.01852."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing.

        Args:
            enable: Whether to enable gradient checkpointing.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes for new classifier, 0 for none.
            global_pool: Global pooling type, current pooling is kept if None.
        """
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self._init_head(self.num_features, global_pool, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Forward pass through classifier head.

        Args:
            x: Feature tensor.
            pre_logits: Return features before final classifier layer.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


class ResNetCifar(_CifarNet):
    """ResNet for small images, 6n + 2 layers deep (He et al., section 4.2)."""

    def __init__(
            self,
            layers: Tuple[int, ...],
            channels: Tuple[int, ...] = (16, 32, 64),
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            shortcut: str = 'A',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            layers: Number of blocks in each of the three stages.
            channels: Number of channels of each stage.
            num_classes: Number of classification classes.
            in_chans: Number of input (color) channels.
            global_pool: Global pooling type.
            shortcut: Shortcut where the shape changes, 'A' (zero padding, as in the paper) or 'B' (projection).
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout probability before classifier.
            drop_path_rate: Stochastic depth drop-path rate of the last block, rising linearly from 0.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        assert len(layers) == len(channels) == 3
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        prev_chs = channels[0]
        self.conv1 = nn.Conv2d(in_chans, prev_chs, kernel_size=3, padding=1, bias=False, **dd)
        self.bn1 = get_norm_layer(norm_layer)(prev_chs, **dd)
        self.act1 = get_act_layer(act_layer)(inplace=True)
        self.feature_info = [dict(num_chs=prev_chs, reduction=1, module='act1')]

        drop_path_rates = iter(calculate_drop_path_rates(drop_path_rate, sum(layers)))
        for i, (depth, chs) in enumerate(zip(layers, channels)):
            blocks = []
            for j in range(depth):
                blocks.append(BasicBlock(
                    prev_chs,
                    chs,
                    stride=2 if i > 0 and j == 0 else 1,
                    shortcut=shortcut,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    drop_path=next(drop_path_rates),
                    **dd,
                ))
                prev_chs = chs
            self.add_module(f'layer{i + 1}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=2 ** i, module=f'layer{i + 1}'))

        self._init_head(prev_chs, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, str]:
        """Create regex patterns for parameter grouping.

        Args:
            coarse: Use coarse (stage-level) or fine (block-level) grouping.
        """
        return dict(stem=r'^conv1|^bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor.
            indices: Take last n features if int, all if None, select matching indices if sequence.
                Index 0 is the stem, 1 to 3 are the stages.
            norm: Apply norm layer to compatible intermediates (unused, no final norm).
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(4, indices)

        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)

        stages = [self.layer1, self.layer2, self.layer3]
        if stop_early:
            stages = stages[:max_index]
        for i, stage in enumerate(stages, start=1):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate layers to keep.
            prune_norm: Whether to prune normalization layers (unused, no final norm).
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(4, indices)
        for name in ('layer1', 'layer2', 'layer3')[max_index:]:
            setattr(self, name, nn.Sequential())  # empty, not Identity, so that checkpoint_seq can iterate it
        self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < 3:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
        return x


class VggCifar(_CifarNet):
    """VGG with BatchNorm for small images, one linear layer after the pooling (Li et al., section 4.1)."""

    def __init__(
            self,
            channels: Tuple[Tuple[int, ...], ...],
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            channels: Number of channels of each convolution, stage by stage. Max pooling stands between stages.
            num_classes: Number of classification classes.
            in_chans: Number of input (color) channels.
            global_pool: Global pooling type.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            drop_rate: Dropout probability before classifier.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        act_layer = get_act_layer(act_layer)
        norm_layer = get_norm_layer(norm_layer)

        prev_chs = in_chans
        self.feature_info = []
        self.stages = nn.Sequential()
        for i, stage_chs in enumerate(channels):
            stage = nn.Sequential()
            if i > 0:
                stage.add_module('pool', nn.MaxPool2d(kernel_size=2, stride=2))
            for j, chs in enumerate(stage_chs, start=1):
                # no conv bias: BatchNorm takes it away again
                stage.add_module(f'conv{j}', nn.Conv2d(prev_chs, chs, kernel_size=3, padding=1, bias=False, **dd))
                stage.add_module(f'bn{j}', norm_layer(chs, **dd))
                stage.add_module(f'act{j}', act_layer(inplace=True))
                prev_chs = chs
            self.stages.append(stage)
            self.feature_info.append(dict(num_chs=prev_chs, reduction=2 ** i, module=f'stages.{i}'))

        self._init_head(prev_chs, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, str]:
        """Create regex patterns for parameter grouping.

        Args:
            coarse: Use coarse (stage-level) or fine (a convolution with its norm) grouping.
        """
        return dict(
            stem=r'^stages\.0\.(?:conv|bn)1\.',
            blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(?:conv|bn)(\d+)',
        )

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor.
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to compatible intermediates (unused, no final norm).
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        stages = self.stages
        if stop_early and not torch.jit.is_scripting():  # can't slice modules in torchscript
            stages = stages[:max_index + 1]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq([stage], x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate layers to keep.
            prune_norm: Whether to prune normalization layers (unused, no final norm).
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        num_stages = len(self.stages)
        take_indices, max_index = feature_take_indices(num_stages, indices)
        self.stages = self.stages[:max_index + 1]
        self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < num_stages - 1:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: Optional[nn.Module] = None) -> Dict[str, torch.Tensor]:
    """Rename the weights of https://github.com/akamaster/pytorch_resnet_cifar10 to those of `ResNetCifar`.

    `timm.create_model(checkpoint_path=...)` does not call a model's filter, so pass it on:
    `timm.models.load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)`.

    Args:
        state_dict: State dictionary, or a checkpoint that holds one as 'state_dict'.
        model: Model that the weights are for (unused, the signature is timm's).

    Returns:
        State dictionary with our names. Names that are already ours stay.
    """
    out_dict = {}
    for k, v in state_dict.get('state_dict', state_dict).items():
        k = k.removeprefix('module.')  # saved from nn.DataParallel
        if k.startswith('linear.'):
            k = 'fc.' + k.removeprefix('linear.')
        out_dict[k.replace('.shortcut.', '.downsample.')] = v
    return out_dict


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'fixed_input_size': False,
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        # the published weights expect ImageNet's mean and std
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'resnet20_cifar.untrained': _cfg(),
    'resnet32_cifar.untrained': _cfg(),
    'resnet44_cifar.untrained': _cfg(),
    'resnet56_cifar.untrained': _cfg(),
    'resnet110_cifar.untrained': _cfg(),
    'vgg16_bn_cifar.untrained': _cfg(pool_size=(2, 2), first_conv='stages.0.conv1'),
})


def _create_resnet_cifar(variant: str, depth: int, pretrained: bool = False, **kwargs) -> ResNetCifar:
    return build_model_with_cfg(
        ResNetCifar,
        variant,
        pretrained,
        layers=((depth - 2) // 6,) * 3,
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-20 for CIFAR, 41 M MACs at 32x32."""
    return _create_resnet_cifar('resnet20_cifar', 20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-32 for CIFAR, 69 M MACs at 32x32."""
    return _create_resnet_cifar('resnet32_cifar', 32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-44 for CIFAR, 97 M MACs at 32x32."""
    return _create_resnet_cifar('resnet44_cifar', 44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-56 for CIFAR, 125 M MACs at 32x32."""
    return _create_resnet_cifar('resnet56_cifar', 56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-110 for CIFAR, 253 M MACs at 32x32."""
    return _create_resnet_cifar('resnet110_cifar', 110, pretrained, **kwargs)


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs) -> VggCifar:
    """VGG-16 with BatchNorm for CIFAR, 313 M MACs at 32x32."""
    return build_model_with_cfg(
        VggCifar,
        'vgg16_bn_cifar',
        pretrained,
        channels=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )
