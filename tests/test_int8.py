"""``export_int8`` and ``timm-epfs export --int8``: what is reported is what the file does; a useless one isn't kept."""
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_epfs.cli import export_command, main
from timm_epfs.core import PruningError
from timm_epfs.deploy import export_int8, int8


class Small(nn.Module):
    """Two convolutions, a norm and a classifier."""

    pretrained_cfg = {'input_size': (3, 8, 8), 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}

    def __init__(self, num_classes=3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, num_classes))
        self.num_classes = num_classes

    def forward(self, x):
        return self.layers(x)


def small():
    return Small().eval(), torch.randn(5, 3, 8, 8)


def run_file(path, images):
    """What the file gives, by the tools that a user has."""
    if path.suffix == '.onnx':
        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    import torchao.quantization.pt2e  # noqa: F401, registers the operators
    return torch.export.load(path).module()(images).detach()


def weights_of(path):
    """The arrays of a file that have more than one dim."""
    if path.suffix == '.onnx':
        tensors = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    else:
        tensors = [tensor.detach().numpy() for tensor in torch.export.load(path).state_dict.values()]
    return [tensor for tensor in tensors if tensor.ndim > 1]


@pytest.mark.parametrize('kind, dynamic', [('onnx', True), ('onnx', False), ('pt2', True)])
def test_the_report_is_what_the_file_does(kind, dynamic, tmp_path):
    model, images = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = torch.tensor([0, 1, 2, 0, 1])
    path = tmp_path / f'm.{kind}'
    report = export_int8(  # five images, in batches of two where the batch is fixed
        model, path, kind, images[:2], images, [(images[:3], classes[:3]), (images[3:], classes[3:])], dynamic,
        seconds=0)
    expected = model(images).detach()
    found = torch.cat([run_file(path, images[i:i + 2]) for i in (0, 2, 3)])[[0, 1, 2, 3, 5]]
    assert (report.calibration_images, report.images, report.latency_ms) == (5, 5, None)
    assert report.error == pytest.approx(((found - expected).norm() / expected.norm()).item(), rel=1e-3, abs=1e-5)
    assert 0 < report.error < 0.1
    assert report.agreement == np.mean((found.argmax(1) == expected.argmax(1)).numpy())
    assert report.top1 == tuple(100 * np.mean((y.argmax(1) == classes).numpy()) for y in (expected, found))
    assert path.stat().st_size == report.size[1] and [file.name for file in tmp_path.iterdir()] == [path.name]
    assert sorted(weight.shape[0] for weight in weights_of(path)) == [3, 8, 8]
    assert {weight.dtype for weight in weights_of(path)} == {np.dtype(np.int8)}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_latency_without_a_compiler_is_missing_and_the_file_is_there(tmp_path, monkeypatch):
    def fail(path, images):
        raise RuntimeError('no compiler')

    monkeypatch.setitem(int8.FASTEST, 'onnx', fail)
    model, images = small()
    with pytest.warns(UserWarning, match='latency is not measured: .*no compiler'):
        report = export_int8(model, tmp_path / 'm.onnx', 'onnx', images, images)
    assert report.latency_ms is None and (tmp_path / 'm.onnx').exists()


@pytest.mark.parametrize('calibration, message', [
    (torch.randn(4, 3, 9, 9), r'shape \(3, 9, 9\), the file takes \(3, 8, 8\); resize them'),
    ([], 'found no images'),
    (torch.full((2, 3, 8, 8), torch.nan), 'not finite'),
])
def test_images_that_cannot_be_used(calibration, message, tmp_path):
    model, images = small()
    with pytest.raises(PruningError, match=message):
        export_int8(model, tmp_path / 'm.onnx', 'onnx', images, calibration)
    assert not list(tmp_path.iterdir())


