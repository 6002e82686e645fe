"""Center Loss and its update against a plain loop, and the layer whose input is the deep feature."""
import types

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.learn.center_loss import CenterLoss, find_classifier

CLASSES, FEATURES = 4, 6


def loop_loss(centers, features, target):
    return sum(0.5 * ((f - centers[y]) ** 2).sum() for f, y in zip(features, target)) / len(target)


def loop_update(centers, features, target, alpha=0.5):
    new = centers.copy()
    for j in range(len(centers)):
        mine = [f for f, y in zip(features, target) if y == j]
        new[j] = centers[j] - alpha * sum((centers[j] - f for f in mine), np.zeros(FEATURES)) / (1 + len(mine))
    return new


def batches(n=5, batch=7):
    rng = np.random.default_rng(0)
    for _ in range(n):
        target = rng.integers(0, CLASSES - 1, size=batch)  # the last class never comes
        yield rng.normal(size=(batch, FEATURES)).astype(np.float32) + target[:, None], target


def test_loss_and_centres_are_those_of_a_loop():
    loss, centers = CenterLoss(CLASSES, FEATURES), np.zeros((CLASSES, FEATURES))
    for features, target in batches():
        inputs = torch.from_numpy(features).requires_grad_()
        value = loss(inputs, torch.from_numpy(target))
        assert value.item() == pytest.approx(loop_loss(centers, features, target), rel=1e-5)
        value.backward()
        np.testing.assert_allclose(inputs.grad.numpy(), (features - centers[target]) / len(target), atol=1e-6)
        loss.update()
        centers = loop_update(centers, features, target)
        np.testing.assert_allclose(loss.centers.numpy(), centers, atol=1e-5)
    assert (loss.centers[-1] == 0).all()


def test_parts_of_a_batch_count_as_one():
    whole, parts = CenterLoss(CLASSES, FEATURES), CenterLoss(CLASSES, FEATURES)
    for features, target in batches():
        features, target = torch.from_numpy(features), torch.from_numpy(target)
        whole(features, target)
        parts(features[:3], target[:3])
        parts(features[3:], target[3:])
        whole.update()
        parts.update()
    torch.testing.assert_close(whole.centers, parts.centers)


def test_half_precision_features_count_in_full():
    features, target = (torch.from_numpy(part) for part in next(batches()))
    half = CenterLoss(CLASSES, FEATURES)(features.bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, CenterLoss(CLASSES, FEATURES)(features.bfloat16().float(), target))


@pytest.mark.parametrize('target, word', [
    (torch.rand(7, CLASSES), 'center=0'),
    (torch.rand(7), 'hard labels'),
    (torch.zeros(6, dtype=torch.int64), '6 targets'),
    (torch.full((7,), CLASSES), f'num_classes={CLASSES + 1}'),
    (None, 'found None'),
])
def test_targets_that_are_no_class_indices(target, word):
    with pytest.raises(PruningError, match=word) as e:
        CenterLoss(CLASSES, FEATURES)(torch.zeros(7, FEATURES), target)
    assert '\n' not in str(e.value)


def example(size=64):
    return (torch.empty(1, 3, size, size, device='meta'),), {}


