"""``timm-epfs benchmark`` and ``export``: what is shown is what was measured and written, whole."""
import json
import os
import sys
import threading
import time
from functools import partial

import onnxruntime
import pytest
import timm
import torch

from timm_epfs.cli import main
from timm_epfs.core import PruningError
from timm_epfs.deploy import benchmark, export
from timm_epfs.latency import clock
from timm_epfs.pruner import prune
from timm_epfs.zoo import load_model, save_pretrained

SHORT = ['--img-size', '32', '--seconds', '0']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save_pretrained(prune('test_resnet', macs=0.5, num_classes=10), tmp_path_factory.mktemp('saved') / 'half')


def test_forwards_take_turns_and_the_slower_takes_longer():
    order = []

    def forward(name, seconds):
        order.append(name)
        time.sleep(seconds)

    forwards = [partial(forward, 'fast', 0), partial(forward, 'slow', 0.005)]
    fast, slow = clock.time_interleaved(forwards, torch.device('cpu'), seconds=0, least=4)
    assert len(fast.times) == len(slow.times) == 4 and fast.median < slow.median >= 0.005
    turns = [name for name, before in zip(order, [None, *order]) if name != before]
    assert turns == 4 * ['fast', 'slow']


def test_peak_memory_is_what_is_alive_at_once():
    def forward():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        both = torch.empty(2 << 20, dtype=torch.uint8), torch.empty(3 << 20, dtype=torch.uint8)
        return len(both)

    assert clock.peak_memory(forward, torch.device('cpu')) == 5 << 20


