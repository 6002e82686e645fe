"""The road on a GPU: trace, prune, learn, compile, time, export. ``--device cpu`` runs the same tests on the CPU."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import distance, randomise
from loop import EXAMPLE, SIZE, batch, build, sgd
from torch import nn

import timm_epfs
from timm_epfs.cli import main
from timm_epfs.core import device_of
from timm_epfs.deploy import export_int8, export_model
from timm_epfs.latency import least_seconds

pytestmark = pytest.mark.gpu

# Convolutions on a GPU may multiply in TF32, which has 10 bits; a mistake makes 1e-1 and more.
TOLERANCE = 1e-2


@pytest.fixture(scope='module')
def device(request):
    name = request.config.getoption('--device')
    if torch.device(name).type == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU; --device cpu runs these tests on the CPU')
    return torch.device(name)


@pytest.fixture(scope='module')
def amp_dtype(device):
    """What mixed precision is fast in."""
    return 'bfloat16' if device.type == 'cpu' else 'float16'


@pytest.fixture
def dense(device):
    return randomise(build()).eval().requires_grad_(False).to(device)


@pytest.fixture
def images(device):
    return batch()[0].to(device)


def test_a_model_is_traced_as_on_the_cpu(dense):
    reports = [timm_epfs.inspect(model, EXAMPLE.to(device_of(model))).to_dict()
               for model in (dense, copy.deepcopy(dense).cpu())]
    assert reports[0] == reports[1]


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_vit'])
def test_a_model_is_cut_as_on_the_cpu(name, device, images):
    args = {'img_size': SIZE} if name == 'test_vit' else {}
    dense = randomise(build(name, **args)).eval().to(device)
    slim, expected = (
        timm_epfs.prune(model, macs=0.5, example_input=EXAMPLE.to(device_of(model)))
        for model in (dense, copy.deepcopy(dense).cpu()))
    assert device_of(slim) == device_of(dense) and slim.pruning_plan.to_json() == expected.pruning_plan.to_json()
    with torch.inference_mode():
        assert distance(expected.eval()(images.cpu()), slim.eval()(images).cpu()) < TOLERANCE


def test_images_choose_and_compensate(dense, images):
    plain = timm_epfs.prune(dense, macs=0.7, example_input=images[:1], criterion='obs', data=images, compensate=False)
    better = timm_epfs.compensate(copy.deepcopy(plain), dense, images)
    with torch.inference_mode():
        expected = dense(images)
        errors = [(model.eval()(images) - expected).norm().item() for model in (plain, better)]
    assert errors[1] < errors[0] and device_of(better) == device_of(dense)
    timm_epfs.recalibrate_bn(plain, [images])
    assert all(torch.isfinite(tensor).all() for tensor in plain.state_dict().values())


@pytest.mark.parametrize('method', [timm_epfs.EPFS, timm_epfs.SSS, timm_epfs.SFP, timm_epfs.BNSFP])
def test_learners_train_with_amp_and_a_grad_scaler(method, device, amp_dtype):
    model = build().to(device)
    learner = method(model, macs=0.5, steps=6, example_input=EXAMPLE.to(device))
    optimizer, scaler = sgd(model, 1e-3), torch.amp.GradScaler(device.type, init_scale=64.0)
    for step in range(6):
        images, target = (tensor.to(device) for tensor in batch(step))
        with torch.autocast(device.type, getattr(torch, amp_dtype)):
            loss = F.cross_entropy(model(images), target) + learner.penalty(target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        learner.step()
    slim = learner.export()
    before, after = slim.pruning_plan.cost['macs']
    assert after / before == pytest.approx(0.5, abs=0.03) and device_of(slim) == device_of(model)
    with torch.inference_mode():
        assert torch.isfinite(slim.eval()(images)).all()


def test_the_trainer_trains_and_cuts(device, amp_dtype, tmp_path):
    output = tmp_path / 'out'
    assert main([
        'train', 'resnet20_cifar', '--dataset', 'digits', '--img-size', '8', '-b', '256', '--macs', '0.5', '--method',
        'epfs', '--epochs', '2', '--dense-epochs', '1', '--sparse-epochs', '1', '--device', str(device), '--amp',
        '--amp-dtype', amp_dtype, '-o', str(output),
    ]) == 0
    model = timm.create_model(f'local-dir:{output / "pruned"}', pretrained=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_inductor_compiles_in_one_graph(dense, images):
    torch.compiler.reset()
    slim = timm_epfs.prune(dense, macs=0.5, example_input=images[:1]).eval()
    compiled = torch.compile(slim, fullgraph=True, options={'fx_graph_cache': False})
    with torch.inference_mode():
        assert distance(slim(images), compiled(images)) < TOLERANCE


def test_a_budget_of_time_is_met_on_the_clock(device, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_EPFS_CACHE', str(tmp_path))
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(n, m, 3, padding=1) for n, m in ((3, 64), (64, 64), (64, 8))]
    dense = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 16 * 16, 5)).eval().to(device)
    example = torch.randn(4 if device.type == 'cpu' else 512, 3, 16, 16, device=device)  # enough for its cores
    slim = timm_epfs.prune(dense, latency=0.7, latency_batch_size=len(example), example_input=example[:1])
    before, after = least_seconds([dense, slim.eval()], (example,), {})
    assert after < before and device_of(slim) == device_of(dense)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dense, images, dtype):
    slim = timm_epfs.prune(dense.to(dtype), macs=0.5, example_input=images[:1].to(dtype)).eval()
    with torch.inference_mode():
        output, expected = slim(images.to(dtype)), copy.deepcopy(slim).float()(images)
    assert output.dtype == dtype and distance(expected, output.float()) < 32 * torch.finfo(dtype).eps


def test_a_program_is_exported_on_the_device(dense, images):
    slim = timm_epfs.prune(dense, macs=0.5, example_input=images[:1]).eval()
    batches = ({0: torch.export.Dim('batch')},)
    program = torch.export.export(slim, (images[:2],), dynamic_shapes=batches)
    with torch.inference_mode():
        assert distance(slim(images), program.module()(images)) < TOLERANCE


def test_files_are_exported_from_what_came_back(dense, images, tmp_path):
    slim = timm_epfs.prune(dense, macs=0.5, example_input=images[:1]).eval().cpu()
    for kind in ('onnx', 'pt2'):
        export_model(slim, tmp_path / f'm.{kind}', kind, images[:1].cpu(), dynamic_batch=True)
    report = export_int8(slim, tmp_path / 'int8.pt2', 'pt2', images[:1].cpu(), images.cpu(), seconds=0.1)
    assert report.error < 0.2 and min(report.latency_ms) > 0  # inductor compiled both
