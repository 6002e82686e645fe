"""Models from outside the classification zoo, as their libraries build them, with random weights and a small input.

Those whose library isn't installed are left out: ``pip install segmentation-models-pytorch transformers open_clip_torch
ultralytics``.
"""
import importlib
from functools import partial
from typing import Any, Callable, Dict, Tuple

import torch
import torchvision.models as tv
from torch import Tensor, nn

__all__ = ['LIBRARIES', 'MODELS']

Example = Tuple[Tuple, Dict[str, Any]]  # positional and keyword arguments of a forward
Build = Callable[[], Tuple[nn.Module, Example]]
MODELS: Dict[str, Build] = {}
LIBRARIES: Dict[str, str] = {}  # by name of the model


def image(size: int = 128, *more: int) -> Tensor:
    return torch.rand(1, 3, *more, size, size)


def add(library: str, names: str, build: Callable[[str], Tuple[nn.Module, Example]]) -> None:
    for name in names.split():
        key = f'{library}/{name}'
        MODELS[key], LIBRARIES[key] = partial(build, name), library


# -- torchvision ----------------------------------------------------------------------------------------------------

def segmentation(name: str) -> Tuple[nn.Module, Example]:
    return getattr(tv.segmentation, name)(weights=None, weights_backbone=None), ((image(),), {})


def detection(name: str, **options: Any) -> Tuple[nn.Module, Example]:
    model = getattr(tv.detection, name)(weights=None, weights_backbone=None, **options)
    return model, (([image(300 if 'ssd300' in name else 128)[0]],), {})


def video(name: str) -> Tuple[nn.Module, Example]:
    clip = (16, 224) if 'mvit' in name else (8, 112)
    return getattr(tv.video, name)(weights=None), ((torch.rand(1, 3, clip[0], clip[1], clip[1]),), {})


def flow(name: str) -> Tuple[nn.Module, Example]:
    inputs = {'image1': image(), 'image2': image(), 'num_flow_updates': 2}
    return getattr(tv.optical_flow, name)(weights=None), ((), inputs)


add('torchvision', '''fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large
    lraspp_mobilenet_v3_large''', segmentation)
add('torchvision', '''fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fasterrcnn_mobilenet_v3_large_fpn
    fasterrcnn_mobilenet_v3_large_320_fpn maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn
    retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 fcos_resnet50_fpn''',
    partial(detection, min_size=128, max_size=128))
add('torchvision', 'ssd300_vgg16 ssdlite320_mobilenet_v3_large', detection)
add('torchvision', 'r3d_18 mc3_18 r2plus1d_18 mvit_v1_b mvit_v2_s swin3d_t', video)
add('torchvision', 'raft_small raft_large', flow)


# -- segmentation_models_pytorch ------------------------------------------------------------------------------------

def smp(name: str) -> Tuple[nn.Module, Example]:
    architecture, _, encoder = name.partition('-')
    library = importlib.import_module('segmentation_models_pytorch')
    return getattr(library, architecture)(encoder or 'resnet34', encoder_weights=None), ((image(),), {})


add('segmentation_models_pytorch', '''Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet
    Segformer Unet-vgg16_bn Unet-densenet121 Unet-efficientnet-b0 Unet-timm-efficientnet-b0 Unet-mobilenet_v2
    Unet-se_resnet50 Unet-resnext50_32x4d Unet-mit_b0 Unet-dpn68 Unet-xception Unet-inceptionv4 Unet-tu-convnext_atto
    FPN-timm-res2net50_26w_4s Linknet-tu-regnety_002 DeepLabV3Plus-mobileone_s0''', smp)


# -- transformers ---------------------------------------------------------------------------------------------------

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
VISION = dict(SMALL, image_size=64, patch_size=16)
TEXT = dict(SMALL, vocab_size=100)
TOKENS = dict(input_ids=torch.arange(1, 9)[None])
NO_BACKBONE = dict(use_timm_backbone=False, use_pretrained_backbone=False)


def transformers(name: str, config: str, inputs: Dict[str, Tensor], **options: Any) -> Tuple[nn.Module, Example]:
    library = importlib.import_module('transformers')
    return getattr(library, name)(getattr(library, f'{config}Config')(**options)), ((), inputs)


def add_transformers(name: str, config: str, inputs: Dict[str, Tensor], **options: Any) -> None:
    add('transformers', name, lambda name: transformers(name, config, inputs, **options))


def pixels(size: int = 64) -> Dict[str, Tensor]:
    return {'pixel_values': image(size)}


for _config in ('ViT', 'DeiT', 'Beit', 'Dinov2', 'Dinov2WithRegisters', 'ViTMSN', 'Data2VecVision', 'IJepa'):
    add_transformers(f'{_config}ForImageClassification', _config, pixels(), **VISION)
