"""Our models and learners in transformers and accelerate: from_pretrained, pipelines, Trainer, two processes."""
import copy
import json
import os
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import forkserver
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import (
    BATCH,
    CLASSES,
    STEPS,
    again,
    dense,
    images,
    labelled,
    logits,
    make_trainer,
    pruning_callback,
    same,
    wrapped,
)

import timm_epfs
from timm_epfs.core import PruningError


@pytest.fixture(scope='module', params=['test_vit', 'resnet20_cifar', 'torchvision/squeezenet1_1'])
def saved(request, tmp_path_factory):
    """A pruned model and the folder that it was saved in."""
    name = request.param
    if name.startswith('torchvision/'):
        slim = timm_epfs.prune(name, macs=0.5)
    else:
        slim = timm_epfs.prune(dense(name), macs=0.5)
        slim.pretrained_cfg.update(num_classes=CLASSES, label_names=[f'animal {i}' for i in range(CLASSES)])
    folder = tmp_path_factory.mktemp('saved') / 'half'
    timm_epfs.save_pretrained(slim, folder)
    return slim, folder


def test_transformers_loads_what_we_save_and_timm_what_transformers_saves(saved, tmp_path):
    from transformers import AutoModelForImageClassification
    slim, folder = saved
    x = images(2)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(model, x), logits(slim, x))
    if hasattr(slim, 'pretrained_cfg'):
        assert model.config.id2label[3] == 'animal 3'
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(again(tmp_path), x), logits(slim, x))
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path), x), logits(slim, x))


def test_a_new_head_of_transformers_is_known_to_timm(saved, tmp_path):
    """Only the number of classes at the top of its config.json tells of it."""
    from transformers import AutoModelForImageClassification
    slim, folder = saved
    x = images(2)
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    loaded = again(tmp_path)
    assert loaded.num_classes == 3 and torch.equal(logits(loaded, x), logits(model, x))
    assert loaded.pruning_plan.base_args['num_classes'] == 3
    timm_epfs.save_pretrained(loaded, tmp_path / 'again')
    assert torch.equal(logits(again(tmp_path / 'again'), x), logits(model, x))
    wider = timm.create_model(f'local-dir:{tmp_path}', num_classes=7)
    assert logits(wider, x).shape == (2, 7) and wider.pruning_plan.base_args['num_classes'] == 7


def test_a_pipeline_and_features(saved):
    from transformers import AutoModel, pipeline
    slim, folder = saved
    classify = pipeline('image-classification', model=str(folder))
    assert len(classify(Image.new('RGB', (40, 40)))) == 5
    if hasattr(slim, 'forward_features'):
        features = AutoModel.from_pretrained(folder).eval()
        with torch.inference_mode():
            pooled = features(images(2)).pooler_output
            expected = slim.eval().forward_head(slim.forward_features(images(2)), pre_logits=True)
        torch.testing.assert_close(pooled, expected)


