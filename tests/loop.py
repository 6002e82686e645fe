"""A user's loop in small: models, batches, and training with a learner."""
import timm
import torch
import torch.nn.functional as F
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from timm.models.vgg import cfgs as vgg_configs
from torch import nn

SIZE, CLASSES = 64, 5
EXAMPLE = torch.empty(1, 3, SIZE, SIZE)


def build(name='test_resnet', **args):
    torch.manual_seed(0)
    make = {'vgg11_bn': small_vgg, 'mixer': small_mixer}.get(name, timm.create_model)
    return make(name, num_classes=CLASSES, **args).train()


def small_vgg(name, num_classes):
    widths = [v if v == 'M' else v // 4 for v in vgg_configs['vgg11']]
    return VGG(widths, num_classes, mlp_ratio=0.03, norm_layer=nn.BatchNorm2d)


def small_mixer(name, num_classes):
    return MlpMixer(num_classes, img_size=SIZE, patch_size=8, num_blocks=3, embed_dim=128)


def batch(seed=0, n=6, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (n,), generator=generator)
    return torch.randn(n, 3, size, size, generator=generator) + target[:, None, None, None] / CLASSES, target


def train(model, learner, optimizer, steps, first=0, parts=1, size=SIZE, runs=None):
    """A user's loop. ``runs`` is what is called where that's not the model itself (a compiled one)."""
    for seed in range(first, first + steps):
        images, target = batch(seed, size=size)
        for x, y in zip(images.chunk(parts), target.chunk(parts)):
            loss = F.cross_entropy((model if runs is None else runs)(x), y) + learner.penalty(y)
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)


@torch.no_grad()
def outputs(model, size=SIZE):
    training, out = model.training, model.eval()(batch(99, size=size)[0])
    model.train(training)
    return out