for _config in ('ResNet', 'RegNet', 'ConvNext', 'ConvNextV2', 'MobileNetV1', 'MobileNetV2', 'EfficientNet', 'MobileViT',
                'MobileViTV2', 'LevitNet', 'PoolFormer', 'SwiftFormer', 'FocalNet', 'Cvt', 'Bit'):
    _name = {'LevitNet': 'Levit'}.get(_config, _config)
    add_transformers(f'{_name}ForImageClassification', _name, pixels(224 if _name == 'Levit' else 128))
for _config in ('Swin', 'Swinv2', 'Pvt', 'PvtV2', 'Hiera'):
    add_transformers(f'{_config}ForImageClassification', _config, pixels(224))
for _config in ('Bert', 'Roberta', 'Electra', 'Albert', 'DebertaV2', 'MPNet', 'ConvBert', 'Ernie'):
    add_transformers(f'{_config}ForSequenceClassification', _config, TOKENS, **TEXT)
add_transformers('DistilBertForSequenceClassification', 'DistilBert', TOKENS, dim=64, n_layers=2, n_heads=4,
                 hidden_dim=128, vocab_size=100)
for _config in ('Llama', 'Phi', 'GPTNeoX'):
    add_transformers(f'{_config}ForCausalLM', _config, TOKENS, **TEXT)
for _config in ('Mistral', 'Qwen2', 'Gemma'):
    add_transformers(f'{_config}ForCausalLM', _config, TOKENS, **TEXT, num_key_value_heads=2, head_dim=16)
add_transformers('GPT2LMHeadModel', 'GPT2', TOKENS, n_embd=64, n_layer=2, n_head=4, vocab_size=100)
add_transformers('OPTForCausalLM', 'OPT', TOKENS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 ffn_dim=128, vocab_size=100, word_embed_proj_dim=64)
add_transformers('T5EncoderModel', 'T5', TOKENS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                 vocab_size=100)
add_transformers('BartForSequenceClassification', 'Bart', {'input_ids': torch.tensor([[3, 4, 5, 2]])}, d_model=64,
                 encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                 encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=100)
for _config in ('Segformer', 'UperNet', 'DPT'):
    add_transformers(f'{_config}ForSemanticSegmentation', _config, pixels(384 if _config == 'DPT' else 128))
add_transformers('SegformerForImageClassification', 'Segformer', pixels(128))
add_transformers('GLPNForDepthEstimation', 'GLPN', pixels(128))
add_transformers('DetrForObjectDetection', 'Detr', pixels(128), **NO_BACKBONE)
add_transformers('ConditionalDetrForObjectDetection', 'ConditionalDetr', pixels(128), **NO_BACKBONE)
add_transformers('YolosForObjectDetection', 'Yolos', pixels(), **SMALL, image_size=[64, 64], patch_size=16)
add_transformers('RTDetrForObjectDetection', 'RTDetr', pixels(160))
add_transformers('CLIPModel', 'CLIP', {
    **pixels(224), 'input_ids': torch.tensor([[1, 2, 3, 49407]]), 'attention_mask': torch.ones(1, 4, dtype=torch.long)})
add_transformers('CLIPVisionModel', 'CLIPVision', pixels(224))
add_transformers('SiglipVisionModel', 'SiglipVision', pixels(224))
add_transformers('Wav2Vec2ForSequenceClassification', 'Wav2Vec2', {'input_values': torch.rand(1, 4000)}, **SMALL)
add_transformers('HubertForSequenceClassification', 'Hubert', {'input_values': torch.rand(1, 4000)}, **SMALL)
add_transformers('ASTForAudioClassification', 'AST', {'input_values': torch.rand(1, 128, 128)}, **SMALL, max_length=128)
add_transformers('WhisperForAudioClassification', 'Whisper', {'input_features': torch.rand(1, 80, 3000)}, d_model=64,
                 encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128)


# -- open_clip, ultralytics -----------------------------------------------------------------------------------------

def open_clip(name: str) -> Tuple[nn.Module, Example]:
    model = importlib.import_module('open_clip').create_model(name, pretrained=None)
    size = model.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size
    return model, ((image(size), torch.ones(1, model.context_length, dtype=torch.long)), {})


def ultralytics(name: str) -> Tuple[nn.Module, Example]:
    tasks = importlib.import_module('ultralytics.nn.tasks')
    kinds = {'seg': 'Segmentation', 'pose': 'Pose', 'cls': 'Classification', 'obb': 'OBB'}
    kind = 'RTDETRDetection' if name.startswith('rtdetr') else kinds.get(name.rpartition('-')[2], 'Detection')
    return getattr(tasks, f'{kind}Model')(f'{name}.yaml', verbose=False), ((image(160),), {})


add('open_clip', 'RN50 ViT-B-32 ViT-B-32-quickgelu convnext_base ViT-B-16-SigLIP', open_clip)
add('ultralytics', '''yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolov8n-seg yolov8n-pose
    yolov8n-cls yolov8n-obb yolo11n-seg rtdetr-l''', ultralytics)


# -- what people write themselves -----------------------------------------------------------------------------------

