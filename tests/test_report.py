"""The report of what can be cut: its figures against other sources, its table against its data."""
import json

import pytest
import timm
import torch
from torch import nn

from timm_epfs.core import PruningError, format_count
from timm_epfs.pruner import inspect, trace_model
from timm_epfs.report import count_macs


class Spectrum(nn.Module):
    """Nothing but a head follows an operation that no rule covers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Conv2d(16, 8, 3)

    def forward(self, x):
        return self.head(torch.fft.fft(self.conv(x), dim=1).real)


@pytest.fixture(scope='module')
def vit():
    return inspect('test_vit')


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'mobilenetv3_small_050'])
def test_totals_are_the_models(name):
    report = inspect(name)
    model = timm.create_model(name).eval()
    image = torch.zeros(1, *model.pretrained_cfg['input_size'])
    assert report.params == sum(p.numel() for p in model.parameters())
    assert report.macs == pytest.approx(count_macs(model, (image,), {}), rel=0.005)


def test_structures_are_those_of_the_trace(vit):
    structures = trace_model(timm.create_model('test_vit')).structures
    assert [(r.name, r.kind, r.units, r.exact, r.reason, r.stream) for r in vit.structures] == \
        [(s.name, s.kind, s.units, s.exact, s.reason, s.stream) for s in structures]


def test_a_stream_is_in_the_share_and_not_in_the_exact_share(vit):
    assert 0 < vit.macs_share_exact < vit.macs_share <= 1
    stream, = (row for row in vit.structures if row.stream)
    assert not stream.exact and stream.reason and stream.macs_share < 1


def test_share_of_a_structure_is_that_of_the_layers_it_cuts():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    report = inspect(model, torch.zeros(1, 3, 4, 4))
    macs = [16 * n for n in (3 * 8, 8 * 16, 16 * 2)]
    shares = {row.name: row.macs_share for row in report.structures}
    assert report.model == 'Sequential' and report.macs == sum(macs)
    assert shares == pytest.approx({'0': (macs[0] + macs[1]) / sum(macs), '2': (macs[1] + macs[2]) / sum(macs)})


@pytest.mark.parametrize('name', ['test_vit', 'resnet50', 'densenet121'])
def test_rows_of_the_table_hold_every_structure_once_and_their_names_work_as_patterns(name):
    report = inspect(name)
    structures = trace_model(timm.create_model(name)).structures
    assert sum(row.count for row in report.groups) == len(report.structures) == len(structures)
    for row in report.groups:
        assert sum(s.matches(row.name) for s in structures) >= row.count
    assert len(report.groups) < 20


@pytest.mark.parametrize('name', ['test_vit', 'densenet121', 'swin_tiny_patch4_window7_224'])
def test_the_table_fits_in_120_columns(name):
    assert max(len(line) for line in str(inspect(name)).splitlines()) <= 120


def test_the_table_says_what_is_not_exact_and_why(vit):
    line, = (line for line in str(vit).splitlines() if line.startswith('patch_embed.proj'))
    assert line.endswith('no: normalised over the channels')


def test_as_data_it_survives_json(vit):
    data = json.loads(json.dumps(vit.to_dict()))
    assert data == vit.to_dict()
    assert data['model'] == 'test_vit' and data['skipped'] == []
    assert [row['name'] for row in data['structures']] == [row.name for row in vit.structures]


def test_a_model_that_cannot_be_cut_says_where_tracing_gave_up():
    report = inspect(Spectrum(), torch.zeros(1, 3, 16, 16))
    assert report.structures == () and report.macs_share == 0
    assert 'nothing can be cut' in str(report)
    assert 'test_report.py' in str(report) and 'has no rule' in str(report)


def test_arguments_reach_the_model():
    assert inspect('test_resnet', num_classes=10).params < inspect('test_resnet').params
    smaller = inspect('test_resnet', torch.zeros(1, 3, 80, 80))
    assert smaller.macs == pytest.approx(inspect('test_resnet').macs / 4, rel=0.05)  # odd sizes are rounded up


def test_a_module_is_left_as_it_is():
    model = timm.create_model('test_resnet').train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert inspect(model).model == 'test_resnet'
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_torchvision_models_are_named():
    report = inspect('torchvision/resnet18')
    assert report.model == 'torchvision/resnet18' and report.params == 11_689_512


@pytest.mark.parametrize('model, args, message', [
    ('resnet5o', {}, 'nearest: resnet50'),
    ('test_resnet', {'colour': 3}, 'colour'),
    (nn.Linear(2, 2), {'num_classes': 3}, "num_classes= was given with a module, but goes with a model's name"),
    (None, {}, 'NoneType was given'),
])
def test_bad_input_gets_one_line(model, args, message):
    with pytest.raises(PruningError, match=message) as e:
        inspect(model, **args)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('value, text', [
    (4_089_184_256, '4.089 G'), (25_557_032, '25.56 M'), (1000, '1.000 k'), (999, '999'), (0, '0'),
])
def test_counts_are_shown_in_four_digits(value, text):
    assert format_count(value) == text