def test_threads_that_measure_memory_leave_stderr_as_it_was():
    """The second thread begins while the first one measures, and ends after it."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        first_is_in.set()
        second_is_in.wait(0.2)

    def second():
        second_is_in.set()
        first_is_out.wait(10)

    def after_first():
        first_is_in.wait(10)
        clock.peak_memory(second, torch.device('cpu'))

    before, stderr = os.fstat(2), sys.stderr
    other = threading.Thread(target=after_first)
    other.start()
    clock.peak_memory(first, torch.device('cpu'))
    first_is_out.set()
    other.join()
    assert os.path.samestat(os.fstat(2), before) and sys.stderr is stderr


def test_what_is_printed_is_what_is_written(saved, tmp_path, capsys):
    files = ['--json', str(tmp_path / 'b.json'), '--plot', str(tmp_path / 'b.png')]
    assert main(['benchmark', str(saved), 'test_vit', '--batch-size', '1', '3', *SHORT, *files]) == 0
    out, err = capsys.readouterr()
    data = json.loads((tmp_path / 'b.json').read_text())
    rows = data['rows']
    assert err == '' and (tmp_path / 'b.png').read_bytes().startswith(b'\x89PNG')
    assert [(row['model'], row['dense'], row['batch_size']) for row in rows] == [
        ('test_resnet', None, 1), (str(saved), 'test_resnet', 1),
        ('test_resnet', None, 3), (str(saved), 'test_resnet', 3),
        ('test_vit', None, 1), ('test_vit', None, 3),
    ]
    for line, row in zip(out.splitlines()[1:], rows):
        name, batch, median, _, rate, *_ = line.split()
        assert (name, int(batch)) == (row['model'], row['batch_size'])
        assert float(median) == pytest.approx(row['median_ms'], abs=0.01)
        assert row['p10_ms'] <= row['median_ms'] <= row['p90_ms'] and row['forwards'] == benchmark.LEAST
        assert float(rate) == pytest.approx(1000 * row['batch_size'] / row['median_ms'], rel=0.01, abs=0.05)
    dense, slim = rows[2:4]
    assert slim['peak_bytes'] < dense['peak_bytes'] and slim['weight_bytes'] < dense['weight_bytes']
    assert slim['speedup'] == pytest.approx(dense['median_ms'] / slim['median_ms'])
    assert slim['realised_share'] == pytest.approx(slim['speedup'] / slim['theoretical_speedup'])
    assert data['conditions']['threads'] == torch.get_num_threads()


def test_macs_are_those_of_the_plan(saved):
    conditions = benchmark.Conditions(seconds=0)
    models = benchmark.with_base(str(saved), load_model(str(saved)), conditions)
    dense, slim = benchmark.time_together(models, 1, conditions)
    assert (dense.macs, slim.macs) == models[str(saved)].pruning_plan.cost['macs']


@pytest.mark.parametrize('engine', [['--torchcompile', 'eager'], ['--onnx'], ['--amp', '--channels-last']])
def test_engines(saved, engine, capsys):
    assert main(['benchmark', str(saved), *SHORT, *engine]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and (' - ' in out.splitlines()[2]) == ('--onnx' in engine)


@pytest.mark.parametrize('arguments, message', [
    (['nothing_like_it'], "no model is named 'nothing_like_it'"),
    (['test_resnet', '--device', 'nowhere'], "device 'nowhere' can't be used"),
    (['test_resnet', '--onnx', '--amp'], 'drop --device, --amp and --channels-last'),
    (['test_resnet', '--plot', 'picture.pdf'], 'only .png is drawn'),
    (['test_resnet', '--json', 'nowhere/b.json'], 'there is no folder nowhere'),
    (['test_vit', 'test_efficientnet', '--img-size', '30'], "test_vit can't be"),
    (['test_resnet', '--torchcompile', 'nothing'], "torch.compile with backend 'nothing' can't be used"),
])
def test_what_cannot_be_timed_is_refused_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['benchmark', *arguments, '--seconds', '0']) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count('\n') == 1 and out == '' and not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_refused_before_the_clock_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert main(['benchmark', 'test_resnet', '--plot', str(tmp_path / 'b.png')]) == 2
    assert 'timm-epfs[plot]' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['onnx', 'pt2'])
@pytest.mark.parametrize('dynamic', [True, False])
def test_an_exported_file_runs_without_us(saved, kind, dynamic, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ['--dynamic-batch'] if dynamic else ['--batch-size', '3']
    assert main(['export', str(saved), '--format', kind, '--img-size', '32', *options]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / f'half.{kind}'
    assert err == '' and [file.name for file in tmp_path.iterdir()] == [path.name]
    assert out.startswith(f'half.{kind}: ') and 'saved weights' in out and 'largest difference' in out

    images = torch.randn(3, 3, 32, 32)
    expected = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()(images)
    if kind == 'onnx':
        output, = onnxruntime.InferenceSession(path).run(None, {'images': images.numpy()})
    else:
        output = torch.export.load(path).module()(images).detach()
    torch.testing.assert_close(torch.as_tensor(output), expected.detach(), rtol=1e-4, atol=1e-5)


def test_branches_are_merged_on_request(tmp_path):
    path = tmp_path / 'm.pt2'
    assert main(['export', 'repvgg_a0', '--format', 'pt2', '--img-size', '32', '--reparam', '-o', str(path)]) == 0
    weights = torch.export.load(path).state_dict
    assert weights and not any('conv_kxk' in name or 'identity' in name for name in weights)


@pytest.mark.parametrize('arguments, message', [
    (['nothing_like_it'], "no model is named 'nothing_like_it'"),
    (['test_resnet', '-o', 'nowhere/m.onnx'], 'there is no folder nowhere'),
    (['test_resnet', '-o', '.'], '. is a folder'),
    (['test_resnet', '-o', 'taken.onnx'], 'taken.onnx exists'),
])
def test_what_cannot_be_exported_is_refused_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken.onnx').write_text('old')
    assert main(['export', *arguments, '--format', 'onnx']) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_a_file_with_other_outputs_does_not_take_its_place(tmp_path, monkeypatch):
    class Drifting(torch.nn.Linear):
        """What is traced isn't what runs later."""

        def forward(self, x):
            return super().forward(x) * (1 if torch.compiler.is_compiling() else 1.01)

    (tmp_path / 'm.pt2').write_text('old')
    with pytest.raises(PruningError, match=r'outputs are up to \S+ off'):
        export.export_model(Drifting(4, 4), tmp_path / 'm.pt2', 'pt2', torch.randn(2, 4))
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(PruningError, match=r'onnxruntime.*pip install timm-epfs\[export\]'):
        export.export_model(torch.nn.Linear(4, 4), tmp_path / 'm.onnx', 'onnx', torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_batches_of_any_size_that_a_model_cannot_take(tmp_path):
    class Pair(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(2, 4))

    with pytest.raises(PruningError, match='leave --dynamic-batch out'):
        export.export_model(Pair(4, 4), tmp_path / 'm.pt2', 'pt2', torch.randn(2, 4), dynamic_batch=True)
    assert not list(tmp_path.iterdir())
