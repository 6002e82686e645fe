"""Center Loss and its update against a plain loop."""
import numpy as np
import pytest
import timm
import torch
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
    (None, 'NoneType'),
])
def test_targets_that_are_no_class_indices(target, word):
    with pytest.raises(PruningError, match=word) as e:
        CenterLoss(CLASSES, FEATURES)(torch.zeros(7, FEATURES), target)
    assert '\n' not in str(e.value)


def example(size=64):
    return (torch.empty(1, 3, size, size, device='meta'),), {}


def test_the_classifier_is_found():
    assert find_classifier(timm.create_model('resnet18', num_classes=7), *example()) == ('fc', 512, 7)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 3))
    assert find_classifier(net, *example()) == ('4', 5, 3)
    vit = timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, depth=1, num_classes=3)
    assert find_classifier(vit, *example()) == ('head', 192, 3)


def test_a_model_without_a_classifier():
    model = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(PruningError, match='center=0'):
        timm_epfs.EPFS(model, macs=0.5, steps=5)
    timm_epfs.EPFS(model, macs=0.5, steps=5, center=0)  # the failed one has left no masks behind


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
