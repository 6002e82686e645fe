"""What learners refuse, in one line, and what a loss that is no number leaves alone."""
import pytest
import torch
import torch.nn.functional as F
from loop import CLASSES, EXAMPLE, batch, build, sgd, small_vgg, train

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.learn import METHODS


@pytest.mark.parametrize('make, word', [
    (lambda: timm_epfs.EPFS(build(), macs=0.5, steps=5, center=-1), 'center=-1 was given'),
    (lambda: timm_epfs.EPFS(build(), macs=0.001, steps=5), 'largest possible cut leaves'),
    (lambda: timm_epfs.SSS(build('resnet18'), macs=0.05, steps=5, kinds=('blocks',)), 'largest possible cut leaves'),
    (lambda: timm_epfs.EPFS(build(), macs=0.5), 'steps='),
    (lambda: timm_epfs.EPFS(build(), steps=5), r'latency=\) nor l1= was given'),
    (lambda: timm_epfs.SSS(build(), steps=5), r'latency=\) nor gamma= was given'),
    (lambda: timm_epfs.SSS(build(), steps=5, gamma=-1), 'gamma=-1 was given'),
    (lambda: timm_epfs.EPFS(build(), macs=0.5, steps=5, l2='l3'), 'elastic'),
    (lambda: timm_epfs.EPFS(build(), macs=0.5, steps=5, kinds=('filter',)), 'filters'),
    (lambda: timm_epfs.EPFS(build(), macs=0.5, steps=5, kinds=('heads',)), 'heads'),
    (lambda: timm_epfs.EPFS('resnet18', macs=0.5, steps=5), 'nn.Module'),
    (lambda: timm_epfs.EPFS(timm_epfs.EPFS(build(), macs=0.5, steps=5).model, macs=0.5, steps=5), 'remove'),
    (lambda: timm_epfs.OneShot(build(), steps=5), 'macs='),
    (lambda: timm_epfs.OneShot(build(), macs=0.5, criterion='taylor'), 'fpgm'),
    (lambda: timm_epfs.Scratch(small_vgg('', 5), macs=0.5, example_input=EXAMPLE), 'base='),
    (lambda: timm_epfs.SFP(build(), macs=0.5, ratio=0.3, steps=5), 'either'),
    (lambda: timm_epfs.BNSFP(build(), macs=0.5), 'steps='),
    (lambda: timm_epfs.EPFS(build(), macs=0.5, steps=5).export(build()), 'no masks'),
])
def test_what_cannot_be_done_is_said_in_one_line(make, word):
    with pytest.raises(PruningError, match=word) as e:
        make()
    assert '\n' not in str(e.value)


def test_step_before_backward():
    for method in METHODS.values():
        with pytest.raises(PruningError, match='before any backward'):
            method(build(), macs=0.5, steps=5).step()


def test_a_loss_without_the_penalty():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5)
    images, target = batch()
    F.cross_entropy(model(images), target).backward()
    with pytest.raises(PruningError, match='no penalty'):
        learner.step()


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_leaves_the_masks_alone(bad):
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=9)
    train(model, learner, sgd(model), 4)
    before = {key: value for key, value in learner.state_dict().items() if 'center' not in key}
    images, target = batch()
    (model(images).sum() * bad + learner.penalty(target)).backward()
    with pytest.raises(PruningError, match='step 5'):
        learner.step()
    for key, value in before.items():
        after = learner.state_dict()[key]
        assert torch.equal(after, value) if isinstance(value, torch.Tensor) else after == value or key == 'overflows'
    model.zero_grad()
    train(model, learner, sgd(model), 1)
    assert learner.state_dict()['center.centers'].isfinite().all()


def test_soft_labels_need_center_loss_off():
    model = build()
    images, target = batch()
    soft = F.one_hot(target, CLASSES).float()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5)
    model(images)
    with pytest.raises(PruningError, match='hard labels'):
        learner.penalty(soft)
    learner.remove()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5, center=0)
    (F.cross_entropy(model(images), soft) + learner.penalty(soft)).backward()
    learner.step()
