"""Learning on models that are no classifiers: whatever they return and whatever their loss is, the cut is exact."""
import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import distance, flat, randomise
from torch import nn

import timm_epfs
from timm_epfs.core import Member, PruningError, Structure
from timm_epfs.learn import METHODS
from timm_epfs.report import top1

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


def test_center_loss_is_off_with_a_word_where_there_are_no_classes():
    for net in (Segmenter, Detector):
        with pytest.warns(UserWarning, match=f'no linear layer of this {net.__name__} .*; center=0') as caught:
            learner = timm_epfs.EPFS(net(), macs=0.5, steps=5, example_input=IMAGE)
        assert len(caught) == 1 and '\n' not in str(caught[0].message) and caught[0].filename == __file__
        assert learner.plan().recipe['center'] == learner.center == 0
        with pytest.raises(PruningError, match='center=0'):
            timm_epfs.EPFS(net(), macs=0.5, steps=5, example_input=IMAGE, center=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm_epfs.EPFS(Segmenter(), macs=0.5, steps=5, example_input=IMAGE, center=0)


class Head(nn.Module):
    """Convolutions, pooling and a linear layer: for classes or for anything else."""

    def __init__(self, outputs=5):
        super().__init__()
        self.body = nn.Sequential(conv(3, 16, 2), conv(16, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(16, outputs)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.mark.parametrize('target, found', [
    (torch.full((4, 5), 3.5), r'a float32 tensor of shape \(4, 5\)'), (None, 'None'),
])
def test_center_loss_goes_off_with_a_word_where_the_targets_are_no_classes(target, found):
    images = torch.randn(4, 3, 16, 16)
    model = Head()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5, example_input=IMAGE)
    assert learner.center == 0.003
    with pytest.warns(UserWarning, match=f'goes on without Center Loss: .* got {found}; center=0') as caught:
        for _ in range(3):
            (model(images).square().mean() + learner.penalty(target)).backward()
            learner.step()
    assert len(caught) == 1 and learner.center == 0 and not model.fc._forward_pre_hooks
    resumed = timm_epfs.EPFS(Head(), macs=0.5, steps=5, example_input=IMAGE)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.center == 0 and resumed.state_dict().keys() == learner.state_dict().keys()
    given = timm_epfs.EPFS(Head(), macs=0.5, steps=5, example_input=IMAGE, center=0.003)
    given.model(images)
    with pytest.raises(PruningError, match='needs class indices, found'):
        given.penalty(target)


def test_classes_in_a_dict_have_center_loss():
    class Multitask(Head):
        def forward(self, x):
            features = self.body(x)
            return {'class': self.fc(features), 'features': features, 'note': 'text'}

    model = Multitask()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5, example_input=IMAGE)
    images, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    output = model(images)
    value = learner.penalty(target)
    assert value.item() == pytest.approx(0.003 * 0.5 * output['features'].square().sum().item() / 4, rel=1e-4)


def test_filters_of_parametrized_weights_are_set_to_zero():
    class Squashed(nn.Module):
        def forward(self, weight):
            return weight.tanh()

    model = Segmenter()
    plain = copy.deepcopy(model)
    for layer in (model.stem[0], model.down[0]):
        nn.utils.parametrize.register_parametrization(layer, 'weight', Squashed())
    scores = []
    for each in (plain, model):
        learner = timm_epfs.SFP(each, ratio=0.5, steps=4, steps_per_epoch=1, example_input=IMAGE)
        scores.append([np.sort(values) for values in learner._scores().values()])
    assert all(np.allclose(*pair) for pair in zip(*scores))


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('norm, names', [
    (nn.utils.parametrizations.weight_norm, ('parametrizations.weight.original0', 'parametrizations.weight.original1')),
    (nn.utils.weight_norm, ('weight_g', 'weight_v')),
])
def test_filters_of_normalised_weights_are_set_to_zero_by_their_length(norm, names):
    """A direction of zero has no norm to divide by."""
    model = Segmenter()
    model.extra = norm(nn.Conv2d(3, 4, 1, bias=False))
    learner = timm_epfs.SFP(model, ratio=0.5, steps=4, example_input=IMAGE)
    index = np.arange(4)[:, None]
    learner._set_to_zero(
        Structure('extra', 'channels', 4, tuple(Member(f'extra.{name}', 0, 'out', index) for name in names)),
        np.array([1, 3]))
    assert (model.extra(torch.ones(1, 3, 1, 1)).flatten() == 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize('criterion', ['taylor', 'obdc'])
@pytest.mark.parametrize('collate', [torch.stack, list])
def test_gradients_of_a_loss_of_ones_own(criterion, collate):
    """Against scores by the same loss of a model that returns it."""
    class Loss(Segmenter):
        def forward(self, x):
            return self.loss(super().forward(x), x)

    model, images = randomise(Segmenter()), [*torch.randn(3, 3, 16, 16)]
    returned = Loss()
    returned.load_state_dict(model.state_dict())
    batches = [(torch.stack(images), {'image': collate(images)})]

    def loss(output, target):
        return model.loss(output, torch.stack([*target['image']]))

    pruner = timm_epfs.Pruner(model, data=batches, loss_fn=loss, example_input=IMAGE)
    scores = pruner.scores(criterion)
    expected = timm_epfs.importance.score(
        returned, pruner.structures, criterion, batches, loss_fn=lambda output, _: output)
    assert all(np.allclose(values, expected[name], rtol=1e-4) for name, values in scores.items())
    assert pruner(macs=0.5, criterion=criterion, compensate=False).pruning_plan.recipe['criterion'] == criterion


@pytest.mark.parametrize('call, message', [
    (lambda model, data: timm_epfs.prune(model, macs=0.5, data=data, criterion='taylor', example_input=IMAGE),
     "'taylor' takes the cross-entropy .* this Segmenter returns a dict; give loss_fn="),
    (lambda model, data: timm_epfs.prune(model, macs=0.5, data=data, criterion='obdc', example_input=IMAGE),
     "'obdc' takes the cross-entropy .* this Segmenter returns a dict; give loss_fn="),
    (lambda model, data: timm_epfs.prune(
        model, macs=0.5, data=data, criterion='taylor', example_input=IMAGE, loss_fn=lambda output, _: output),
     'loss_fn= returned a dict; return the whole loss'),
    (lambda model, data: top1([model], data), 'top-1 needs a classifier, and this Segmenter returns a dict'),
    (lambda model, data: top1([model.stem], data), r'returns a float32 tensor of shape \(4, 16, 16, 16\)'),
])
def test_what_needs_classes_says_so_in_one_line(call, message):
    with pytest.raises(PruningError, match=message) as e:
        call(Segmenter(), [(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))])
    assert '\n' not in str(e.value)


def test_images_choose_and_compensate_whatever_is_returned():
    model, images = randomise(Detector()), torch.randn(12, 3, 16, 16)
    slim = timm_epfs.prune(model, macs=0.7, data=images, example_input=IMAGE)
    assert slim.pruning_plan.recipe['widths'] == 'sensitivity' and slim(images)['boxes'][2].shape == (12, 4, 16, 16)
