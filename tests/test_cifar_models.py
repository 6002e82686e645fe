"""The CIFAR models: sizes as published, timm's model interface, and a width that can be cut."""
import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.models._features_fx import FeatureGraphNet

import timm_epfs  # noqa: F401 (registers the models)
from timm_epfs.report import count_macs
from timm_epfs.zoo.cifar import PadShortcut, checkpoint_filter_fn

SHARED = Path(__file__).parents[2] / 'shared'
TEST_TAR = SHARED / 'data/cifar10-jpeg/test.tar'

# name: parameters and MACs (millions). Published, rounded: He et al. 2016, table 6 (parameters: 0.27, 0.46, 0.66, 0.85,
# 1.7); Li et al. 2017, table 1 (MACs: 125 resnet56, 253 resnet110, 313 vgg16). The other digits are the closed forms:
# parameters sum(9 * c_in * c_out + 2 * c_out) + fc, MACs sum(9 * c_in * c_out * h * w) + fc.
SIZES = {
    'resnet20_cifar': (0.269722, 40.551040),
    'resnet32_cifar': (0.464154, 68.862592),
    'resnet44_cifar': (0.658586, 97.174144),
    'resnet56_cifar': (0.853018, 125.485696),
    'resnet110_cifar': (1.727962, 252.887680),
    'vgg16_bn_cifar': (14.724042, 313.201664),
}
SMALL = ['resnet20_cifar', 'vgg16_bn_cifar']


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def randomize_norms(model):
    """Norm weights and statistics away from 1 and 0, where mistakes would hide."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
            nn.init.uniform_(m.running_mean, -0.5, 0.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize('name', SIZES)
def test_published_size(name):
    with torch.device('meta'):
        model = create(name)
        x = torch.randn(1, 3, 32, 32)
    assert model(x).shape == (1, 10)
    params, macs = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == round(params * 1e6)
    assert count_macs(model, (x,), {}) == round(macs * 1e6)


@pytest.mark.parametrize('name', SIZES)
def test_default_cfg(name):
    assert timm.is_model(name)
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.num_classes, cfg.input_size, cfg.fixed_input_size) == (10, (3, 32, 32), False)
    with torch.device('meta'):
        model = create(name)
        features = model.forward_features(torch.randn(1, 3, 32, 32))
    assert features.shape == (1, model.num_features, *cfg.pool_size)
    modules = dict(model.named_modules())
    assert modules[cfg.first_conv].in_channels == 3
    assert modules[cfg.classifier] is model.get_classifier()


def test_pad_shortcut():
    x = torch.randn(2, 3, 5, 4)
    y = PadShortcut(stride=2, pad_front=1, pad_back=2)(x)
    expected = torch.zeros(2, 6, 3, 2)
    expected[:, 1:4] = x[:, :, [0, 2, 4]][:, :, :, [0, 2]]
    assert torch.equal(y, expected)


def test_shortcut_options():
    pads = [m for m in create('resnet20_cifar').modules() if isinstance(m, PadShortcut)]
    assert [(m.stride, m.pad_front, m.pad_back) for m in pads] == [(2, 8, 8), (2, 16, 16)]

    model = create('resnet20_cifar', shortcut='B')
    assert not any(isinstance(m, PadShortcut) for m in model.modules())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    # a 1x1 convolution and its norm where the width doubles
    extra = sum(i * o + 2 * o for i, o in ((16, 32), (32, 64)))
    assert sum(p.numel() for p in model.parameters()) == 269722 + extra

    with pytest.raises(ValueError, match="'C'"):
        create('resnet20_cifar', shortcut='C')


def test_masked_is_cut():
    """Cutting channels that the shortcut pads: the forward follows the attributes of the next shortcut."""
    model = randomize_norms(create('resnet20_cifar'))
    cut = copy.deepcopy(model)
    keep = torch.arange(8, 32)  # of the 32 channels of layer2's stream, drop the 8 that are zeros in its shortcut
    with torch.no_grad():
        for i in range(3):
            masked_bn, block = model.layer2[i].bn2, cut.layer2[i]
            masked_bn.weight[:8] = 0
            masked_bn.bias[:8] = 0
            block.conv2.weight = nn.Parameter(block.conv2.weight[keep])
            for n in ('weight', 'bias', 'running_mean', 'running_var'):
                getattr(block.bn2, n).data = getattr(block.bn2, n)[keep]
        for block in (*cut.layer2[1:], cut.layer3[0]):
            block.conv1.weight = nn.Parameter(block.conv1.weight[:, keep])
    cut.layer2[0].downsample.pad_front = 0
    cut.layer3[0].downsample.pad_front = 16 + 8

    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(cut(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(cut)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_features(name):
    x = torch.randn(1, 3, 32, 32)
    model = create(name)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, intermediates[-1])
    for info, feature in zip(model.feature_info, intermediates, strict=True):
        size = 32 // info['reduction']
        assert feature.shape == (1, info['num_chs'], size, size)

    for feature_cls in ('list', 'getter', 'hook'):
        extractor = create(name, features_only=True, feature_cls=feature_cls)
        assert extractor.feature_info.channels() == [info['num_chs'] for info in model.feature_info]
        for got, expected in zip(extractor(x), intermediates, strict=True):
            assert torch.equal(got, expected)

    subset = create(name, features_only=True, out_indices=(1, -1))(x)
    assert torch.equal(subset[0], intermediates[1]) and torch.equal(subset[1], intermediates[-1])


@pytest.mark.parametrize('name', SMALL)
def test_intermediates_of_some(name):
    x = torch.randn(1, 3, 32, 32)
    model = create(name)
    every = model.forward_intermediates(x, intermediates_only=True)
    for index, expected in enumerate(every):
        last, (got,) = model.forward_intermediates(x, [index], stop_early=True)
        assert torch.equal(got, expected) and torch.equal(last, expected)

        pruned = create(name)
        assert pruned.prune_intermediate_layers([index]) == [index]
        assert torch.equal(pruned(x), expected)
        assert pruned.num_features == expected.shape[1]

    with pytest.raises(AssertionError):
        model.forward_intermediates(x, [len(every)])


@pytest.mark.parametrize('name', SMALL)
def test_classifier(name):
    x = torch.randn(2, 3, 32, 32)
    model = create(name)
    pooled = model.forward_features(x).mean((2, 3))
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    assert pooled.shape == (2, model.head_hidden_size)

    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(3, 'catavgmax')
    assert model(x).shape == (2, 3) and model.head_hidden_size == 2 * model.num_features


@pytest.mark.parametrize('name', SMALL)
def test_create_options(name):
    model = create(name, in_chans=1, num_classes=4, drop_rate=0.5)
    x = torch.randn(1, 1, 40, 24)  # any size
    assert model(x).shape == (1, 4)
    model.train()
    features = model.forward_features(torch.randn(4, 1, 32, 32))
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_drop_path():
    model = create('resnet20_cifar', drop_path_rate=0.4)
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for n in (1, 2, 3) for b in getattr(model, f'layer{n}')]
    assert rates == pytest.approx([0.05 * i for i in range(9)])


@pytest.mark.parametrize('name', SMALL)
def test_group_matcher(name):
    model = create(name)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in model.named_parameters())
        assert sorted(groups[max(groups)]) == ['fc.bias', 'fc.weight']
        assert all('1.' in n for n in groups[0])  # the stem: the first convolution and its norm
        # stem and head, with the blocks (resnet20), the 12 other convolutions (vgg16), or the stages between
        num_blocks = {'resnet20_cifar': (9, 3), 'vgg16_bn_cifar': (12, 5)}[name][coarse]
        assert len(groups) == 1 + num_blocks + 1


@pytest.mark.parametrize('name', SMALL)
def test_grad_checkpointing(name):
    x = torch.randn(2, 3, 32, 32)
    grads, recomputed = [], 0

    def count(*_):
        nonlocal recomputed
        recomputed += 1

    for enable in (False, True):
        model = create(name).train()
        model.set_grad_checkpointing(enable)
        conv = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
        conv.register_forward_hook(count)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert recomputed == 1 + 2
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize('name,kwargs', [
    ('resnet20_cifar', dict()),
    ('resnet20_cifar', dict(shortcut='B')),
    ('vgg16_bn_cifar', dict()),
])
def test_script_and_fx(name, kwargs):
    x = torch.randn(1, 3, 32, 32)
    model = randomize_norms(create(name, **kwargs))
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    features = FeatureGraphNet(model, out_indices=(1, 3))(x)
    for got, expected in zip(features, model.forward_intermediates(x, [1, 3], intermediates_only=True), strict=True):
        torch.testing.assert_close(got, expected)


def test_init_keeps_variance():
    """He et al. 2015, eq. 14: fan-out times the variance of a weight is 2."""
    for name in SMALL:
        for m in create(name).modules():
            if isinstance(m, nn.Conv2d):
                assert 9 * m.out_channels * m.weight.var().item() == pytest.approx(2, rel=0.25)


def test_checkpoint_filter():
    ours = create('resnet20_cifar', seed=1, shortcut='B')
    foreign = {
        'module.' + k.replace('fc.', 'linear.').replace('.downsample.', '.shortcut.'): v
        for k, v in ours.state_dict().items()
    }
    model = create('resnet20_cifar', shortcut='B')
    model.load_state_dict(checkpoint_filter_fn({'state_dict': foreign}, model))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), ours(x))
    assert checkpoint_filter_fn(ours.state_dict(), ours).keys() == ours.state_dict().keys()


@pytest.mark.parametrize('depth', [20, 32, 44, 56])
def test_published_weights_load(depth):
    path = SHARED / f'weights/cifar10/resnet{depth}.safetensors'
    if not path.exists():
        pytest.skip(f'no {path}')
    model = create(f'resnet{depth}_cifar')
    timm.models.load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    # the builder knows the filter: timm's own road to local weights
    overlaid = create(f'resnet{depth}_cifar', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    for got, expected in zip(overlaid.parameters(), model.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_published_weights_accuracy():
    """91.8 % on the original images; the JPEG copies cost about ten points (81.0 % on all 10,000)."""
    path = SHARED / 'weights/cifar10/resnet20.safetensors'
    if not (path.exists() and TEST_TAR.exists()):
        pytest.skip(f'no weights or data in {SHARED}')
    model = create('resnet20_cifar')
    timm.models.load_checkpoint(model, str(path), filter_fn=checkpoint_filter_fn)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset('', root=str(TEST_TAR), transform=transform)
    subset = torch.utils.data.Subset(dataset, range(0, len(dataset), 10))
    correct = 0
    with torch.inference_mode():
        for images, targets in torch.utils.data.DataLoader(subset, batch_size=250):
            correct += (model(images).argmax(1) == targets).sum().item()
    assert len(subset) == 1000
    assert 100 * correct / len(subset) == pytest.approx(81.0, abs=2.5)  # two standard errors of 1,000 images
