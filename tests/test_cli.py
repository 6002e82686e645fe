"""The shell's way in does what the Python calls do, and says so."""
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from timm_epfs import report
from timm_epfs.cli import main, prune_command
from timm_epfs.core import PruningError, step
from timm_epfs.core import progress_bar as progress_module
from timm_epfs.latency import clock
from timm_epfs.pruner import inspect, prune
from timm_epfs.zoo import load_weights, save_pretrained

SHARED = Path(__file__).parents[2] / 'shared'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latency is measured, but not for long."""
    monkeypatch.setattr(
        prune_command, 'latencies', lambda models, images: clock.latencies(models, images, seconds=0.05))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A folder of images of two colours, in subfolders and in tars of the splits."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in (('train', 12), ('validation', 6)):
        for label, colour in (('dark', 60), ('light', 190)):
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(colour - 40, colour + 40, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i}.png')
    (root / 'tars').mkdir()
    for split, name in (('train', 'train'), ('validation', 'test')):
        with tarfile.open(root / 'tars' / f'{name}.tar', 'w') as tar:
            tar.add(root / split, arcname='.')
    return root


def table(out):
    """Figures of the printed table, (dense, pruned, ratio) by row."""
    rows = re.findall(r'^(\S.*?)\s{2,}(\S+ ?[GMk]?)\s+(\S+ ?[GMk]?)\s+(\S+)$', out, flags=re.M)
    scale = {'G': 1e9, 'M': 1e6, 'k': 1e3}

    def number(text):
        value, _, unit = text.partition(' ')
        return float('nan') if value == '-' else float(value) * scale.get(unit, 1)

    return {label: tuple(number(cell) for cell in cells) for label, *cells in rows}


def state_of(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_inspect_prints_the_report(capsys):
    assert main(['inspect', 'test_vit']) == 0
    assert capsys.readouterr() == (f'{inspect("test_vit")}\n', '')


def test_inspect_prints_json_and_nothing_else(capsys):
    arguments = ['--num-classes', '10', '--img-size', '96', '--model-kwargs', 'depth=2', 'global_pool=avg']
    assert main(['inspect', 'test_vit', '--json', *arguments]) == 0
    out, err = capsys.readouterr()
    expected = inspect('test_vit', num_classes=10, img_size=96, depth=2, global_pool='avg')
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict())) and err == ''


def test_image_size_of_a_model_that_takes_any_is_that_of_its_input(capsys):
    assert main(['inspect', 'test_resnet', '--json', '--img-size', '80']) == 0
    assert json.loads(capsys.readouterr().out)['macs'] == inspect('test_resnet', torch.zeros(1, 3, 80, 80)).macs


@pytest.mark.parametrize('channels', [['--in-chans', '1'], ['--model-kwargs', 'in_chans=1']])
def test_image_size_leaves_the_channels_of_the_input_to_the_model(channels, capsys):
    assert main(['inspect', 'test_resnet', '--json', '--img-size', '80', *channels]) == 0
    expected = inspect('test_resnet', torch.zeros(1, 1, 80, 80), in_chans=1)
    assert json.loads(capsys.readouterr().out)['macs'] == expected.macs


def test_prune_saves_and_shows_what_it_saved(tmp_path, capsys):
    assert main(['prune', 'test_resnet', '--macs', '0.5', '-o', str(tmp_path / 'out')]) == 0
    out, err = capsys.readouterr()
    rows = table(out)
    assert err == '' and list(rows) == ['MACs', 'parameters', 'size on disk, bytes', 'latency, ms']
    assert rows['MACs'][2] == pytest.approx(0.5, abs=0.01)

    dense = timm.create_model('test_resnet')
    slim = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    for column, model in enumerate((dense, slim)):
        assert rows['parameters'][column] == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
    file = tmp_path / 'out' / 'model.safetensors'
    assert rows['size on disk, bytes'][1] == pytest.approx(file.stat().st_size, rel=0.05)
    assert 'weights: random' in out and f'local-dir:{(tmp_path / "out").resolve()}' in out


def test_prune_is_the_python_call(tmp_path, capsys):
    torch.manual_seed(7)
    dense = timm.create_model('test_resnet', num_classes=10)
    safetensors.torch.save_file(dense.state_dict(), tmp_path / 'dense.safetensors')
    arguments = [
        '--params', '0.6', '--criterion', 'l1', '--scope', 'local', '--round-to', '2', '--floor', '0.25',
        '--exclude', 'conv1', 'layer1', '--ratios', 'layer4.0.conv1=0.5', '--num-classes', '10',
    ]
    checkpoint = ['--checkpoint', str(tmp_path / 'dense.safetensors')]
    assert main(['prune', 'test_resnet', *arguments, *checkpoint, '-o', str(tmp_path / 'out')]) == 0
    slim = prune(
        dense, params=0.6, criterion='l1', scope='local', round_to=2, floor=0.25, exclude=['conv1', 'layer1'],
        ratios={'layer4.0.conv1': 0.5},
    )
    assert same(state_of(tmp_path / 'out'), slim.state_dict())
    again = timm.create_model(f'local-dir:{tmp_path / "out"}')
    assert again.pruning_plan.to_json() == slim.pruning_plan.to_json()


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        arguments = ['--criterion', 'random', '--seed', seed, '-o', str(tmp_path / name)]
        assert main(['prune', 'test_resnet', '--macs', '0.6', *arguments]) == 0
    assert same(state_of(tmp_path / 'a'), state_of(tmp_path / 'b'))
    assert not same(state_of(tmp_path / 'a'), state_of(tmp_path / 'c'))


def test_a_saved_model_is_cut_further(tmp_path, capsys):
    """From its own weights, without being asked to."""
    assert main(['prune', 'test_resnet', '--macs', '0.7', '-o', str(tmp_path / 'a')]) == 0
    again = ['prune', f'local-dir:{tmp_path / "a"}', '--macs', '0.5', '-o', str(tmp_path / 'b')]
    capsys.readouterr()
    assert main(again) == 0
    few, many = (state_of(tmp_path / name)['fc.weight'] for name in 'ba')
    assert torch.isin(few, many).all()
    assert table(capsys.readouterr().out)['MACs'][2] == pytest.approx(0.5, abs=0.01)
    plan = timm.create_model(f'local-dir:{tmp_path / "b"}').pruning_plan
    assert plan.base == 'test_resnet' and len(plan.recipe['steps']) == 2
    assert plan.cost['macs'][1] / plan.cost['macs'][0] == pytest.approx(0.35, abs=0.02)


def test_a_saved_model_is_cut_further_and_compensated(images, tmp_path):
    data = ['--data-dir', str(images), '-b', '6', '-j', '0', '--criterion', 'fpgm']
    assert main(['prune', 'resnet20_cifar', '--num-classes', '2', '--macs', '0.7', '-o', str(tmp_path / 'a')]) == 0
    again = ['prune', f'local-dir:{tmp_path / "a"}', '--macs', '0.7', *data, '-o', str(tmp_path / 'b')]
    assert main(again) == 0
    first, second = timm.create_model(f'local-dir:{tmp_path / "b"}').pruning_plan.recipe['steps']
    assert 'compensated' not in first and second['compensated'] == {'images': 24}


def test_torchvision_models_are_pruned_too(tmp_path):
    arguments = ['--img-size', '64', '--num-classes', '5', '-o', str(tmp_path / 'out')]
    assert main(['prune', 'torchvision/resnet18', '--macs', '0.5', *arguments]) == 0
    slim = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert slim(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_published_torchvision_weights_are_pickles_and_refused(capsys, tmp_path):
    arguments = ['prune', 'torchvision/resnet18', '--macs', '0.5', '--pretrained', '-o', str(tmp_path / 'out')]
    assert main(arguments) == 2
    assert 'no pickle is read' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('splits', [('', 'validation'), ('tars', 'test')])
def test_data_adds_top1_and_compensation(images, tmp_path, capsys, splits):
    folder, val = splits
    data = ['--data-dir', str(images / folder), '--val-split', val, '-b', '4', '--num-batches', '3', '-j', '0']
    model = ['resnet20_cifar', '--num-classes', '2']
    assert main(['prune', *model, '--macs', '0.6', '--criterion', 'taylor', *data, '-o', str(tmp_path / 'out')]) == 0
    rows = table(capsys.readouterr().out)
    slim = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()

    _, dataset = report.image_splits(images, ('train', 'validation'))
    loader = report.image_loader(dataset, resolve_data_config(model=slim), batch_size=12)
    (pixels, targets), = loader
    with torch.no_grad():
        expected = 100 * (slim(pixels).argmax(1) == targets).float().mean().item()
    assert rows['top-1 after compensation, %'][1] == pytest.approx(expected, abs=0.01)
    assert rows['top-1, %'][0] == rows['top-1 after compensation, %'][0]
    assert slim.pruning_plan.recipe['compensated'] == {'images': 12}
    assert slim.layer3[2].bn2.running_mean.any()  # random weights had zeros


def test_compensation_can_be_left_out(images, tmp_path, capsys):
    data = ['--data-dir', str(images), '-b', '4', '--num-batches', '1', '-j', '0', '--no-compensate']
    model = ['test_vit', '--num-classes', '2']
    assert main(['prune', *model, '--macs', '0.7', *data, '-o', str(tmp_path / 'out')]) == 0
    out, err = capsys.readouterr()
    assert 'top-1, %' in table(out) and 'after compensation' not in out + err


def test_images_for_calibration_are_not_all_of_one_class(images):
    dataset, = report.image_splits(images, ('train',))
    config = resolve_data_config(model=timm.create_model('resnet20_cifar'))
    loader = report.image_loader(dataset, config, batch_size=4, images=8)
    targets = torch.cat([targets for _, targets in loader])
    assert len(targets) == 8 and len(targets.unique()) == 2
    assert targets.tolist() == torch.cat([t for _, t in loader]).tolist()


@pytest.mark.parametrize('splits, classes, message', [
    (('train', 'elsewhere'), None, "no folder or .tar of split 'elsewhere'"),
    (('train', 'validation'), 1, '2 classes, the model has 1'),
])
def test_images_that_would_be_the_wrong_ones_are_refused(images, splits, classes, message):
    with pytest.raises(PruningError, match=message) as e:
        report.image_splits(images, splits, num_classes=classes)
    assert '\n' not in str(e.value)


def test_images_without_splits_are_every_split(images):
    train, val = report.image_splits(images / 'tars' / 'test.tar', ('train', 'validation'))
    assert len(train) == len(val) == 12


def test_top1_of_a_perfect_and_of_a_constant_model():
    class Constant(torch.nn.Linear):
        def forward(self, x):
            return torch.zeros(len(x), 3)

    perfect = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(perfect.weight)
    targets = torch.tensor([0, 1, 2, 2])
    batches = [(torch.eye(3)[targets[:3]], targets[:3]), (torch.eye(3)[targets[3:]], targets[3:])]
    assert report.top1([perfect, Constant(3, 3)], batches) == [100, 25]


def test_the_slower_model_takes_longer():
    small, large = (torch.nn.Linear(n, n) for n in (16, 16))
    large.register_forward_pre_hook(lambda module, x: time.sleep(0.005))
    fast, slow = clock.latencies([small, large], torch.zeros(1, 16), seconds=0.1)
    assert 0 < fast < slow and slow >= 5


def test_warnings_take_one_line(tmp_path, capsys):
    assert main(['prune', 'test_vit', '--macs', '0.15', '-o', str(tmp_path / 'out')]) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith('timm-epfs: warning: to meet the budget, residual streams')


class Listened(io.StringIO):
    """Says when something was written to it."""

    def __init__(self):
        super().__init__()
        self.heard = threading.Event()

    def write(self, text):
        super().write(text)
        self.heard.set()


def test_a_long_step_is_shown_and_a_short_one_is_not(capsys, monkeypatch):
    with step('thinking'):
        pass
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(progress_module, 'DELAY', 0.01)
    monkeypatch.setattr(sys, 'stderr', stderr := Listened())
    with step('thinking'):
        assert stderr.heard.wait(60)  # as long as a busy machine may need
    assert 'thinking' in stderr.getvalue() and capsys.readouterr().out == ''


def test_an_interruption_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_command, 'Pruner', interrupt)
    assert main(['prune', 'test_resnet', '--macs', '0.5', '-o', str(tmp_path / 'out')]) == 130
    assert capsys.readouterr().err == 'timm-epfs: interrupted\n' and list(tmp_path.iterdir()) == []


def test_as_a_module_in_a_process_of_its_own():
    command = [sys.executable, '-m', 'timm_epfs', 'inspect', 'test_resnet', '--json']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ''
    assert json.loads(done.stdout)['model'] == 'test_resnet'


def test_overwrite_replaces_a_saved_model(tmp_path):
    save_pretrained(prune('test_resnet', macs=0.9), tmp_path / 'out')
    assert main(['prune', 'test_resnet', '--macs', '0.5', '-o', str(tmp_path / 'out'), '--overwrite']) == 0
    plan = timm.create_model(f'local-dir:{tmp_path / "out"}').pruning_plan
    assert plan.cost['macs'][1] / plan.cost['macs'][0] == pytest.approx(0.5, abs=0.01)


def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'other.safetensors')
    with pytest.raises(PruningError, match=r'fc.weight has shape \(1000, \d+\) where the model has \(3, \d+\)'):
        load_weights(model, tmp_path / 'other.safetensors')
    assert same(model.state_dict(), before)


@pytest.mark.skipif(not (SHARED / 'weights').is_dir(), reason='needs the shared weights and images')
def test_published_cifar_weights_classify_real_images():
    model = timm.create_model('resnet20_cifar').eval()
    load_weights(model, SHARED / 'weights' / 'cifar10' / 'resnet20.safetensors')
    dataset, = report.image_splits(SHARED / 'data' / 'cifar10-jpeg', ('test',), num_classes=10)
    loader = report.image_loader(dataset, resolve_data_config(model=model), batch_size=100, images=500)
    accuracy, = report.top1([model], loader)
    assert accuracy > 75