def conv(n: int, m: int, stride: int = 1, norm: Callable = nn.BatchNorm2d, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n, m, kernel, stride, kernel // 2), norm(m), nn.ReLU())


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., 2015) with transposed convolutions or bilinear upsampling."""

    def __init__(self, bilinear: bool = False, norm: Callable = nn.BatchNorm2d):
        super().__init__()
        widths = (32, 64, 128)
        self.down = nn.ModuleList(conv(n, m, norm=norm) for n, m in zip((3, *widths), widths))
        self.bottom = conv(128, 256, norm=norm)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2, mode='bilinear'), nn.Conv2d(2 * m, m, 1)) if bilinear
            else nn.ConvTranspose2d(2 * m, m, 2, 2) for m in reversed(widths))
        self.merge = nn.ModuleList(conv(2 * m, m, norm=norm) for m in reversed(widths))
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        skips = []
        for layer in self.down:
            skips.append(layer(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def generator() -> nn.Module:
    """DCGAN's generator (Radford et al., 2016)."""
    ups = [nn.Sequential(nn.ConvTranspose2d(n, m, 4, 2, 1), nn.BatchNorm2d(m), nn.ReLU())
           for n, m in ((256, 128), (128, 64), (64, 32))]
    return nn.Sequential(nn.ConvTranspose2d(64, 256, 4), nn.ReLU(), *ups, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())


def discriminator(norm: Callable) -> nn.Module:
    widths = (3, 64, 128, 256)
    layers = [nn.Sequential(norm(nn.Conv2d(n, m, 4, 2, 1)), nn.LeakyReLU(0.2)) for n, m in zip(widths, widths[1:])]
    return nn.Sequential(*layers, norm(nn.Conv2d(256, 1, 4)))


def translator() -> nn.Module:
    """CycleGAN's generator (Zhu et al., 2017)."""
    blocks = [Residual(nn.Sequential(conv(128, 128, norm=nn.InstanceNorm2d), nn.Conv2d(128, 128, 3, padding=1)))
              for _ in range(3)]
    return nn.Sequential(
        conv(3, 32, kernel=7, norm=nn.InstanceNorm2d), conv(32, 64, 2, norm=nn.InstanceNorm2d),
        conv(64, 128, 2, norm=nn.InstanceNorm2d), *blocks,
        nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(64, 3, 3, 2, 1, 1))


def super_resolution() -> nn.Module:
    """EDSR (Lim et al., 2017)."""
    blocks = [Residual(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)))
              for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), *blocks, nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2),
        nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(64, 3, 3, padding=1))


class PointNet(nn.Module):
    """PointNet (Qi et al., 2017), without the transforms."""

    def __init__(self):
        super().__init__()
        self.points = nn.Sequential(*(
            nn.Sequential(nn.Conv1d(n, m, 1), nn.BatchNorm1d(m), nn.ReLU())
            for n, m in ((3, 64), (64, 128), (128, 512))))
        self.head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.head(self.points(x).amax(2))


def volumes() -> nn.Module:
    layers = [nn.Sequential(nn.Conv3d(n, m, 3, padding=1), nn.BatchNorm3d(m), nn.ReLU(), nn.MaxPool3d(2))
              for n, m in ((1, 32), (32, 64), (64, 128))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(128, 10))


class Tagger(nn.Module):
    """A recurrent tagger of sequences."""

    def __init__(self, kind: str):
        super().__init__()
        self.embed = nn.Linear(40, 64)
        self.rnn = getattr(nn, kind)(64, 128, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x).relu())[0])


IMAGE = (1, 3, 64, 64)
OWN: Dict[str, Tuple[Callable[[], nn.Module], Tuple[int, ...]]] = {
    'unet': (UNet, IMAGE),
    'unet_bilinear': (partial(UNet, bilinear=True), IMAGE),
    'unet_group_norm': (partial(UNet, norm=lambda n: nn.GroupNorm(8, n)), IMAGE),
    'dcgan_generator': (generator, (1, 64, 1, 1)),
    'discriminator': (partial(discriminator, norm=lambda layer: layer), IMAGE),
    'discriminator_spectral_norm': (partial(discriminator, norm=nn.utils.parametrizations.spectral_norm), IMAGE),
    'discriminator_weight_norm': (partial(discriminator, norm=nn.utils.parametrizations.weight_norm), IMAGE),
    'cyclegan_generator': (translator, IMAGE),
    'edsr': (super_resolution, (1, 3, 32, 32)),
    'pointnet': (PointNet, (1, 3, 256)),
    'conv3d': (volumes, (1, 1, 32, 32, 32)),
    'lstm_tagger': (partial(Tagger, 'LSTM'), (1, 20, 40)),
    'gru_tagger': (partial(Tagger, 'GRU'), (1, 20, 40)),
    'transformer_encoder': (lambda: nn.Sequential(nn.Linear(40, 64), nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 2), nn.Linear(64, 10)), (1, 20, 40)),
}


def own(name: str) -> Tuple[nn.Module, Example]:
    build, shape = OWN[name]
    return build(), ((torch.rand(shape),), {})


add('own', ' '.join(OWN), own)