def test_a_config_repeats_nothing_and_those_that_do_load_as_before(saved, tmp_path):
    slim, folder = saved
    config = json.loads((folder / 'config.json').read_text())
    assert not {'num_classes', 'pretrained', 'architecture', 'features_only'} & config['model_args'].keys()
    old = tmp_path / 'old'
    old.mkdir()
    config['model_args']['num_classes'] = config['num_classes']
    (old / 'config.json').write_text(json.dumps(config))
    (old / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    assert torch.equal(logits(again(old), images(2)), logits(slim, images(2)))


# transformers' Trainer.


def test_pruning_in_a_trainer_resumes_exactly_and_saves_the_pruned_model(tmp_path):
    from transformers import AutoModelForImageClassification
    whole, model = pruning_callback(), wrapped(dense('resnet20_cifar'))
    trainer = make_trainer(tmp_path / 'run', model, [whole])
    trainer.train()
    assert whole.learner.steps == STEPS // 2 and whole.learner.finished
    assert any('pruning_alive' in row for row in trainer.state.log_history)
    checkpoint = tmp_path / 'run' / f'checkpoint-{STEPS // 2}'
    assert 'timm_model.conv1.weight' in load_file(checkpoint / 'model.safetensors')

    resumed = pruning_callback()
    other = wrapped(dense('resnet20_cifar'))
    make_trainer(tmp_path / 'resumed', other, [resumed]).train(resume_from_checkpoint=str(checkpoint))
    assert same(whole.learner.state_dict(), resumed.learner.state_dict())
    assert same(model.state_dict(), other.state_dict())

    trainer.save_model(str(tmp_path / 'half'))
    trainer.save_model(_internal_call=True)  # as push_to_hub does
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['architecture'] == 'epfs_pruned'
    x = images(2)
    slim, loaded = again(tmp_path / 'half'), AutoModelForImageClassification.from_pretrained(tmp_path / 'half')
    torch.testing.assert_close(logits(slim, x), logits(model, x), atol=1e-5, rtol=1e-4)  # masked is cut
    dense_macs, left = slim.pruning_plan.cost['macs']
    assert abs(left / dense_macs - 0.6) < 0.02 and torch.equal(logits(loaded, x), logits(slim, x))
    assert trainer.model is model

    before = whole.learner.state_dict()
    trainer.train(resume_from_checkpoint=str(checkpoint))  # again in the same program
    assert same(before, whole.learner.state_dict()) and same(model.state_dict(), other.state_dict())


def test_an_exported_model_is_fine_tuned_with_its_dense_teacher(tmp_path):
    model = wrapped(dense())
    model.config.id2label = {i: f'animal {i}' for i in range(CLASSES)}
    teacher, pruning = copy.deepcopy(model), pruning_callback(steps=1)
    make_trainer(tmp_path, model, [pruning], max_steps=2, save_strategy='no', teacher=teacher).train()
    slim = pruning.export()
    assert slim.config.id2label[4] == 'animal 4' and slim.config.name_or_path == model.config.name_or_path
    before = copy.deepcopy(slim)
    trainer = make_trainer(tmp_path / 'tuned', slim, max_steps=2, save_steps=2, teacher=teacher)
    trainer.train()
    x = images(2)
    assert not torch.equal(logits(before, x), logits(slim, x))
    assert torch.equal(logits(again(tmp_path / 'tuned' / 'checkpoint-2'), x), logits(slim, x))


def test_a_model_that_is_not_timms_is_saved_for_load_pretrained(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=CLASSES)
    model = ViTForImageClassification(config)
    pruning = pruning_callback(steps=1, example_input={'pixel_values': images(1)[..., :16, :16]})
    trainer = make_trainer(tmp_path, model, [pruning], max_steps=2, save_strategy='no', image_size=16)
    trainer.train()
    trainer.save_model(str(tmp_path / 'half'))
    slim, x = timm_epfs.load_pretrained(ViTForImageClassification(config), tmp_path / 'half'), images(2)[..., :16, :16]
    torch.testing.assert_close(logits(slim, x), logits(model, x), atol=1e-5, rtol=1e-4)


def test_distillation_is_the_divergence_of_the_probabilities(tmp_path):
    student, teacher = wrapped(dense('resnet20_cifar')).train(), wrapped(dense('resnet20_cifar'))
    torch.nn.init.normal_(teacher.timm_model.fc.weight)
    trainer = make_trainer(
        tmp_path, student, teacher=teacher, distill_loss_weight=0.7, task_loss_weight=0.3, kd_temperature=2.0)
    batch = {'pixel_values': images(), 'labels': torch.arange(BATCH) % CLASSES}
    loss = trainer.compute_loss(student, dict(batch)).item()
    with torch.no_grad():
        out = student(batch['pixel_values']).logits.numpy().astype(np.float64)
    taught = logits(teacher, batch['pixel_values']).numpy().astype(np.float64)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    p, q = log_softmax(taught / 2), log_softmax(out / 2)
    divergence = 4 * (np.exp(p) * (p - q)).sum(1).mean()
    entropy = -log_softmax(out)[np.arange(BATCH), batch['labels']].mean()
    assert loss == pytest.approx(0.3 * entropy + 0.7 * divergence, rel=1e-4)
    student.eval()
    assert trainer.compute_loss(student, dict(batch)).item() == pytest.approx(student(**batch).loss.item())


def summed_loss(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction='sum') / num_items_in_batch


def test_accumulated_batches_are_one_batch(tmp_path):
    """Whether the Trainer divides the loss by the steps of accumulation, or the loss has been divided already."""
    states = []
    for parts, compute_loss_func in ((1, None), (2, None), (2, summed_loss)):
        pruning = pruning_callback(center=0.01)
        make_trainer(
            tmp_path, wrapped(dense()), [pruning], save_strategy='no', max_steps=4, max_grad_norm=0.0,
            per_device_train_batch_size=BATCH // parts, gradient_accumulation_steps=parts,
            compute_loss_func=compute_loss_func, optim='sgd',
        ).train()
        states.append(pruning.learner.state_dict())
    for state in states[1:]:
        for name in ('solver.x', 'center.centers'):
            np.testing.assert_allclose(state[name], states[0][name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_what_goes_wrong_in_a_trainer_is_said_in_a_line(tmp_path):
    from timm_epfs.integrations import PruningCallback
    with pytest.raises(PruningError, match="method='epf' is unknown; give one of epfs, sss"):
        PruningCallback('epf')
    with pytest.raises(PruningError, match='there is no learner before training begins'):
        pruning_callback().export()
    trainer = make_trainer(tmp_path, wrapped(dense()), [pruning_callback()], mixin=False)
    with pytest.raises(PruningError, match='no penalty in it; train with a class PruningTrainer'):
        trainer.train()
    with pytest.raises(PruningError, match='over 2 GPUs by DataParallel'):
        pruning_callback().on_train_begin(SimpleNamespace(load_best_model_at_end=False, n_gpu=2), None, None)
    with pytest.raises(PruningError, match='load_best_model_at_end=True would bring back'):
        make_trainer(
            tmp_path, wrapped(dense()), [pruning_callback()], load_best_model_at_end=True, save_strategy='best',
            metric_for_best_model='loss', eval_strategy='steps', eval_steps=STEPS // 2).train()


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    monkeypatch.delitem(sys.modules, 'timm_epfs.integrations.trainer', raising=False)
    monkeypatch.delattr('timm_epfs.integrations.PruningCallback', raising=False)
    monkeypatch.delattr('timm_epfs.integrations.trainer', raising=False)
    with pytest.raises(PruningError, match=r"needs transformers, .* pip install 'timm-epfs\[hf\]'"):
        from timm_epfs.integrations import PruningCallback  # noqa: F401
    with pytest.raises(AttributeError):
        assert timm_epfs.integrations.Callback


# accelerate.


def accelerated(folder, steps, first=0, load=None, dataset=None):
    """A user's loop with accelerate."""
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model = dense()
    learner = timm_epfs.EPFS(model, macs=0.6, steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(dataset or labelled(), BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    accelerator.register_for_checkpointing(learner)
    if load is not None:
        accelerator.load_state(load)
    batches = [batch for _ in range(2) for batch in loader][first:steps]
    for batch in batches:
        loss = F.cross_entropy(model(batch['pixel_values']), batch['labels']) + learner.penalty(batch['labels'])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
    accelerator.save_state(folder)
    return learner, accelerator.unwrap_model(model)


def test_accelerate_saves_and_resumes_a_learner(tmp_path):
    whole, model = accelerated(tmp_path / 'whole', STEPS)
    accelerated(tmp_path / 'half', STEPS // 2)
    resumed, other = accelerated(tmp_path / 'resumed', STEPS, STEPS // 2, tmp_path / 'half')
    assert same(whole.state_dict(), resumed.state_dict()) and same(model.state_dict(), other.state_dict())


def learn(folder, rank=0, world=1):
    """The masks that the Trainer and accelerate learn, written to a file of this process."""
    pruning = pruning_callback(steps=STEPS, center=0.01)
    trainer = make_trainer(
        f'{folder}/run', wrapped(dense()), [pruning], per_device_train_batch_size=BATCH // world, optim='sgd',
        max_grad_norm=0.0)
    trainer.train()
    trainer.save_model(f'{folder}/half{world}')
    learners = {'trainer': pruning.learner, 'accelerate': accelerated(f'{folder}/state', STEPS)[0]}
    seen = {name: learner.state_dict() for name, learner in learners.items()}
    keys = ('solver.x', 'center.centers')
    save_file({f'{name}.{key}': state[key] for name, state in seen.items() for key in keys},
              f'{folder}/{rank}of{world}.safetensors')


def worker(rank, folder, port):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
        OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')  # accelerate sets the threads where none are set
    torch.set_num_threads(1)
    learn(folder, rank, 2)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch without gloo')
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    forkserver('transformers.trainer', 'timm_epfs.integrations.trainer')
    mp.start_processes(worker, args=(str(tmp_path), port), nprocs=2, start_method='forkserver')
    learn(tmp_path)
    left, right, one = (load_file(tmp_path / f'{name}.safetensors') for name in ('0of2', '1of2', '0of1'))
    assert one['trainer.solver.x'].min() < 0.95 and one['accelerate.solver.x'].min() < 0.95
    for key in one:
        assert torch.equal(left[key], right[key]), key
        np.testing.assert_allclose(left[key], one[key], atol=2e-3, err_msg=key)
    assert again(tmp_path / 'half2').pruning_plan.cost == again(tmp_path / 'half1').pruning_plan.cost