def test_a_useless_file_does_not_take_its_place(tmp_path):
    model, images = small()
    (tmp_path / 'm.onnx').write_text('old')
    with pytest.raises(PruningError, match='relative error of the outputs is 1, .*nothing was written'):
        # Ranges from images that are nearly black cut off whatever the others give.
        export_int8(model, tmp_path / 'm.onnx', 'onnx', images, 1e-6 * images, [1e3 * images], seconds=0)
    with pytest.raises(PruningError, match='no images to compare'):
        int8._Comparison(may_be_logits=True).check()
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization.pt2e.quantize_pt2e', None)
    model, images = small()
    with pytest.raises(PruningError, match=r'torchao.*pip install timm-epfs\[export\]'):
        export_int8(model, tmp_path / 'm.pt2', 'pt2', images, images)
    assert not list(tmp_path.iterdir())


# The command


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """A folder of images of two colours, in splits."""
    root = tmp_path_factory.mktemp('photographs')
    for split in ('train', 'validation'):
        for label, colour in (('dark', 60), ('light', 190)):
            (root / split / label).mkdir(parents=True)
            for i in range(6):
                Image.new('RGB', (32, 32), (colour + i, colour, colour - i)).save(root / split / label / f'{i}.png')
    return root


OPTIONS = ['--format', 'onnx', '--int8', '--workers', '0', '--seconds', '0.01']


@pytest.fixture
def model(request, monkeypatch):
    """What the command finds under any name."""
    found = Small(request.param).eval()
    monkeypatch.setattr(export_command, 'load_model', lambda *args: found)
    return found


@pytest.mark.parametrize('model', [2], indirect=True)
def test_top1_of_both_is_shown_and_goes_into_the_file_of_a_card(model, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'metrics.json').write_text('{"dataset": "two colours", "pruned": {"top1": 50}}')
    options = ['--data-dir', str(photographs), '--metrics', 'metrics.json', '--calibration-images', '7']
    assert main(['export', 'small', *OPTIONS, *options]) == 0
    out, err = capsys.readouterr()
    assert 'error' not in err and 'warning' not in err and out.startswith('small_int8.onnx: ')
    assert 'ranges from 7 images; compared on 12: the same class for' in out

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(Image.open(path)) for path in sorted(photographs.glob('validation/*/*.png'))])
    classes = torch.arange(2).repeat_interleave(6)
    found = torch.cat([run_file(tmp_path / 'small_int8.onnx', image[None]) for image in images])
    top1 = [round(100 * (y.argmax(1) == classes).double().mean().item(), 3) for y in (model(images), found)]
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['dataset'] == 'two colours' and metrics['pruned'] == {'top1': 50}
    assert [metrics['int8'][which]['top1'] for which in ('float32', 'int8')] == top1
    assert f'{top1[0]:.2f}' in out and f'{metrics["int8"]["int8"]["latency_ms"]:.2f}' in out


@pytest.mark.parametrize('model', [3], indirect=True)
def test_classes_that_are_not_the_models_are_not_counted(model, photographs, tmp_path, capsys):
    options = ['--data-dir', str(photographs), '-o', str(tmp_path / 'm.onnx'), '--dynamic-batch']
    assert main(['export', 'small', *OPTIONS, *options]) == 0
    out = capsys.readouterr().out
    assert 'the same class for' in out and 'top-1' not in out and 'any batch' in out


@pytest.mark.parametrize('arguments, message', [
    (['--int8'], '--int8 takes ranges from images'),
    (['--data-dir', 'images'], 'only --int8 reads images; add --int8'),
    (['--metrics', 'm.json'], 'only int8 is measured; add --int8'),
    (['--int8', '--data-dir', 'nowhere'], 'nowhere does not exist'),
    (['--int8', '--data-dir', '.', '--metrics', 'bad.json'], 'metrics in bad.json can\'t be read'),
])
def test_what_cannot_be_quantised_is_refused_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.json').write_text('{')
    assert main(['export', 'resnet20_cifar', '--format', 'onnx', *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['bad.json']