class Net(nn.Module):
    """Layers, and a forward that uses them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self._forward(self, *inputs)


def found(net, *shape):
    return find_classifier(net, (torch.empty(shape, device='meta'),), {})


@pytest.mark.parametrize('forward', [
    lambda net, h: net.fc(h),
    lambda net, h: (net.fc(h), h),
    lambda net, h: [{'features': h, 'logits': net.fc(h), 'loss': None}],
    lambda net, h: types.SimpleNamespace(logits=net.fc(h)),
    lambda net, h: F.log_softmax(net.fc(h), dim=1),
    lambda net, h: {'logits': net.fc(h), 'probabilities': net.fc(h).float().softmax(-1)},
    lambda net, h: net.scale * net.fc(h) / 0.07,
    lambda net, h: net.fc(h[:, None]).squeeze(1),
    lambda net, h: net.fc(h) if h.sum().item() else h,
    lambda net, h: (net.fc(h), net.fc(h).argmax(1), net.box(h)[:, :, None]),
])
def test_the_layer_whose_output_is_the_models_is_the_classifier(forward):
    net = Net(
        lambda net, x: forward(net, net.body(x)), body=nn.Linear(9, FEATURES), fc=nn.Linear(FEATURES, CLASSES),
        box=nn.Linear(FEATURES, 4), scale=nn.Parameter(torch.ones(())), time=nn.Linear(9, FEATURES))
    assert found(net, 1, 9) == ('fc', FEATURES, CLASSES)


def test_a_feature_that_is_returned_too_is_no_second_classifier():
    def forward(net, x):
        features = net.body(x)
        return net.fc(features), features

    assert found(Net(forward, body=nn.Linear(9, 6), fc=nn.Linear(6, 4)), 1, 9) == ('fc', 6, 4)


def test_a_convolution_of_what_is_pooled_is_a_classifier():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.Flatten())
    assert found(net, 1, 3, 8, 8) == ('2', 6, 4)


@pytest.mark.parametrize('forward, shape, message', [
    (lambda net, x: net.fc(x), (1, 7, 6), 'no linear layer of this Net'),  # tokens
    (lambda net, x: net.fc(x).flatten(1), (1, 7, 6), 'no linear layer'),
    (lambda net, x: net.fc(x.flatten(0, 1)), (1, 7, 6), 'no linear layer'),  # boxes
    (lambda net, x: net.one(x), (1, 6), 'no linear layer'),
    (lambda net, x: net.one(x)[:, :, 0], (1, 7, 6), 'no linear layer'),
    (lambda net, x: net.conv(x) + net.fc(x.mean((2, 3)))[:, :, None, None], (1, 6, 3, 3), 'no linear layer'),  # time
    (lambda net, x: (net.conv(x) * net.fc(x.mean((2, 3)))[:, :, None, None]).mean((2, 3)), (1, 6, 3, 3), 'no linear'),
    (lambda net, x: net.fc(x).argmax(1), (1, 6), 'no linear layer'),
    (lambda net, x: {'race': net.fc(x), 'age': net.other(x)}, (1, 6), 'fc and other compute'),
    (lambda net, x: net.fc(x[:, :5]), (1, 6), 'the forward fails'),
])
def test_what_is_no_classifier(forward, shape, message):
    net = Net(
        forward, fc=nn.Linear(6, 4), other=nn.Linear(6, 3), one=nn.Linear(6, 1), conv=nn.Conv2d(6, 4, 1),
        last=nn.Linear(4, 4))
    with pytest.raises(PruningError, match=f'{message}.*center=0') as e:
        found(net, *shape)
    assert '\n' not in str(e.value)


def test_the_classifier_is_found():
    assert find_classifier(timm.create_model('resnet18', num_classes=7), *example()) == ('fc', 512, 7)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 3))
    assert find_classifier(net, *example()) == ('4', 5, 3)
    vit = timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, depth=1, num_classes=3)
    assert find_classifier(vit, *example()) == ('head', 192, 3)


def test_timm_says_which_layer_it_is_but_not_where_that_scores_tokens():
    assert find_classifier(timm.create_model('levit_128s', num_classes=3), *example(224)) == ('head', 384, 3)
    with pytest.raises(PruningError, match='no linear layer of this VisionTransformer'):
        find_classifier(timm.create_model('test_vit', global_pool='', num_classes=3), *example(160))


def test_a_model_without_a_classifier():
    model = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(PruningError, match='center=0'):
        timm_epfs.EPFS(model, macs=0.5, steps=5, center=0.003)
    with pytest.warns(UserWarning, match='learns without Center Loss'):  # the failed one has left no masks behind
        assert timm_epfs.EPFS(model, macs=0.5, steps=5).center == 0


def test_the_feature_is_what_enters_the_classifier():
    model = timm.create_model('test_resnet', num_classes=CLASSES).train()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5, center=0.1)
    images, target = torch.randn(4, 3, 64, 64), torch.arange(4)
    model.eval()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(images)
    value = learner.penalty(target)
    assert value.item() == pytest.approx(0.1 * 0.5 * expected.square().sum().item() / 4, rel=1e-4)
    with pytest.raises(PruningError, match='before any forward'):
        learner.penalty(target)
