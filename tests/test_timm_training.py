"""Learners in timm's tasks, and pruned models in timm's training script."""
import json
import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.task import LogitDistillationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from trainers import BATCH, CLASSES, SIZE, STEPS, dense, images, same

import timm_epfs
from timm_epfs.integrations import PruningTask, PruningTaskMixin
from timm_epfs.zoo.autoload import switch_on

ROOT = Path(__file__).parents[1]


def train_task(task, optimizer, steps, first=0):
    for step in range(first, steps):
        result = task(images(seed=step), torch.arange(BATCH) % CLASSES)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.step()
    return result


def make_task(task_class=PruningTask, **options):
    model = dense('resnet20_cifar').train()
    learner = timm_epfs.EPFS(model, macs=0.6, steps=STEPS)
    task = task_class(model, learner=learner, verbose=False, **options)
    return task, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def test_a_task_carries_its_learner_through_timms_checkpoints(tmp_path):
    whole, optimizer = make_task()
    train_task(whole, optimizer, STEPS)
    half, optimizer = make_task()
    result = train_task(half, optimizer, STEPS // 2)
    assert result.keys() == {'loss', 'output', 'penalty'}
    half.setup_ema(decay=0.9)
    saver = CheckpointSaver(
        half.trainable_module, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), task=half)
    saver.save_checkpoint(epoch=0)
    resumed, optimizer = make_task()
    resume_task_checkpoint(resumed, str(tmp_path / 'last.pth.tar'), optimizer, log_info=False)
    train_task(resumed, optimizer, STEPS, STEPS // 2)
    assert same(whole.learner.state_dict(), resumed.learner.state_dict())
    assert same(whole.trainable_module.state_dict(), resumed.trainable_module.state_dict())


def test_any_task_of_timm_can_carry_a_learner():
    class PruningDistillation(PruningTaskMixin, LogitDistillationTask):
        pass

    task, optimizer = make_task(PruningDistillation, teacher_model=dense('resnet20_cifar'))
    result = train_task(task, optimizer, 1)
    assert {'kd_loss', 'penalty', 'loss'} <= result.keys() and task.learner.masks.units


def test_timms_script_trains_our_models_by_autoload(tmp_path):
    site = tmp_path / 'site'
    site.mkdir()
    switch_on(site)
    (site / 'sitecustomize.py').write_text(f'import site; site.addsitedir({str(site)!r})')
    for i in range(4):
        folder = tmp_path / 'data' / 'train' / f'class{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (SIZE, SIZE), (60 * i, 0, 0)).save(folder / f'{i}.png')
    slim = timm_epfs.prune(dense('resnet20_cifar'), macs=0.5)
    timm_epfs.save_pretrained(slim, tmp_path / 'half')
    variant = next(name for name in timm.list_pretrained('resnet20_cifar_epfs*'))
    names = [variant, f'local-dir:{tmp_path / "half"}']
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'timm_script.py'), str(tmp_path), *names], capture_output=True, text=True,
        env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    variant_row, folder_row = map(json.loads, done.stdout.splitlines())
    assert variant_row['classes'] == folder_row['classes'] == 2
    kept = timm.create_model(variant, num_classes=2), timm.create_model(f'local-dir:{tmp_path / "half"}', num_classes=2)
    for row, model in zip((variant_row, folder_row), kept):
        assert row['parameters'] == sum(p.numel() for p in model.parameters()) and row['moved'] and row['resumed'] == 1
