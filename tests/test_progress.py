"""What may take longer than two seconds shows that it runs."""
import importlib
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import timm_epfs
from timm_epfs.core import progress

BARS = {
    'importance.gradients': 'computing gradients',
    'importance.sensitivity': 'measuring sensitivity',
    'importance.statistics': 'reading activations',
    'latency.device_latency': 'measuring the latency of cuts',
    'latency.timings': 'timing layers',
    'surgery.batch_norm': 'recalibrating BatchNorm',
    'surgery.reconstruction': 'compensating',
}


@pytest.fixture
def shown(monkeypatch):
    """What was shown: each bar with the number of things that it counted, each step with None."""
    shown, bars = {}, []

    def show_bar(batches, what, *args, **options):
        bars.append((what, progress(batches, what, *args, **options)))
        return bars[-1][1]

    @contextmanager
    def show_step(what):
        shown[what] = None
        yield

    for module in BARS:
        monkeypatch.setattr(f'timm_epfs.{module}.progress', show_bar)
    monkeypatch.setattr(importlib.import_module('timm_epfs.pruner.pruner'), 'step', show_step)
    yield lambda: {**shown, **{what: bar.n for what, bar in bars}}


def test_long_work_shows_that_it_runs(shown, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_EPFS_CACHE', str(tmp_path))
    monkeypatch.setattr('timm_epfs.latency.timings.time_call', lambda call, device: 1e-3)
    monkeypatch.setattr('timm_epfs.latency.device_latency.least_seconds', lambda models, *inputs: [2.0, 1.0])
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 4)).eval()
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(3)]
    pruner = timm_epfs.Pruner(net, data=batches * 20, example_input=batches[0][0][:1])
    slim = pruner(macs=0.6)
    pruner.scores('taylor')
    pruner.latency().match(timm_epfs.Budget(latency=0.5), lambda share: slim)
    timm_epfs.recalibrate_bn(slim, batches)
    found = shown()
    assert set(found) == {'tracing Sequential', 'cutting Sequential', *BARS.values()}
    assert (found['computing gradients'], found['recalibrating BatchNorm']) == (60, 3)
    assert found['measuring sensitivity'] == 2 and found['timing layers'] >= 4
