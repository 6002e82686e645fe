"""Learners in their user's loop: what they leave alone, what they move, and that they resume as if uninterrupted."""
import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import distance
from loop import CLASSES, SIZE, batch, build, outputs, sgd, train
from timm.utils import ModelEmaV3
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.learn import METHODS


def test_the_model_keeps_its_parameters_and_gets_its_weights_back():
    model = build()
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    out = outputs(model)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5)
    assert torch.equal(outputs(model), out)  # masks of one change nothing, not a bit
    assert {id(p) for p in model.parameters()} == {id(p) for p in before.values()}
    assert len(list(model.buffers())) == len(list(build().buffers()))
    learner.remove()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert {type(m) for m in model.modules()} == {type(m) for m in build().modules()}
    timm_epfs.SSS(model, macs=0.5, steps=5)  # and may learn again


def test_optimizer_first_or_learner_first():
    runs = []
    for first in ('optimizer', 'learner'):
        model = build()
        optimizer = sgd(model) if first == 'optimizer' else None
        learner = timm_epfs.EPFS(model, macs=0.5, steps=12)
        optimizer = optimizer or sgd(model)
        train(model, learner, optimizer, 8)
        runs.append((learner.values(), outputs(model)))
    assert all(np.array_equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert min(values.min() for values in runs[0][0].values()) < 0.9


def test_masks_are_neither_decayed_nor_stepped_nor_cleared_by_the_optimizer():
    model = build()
    learner = timm_epfs.EPFS(model, l1=0.0, l2=None, lr=0.0, steps=9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    for seed in range(2):
        images, target = batch(seed)
        (F.cross_entropy(model(images), target) + learner.penalty(target)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-12)
        optimizer.step()
        model.zero_grad()
        grad = learner.masks.train_masks.grad
        assert grad is not None and grad[:learner.masks.units].abs().max() > 1e-6
        learner.step()
        assert learner.masks.train_masks.grad is None
    assert all((values == 1).all() for values in learner.values().values())


def test_the_gradient_of_a_mask_is_that_of_its_channel():
    """Against a hook that scales the activation itself."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES))
    images, target = batch(n=4, size=16)
    scale = torch.ones(6, requires_grad=True)
    handle = model[2].register_forward_hook(lambda m, a, out: out * scale[:, None, None])
    F.cross_entropy(model(images), target).backward()
    handle.remove()
    learner = timm_epfs.SSS(model, gamma=0.1, steps=5, example_input=torch.empty(1, 3, 16, 16))
    (F.cross_entropy(model(images), target) + learner.penalty(target)).backward()
    torch.testing.assert_close(learner.masks.train_masks.grad[learner.masks.slices['0']], scale.grad)


def test_parts_of_a_batch_are_one_batch():
    runs = []
    for parts in (1, 2):
        model = build('test_vit', img_size=SIZE)
        learner = timm_epfs.EPFS(model, macs=0.6, steps=8)
        train(model, learner, sgd(model), 6, parts=parts)
        runs.append(np.concatenate(list(learner.values().values())))
    assert runs[0].min() < 0.97
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-4)


@pytest.mark.parametrize('before', [False, True])
def test_a_grad_scaler_changes_nothing(before):
    """Its scale doubles after every step; the learner may step before or after it does."""
    runs = []
    for enabled in (False, True):
        model = build('test_vit', img_size=SIZE)
        learner = timm_epfs.EPFS(model, macs=0.6, steps=8)
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler('cpu', init_scale=64.0, growth_interval=1, enabled=enabled)
        for seed in range(6):
            images, target = batch(seed)
            scaler.scale(F.cross_entropy(model(images), target) + learner.penalty(target)).backward()
            if before:
                learner.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if not before:
                learner.step()
        runs.append(np.concatenate(list(learner.values().values())))
    assert runs[0].min() < 0.97
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-4)


def test_an_overflow_under_a_scaled_loss_is_passed_over():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.6, steps=50)
    images, target = batch()
    for _ in range(20):
        ((model(images).sum() * torch.inf + learner.penalty(target)) * 1024).backward()
        learner.step()
    assert learner.log()['skipped'] == 20 and learner.alive == 1.0
    with pytest.raises(PruningError, match='not finite'):
        for _ in range(20):
            ((model(images).sum() * torch.inf + learner.penalty(target)) * 1024).backward()
            learner.step()


def test_evaluation_sees_zeros_and_training_sees_the_extrapolated_point():
    model = build().train()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=20)
    train(model, learner, sgd(model), 8)
    x, y = learner.masks.eval_masks[:-2], learner.masks.train_masks[:-2]
    assert not torch.equal(x, y)
    assert np.array_equal(np.concatenate(list(learner.values().values())), learner.solver.x.numpy())
    folded = learner.masks.fold(copy.deepcopy(model))
    assert distance(outputs(folded), outputs(model)) < 1e-6


def test_ema_has_its_own_weights_and_the_same_masks():
    model = build()
    learner = timm_epfs.EPFS(model, macs=0.5, steps=5)
    ema, optimizer = ModelEmaV3(model, decay=0.5), sgd(model)
    for seed in range(5):
        train(model, learner, optimizer, 1, first=seed)
        ema.update(model)
    slim = learner.export(ema.module)
    assert distance(outputs(ema.module), outputs(slim)) < 1e-4
    assert distance(outputs(model), outputs(slim)) > 1e-4
    kept = outputs(ema.module)
    learner.remove()
    assert torch.equal(outputs(ema.module), kept)


def test_channels_last_survives():
    model = build().to(memory_format=torch.channels_last)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=3)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    train(model, learner, sgd(model), 3)
    assert distance(outputs(model), outputs(learner.export())) < 1e-4


def test_bfloat16_autocast_learns_nearly_the_same():
    """It moves the masks a tenth as much as other batches do; a third is allowed."""
    def learned(first=0, autocast=False):
        model = build()
        # A steered λ would decide between near ties.
        learner = timm_epfs.EPFS(model, l1=0.02, lr=1.0, steps=6, refit=False)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            train(model, learner, sgd(model, 0.001), 5, first=first)
        return np.concatenate(list(learner.values().values()))

    exact = learned()
    rounded, others = (np.abs(exact - masks).mean() for masks in (learned(autocast=True), learned(first=100)))
    assert 0 < rounded < others / 3


def test_a_compiled_model_learns_the_same():
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build('test_vit', img_size=SIZE, depth=1)
        learner = timm_epfs.EPFS(model, macs=0.75, steps=8)
        counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
        called = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        train(model, learner, sgd(model), 6, runs=called)
        runs.append(np.concatenate(list(learner.values().values())))
    assert counter.frame_count == 1  # masks that move compile nothing anew
    assert runs[0].min() < 0.97
    np.testing.assert_allclose(runs[0], runs[1], atol=1e-4)


def test_a_learner_made_on_a_wrapper_is_on_the_model():
    model = build()
    learner = timm_epfs.EPFS(nn.DataParallel(model), macs=0.5, steps=5)
    assert learner.model is model
    model = build()
    assert timm_epfs.SSS(torch.compile(model), macs=0.5, steps=5).model is model


# Going on.

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('at', [3, 8])
def test_resumed_is_uninterrupted(method, at):
    def make():
        model = build()
        options = {'steps_per_epoch': 2} if 'sfp' in method else {}
        return model, METHODS[method](model, macs=0.5, steps=7, **options), sgd(model)

    model, learner, optimizer = make()
    train(model, learner, optimizer, 10)
    first = make()
    train(*first, at)
    saved = copy.deepcopy([part.state_dict() for part in first])
    assert all(isinstance(v, (torch.Tensor, int, float, str, type(None))) for v in saved[1].values())
    second = make()
    for part, state in zip(second, saved):
        part.load_state_dict(state)
    train(*second, 10 - at, first=at)
    assert torch.equal(outputs(second[0]), outputs(model))
    a, b = learner.values(), second[1].values()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert second[1].plan().to_json() == learner.plan().to_json()


def test_a_state_of_something_else_is_refused():
    learner = timm_epfs.EPFS(build(), macs=0.5, steps=5)
    with pytest.raises(PruningError, match='resume with the learner that'):
        learner.load_state_dict(timm_epfs.SSS(build(), macs=0.5, steps=5).state_dict())
    with pytest.raises(PruningError, match='another model'):
        learner.load_state_dict(timm_epfs.EPFS(build('test_vit'), macs=0.5, steps=5).state_dict())
