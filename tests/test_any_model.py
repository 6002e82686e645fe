"""Learning on models that are no classifiers: whatever they return and whatever their loss is, the cut is exact."""
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from helpers import distance, flat, randomise
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.learn import METHODS
from timm_epfs.learn.center_loss import find_classifier

IMAGE = torch.empty(1, 3, 16, 16)


def conv(before, after, stride=1):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Segmenter(nn.Module):
    """A U-Net of two levels with a gate, whose linear layers are the last ones of the model. It returns a dict."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem, self.down, self.middle = conv(3, 16), conv(16, 24, 2), conv(24, 24)
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.merge = conv(32, 16)
        self.head, self.auxiliary = nn.Conv2d(16, classes, 1), nn.Conv2d(24, classes, 1)
        self.gate = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 24), nn.Sigmoid())

    def forward(self, x):
        stem = self.stem(x)
        low = self.middle(self.down(stem))
        low = low * self.gate(low.mean((2, 3)))[:, :, None, None]
        merged = self.merge(torch.cat([stem, self.up(low)], 1))
        return {'out': self.head(merged), 'aux': self.auxiliary(low)}

    @staticmethod
    def loss(output, target):
        mask = (target.mean(1) > 0).long() + 2 * (target[:, 0] > 0)
        return F.cross_entropy(output['out'], mask) + 0.4 * F.cross_entropy(output['aux'], mask[:, ::2, ::2])


class Detector(nn.Module):
    """A backbone of three levels, a feature pyramid, and heads that all levels share. It returns a dict of lists."""

    def __init__(self, classes=3):
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 16), conv(16, 24, 2), conv(24, 32, 2)])
        self.lateral = nn.ModuleList([nn.Conv2d(width, 16, 1) for width in (16, 24, 32)])
        self.tower = nn.ModuleList([conv(16, 16), conv(16, 16)])
        self.scores, self.boxes = nn.Conv2d(16, classes, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x):
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        above, pyramid = 0, []
        for lateral, level in zip(reversed(self.lateral), reversed(levels)):
            above = lateral(level) + (F.interpolate(above, scale_factor=2) if pyramid else 0)
            pyramid.append(above)
        return {
            'scores': [self.scores(self.tower[0](level)) for level in pyramid],
            'boxes': [self.boxes(self.tower[1](level)).exp() for level in pyramid],
        }

    @staticmethod
    def loss(output, target):
        total = 0
        for scores, boxes in zip(output['scores'], output['boxes']):
            wanted = (F.adaptive_avg_pool2d(target, scores.shape[-1]) > 0).float()
            total = total + F.binary_cross_entropy_with_logits(scores, wanted)
            total = total + F.smooth_l1_loss(boxes, 2 * wanted[:, :1].expand_as(boxes))
        return total


def learn(method, net, steps=6, **options):
    torch.manual_seed(0)
    model = randomise(net()).train()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'EPFS learns without Center Loss')
        learner = method(model, steps=steps, example_input=IMAGE, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(steps + 1):
        images = torch.randn(4, 3, 16, 16)
        (model.loss(model(images), images) + learner.penalty({'images': images})).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
    return model.eval(), learner


@pytest.mark.parametrize('net', [Segmenter, Detector])
@pytest.mark.parametrize('method', [*METHODS.values(), timm_epfs.OneShot])
def test_whatever_is_returned_is_learned_and_cut_exactly(method, net):
    model, learner = learn(method, net, macs=0.5)
    slim = learner.export()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        masked, cut = model(images), slim(images)
    assert type(slim) is net and masked.keys() == cut.keys()
    assert distance(flat(masked), flat(cut)) < 1e-5
    dense, left = slim.pruning_plan.cost['macs']
    assert left / dense == pytest.approx(0.5, abs=0.02) and learner.finished
