"""The trainer: one command from a dense model to a pruned one, that survives being killed."""
import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.task import ClassificationTask
from torch import nn

from timm_epfs import measure
from timm_epfs.cli import main
from timm_epfs.errors import PruningError
from timm_epfs.training import run as run_module
from timm_epfs.training.checkpoints import Checkpoints
from timm_epfs.training.data import Digits
from timm_epfs.training.stage import Stage

# Small enough for five updates an epoch in half a second.
DIGITS = ['train', 'resnet20_cifar', '--dataset', 'digits', '--img-size', '8', '-b', '256', '--macs', '0.5']
ONE_SHOT = [*DIGITS, '--method', 'none', '--epochs', '2', '--dense-epochs', '1']


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Latency is measured, but not for long."""
    monkeypatch.setattr(run_module, 'latencies', lambda models, image: measure.latencies(models, image, seconds=0.05))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of two colours, 12 to train and 4 to evaluate on."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in (('train', 6), ('validation', 2)):
        for label, colour in (('dark', 60), ('light', 190)):
            (root / split / label).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(colour - 40, colour + 40, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i}.png')
    return root


def train(output, *arguments, base=ONE_SHOT):
    return main([*base, '-o', str(output), *map(str, arguments)])


def history(output):
    with open(output / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def weights(output, name='pruned/model.safetensors'):
    return safetensors.torch.load_file(output / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_digits_are_split_without_overlap_and_by_class():
    parts = [Digits(split) for split in ('train', 'validation')]
    assert [len(part) for part in parts] == [1437, 360]
    seen = [{part.pixels[i].tobytes() for i in range(len(part))} for part in parts]
    assert not seen[0] & seen[1]
    shares = [np.bincount(part.targets) / len(part) for part in parts]
    assert np.abs(shares[0] - shares[1]).max() < 0.005
    image, target = parts[0][0]
    assert image.size == (8, 8) and image.mode == 'RGB' and image.getextrema()[0] == (0, 255) and target in range(10)


def test_one_run_leaves_a_model_and_tells_what_it_did(tmp_path, capsys):
    assert train(tmp_path / 'run') == 0
    out, _ = capsys.readouterr()
    rows = history(tmp_path / 'run')
    assert [row['phase'] for row in rows] == ['dense', 'cut', 'finetune']
    assert [row['epoch'] for row in rows] == ['1', '1', '2']
    assert [float(row['alive']) for row in rows] == pytest.approx([1, 0.5, 0.5], abs=0.01)

    slim = timm.create_model(f'local-dir:{tmp_path / "run" / "pruned"}', pretrained=True)
    assert slim.pretrained_cfg['input_size'] == (3, 8, 8)
    table = dict(re.findall(r'^(\S.*?)  +(.*)$', out, flags=re.M))
    assert float(table['top-1, %'].split()[1]) == pytest.approx(float(rows[-1]['eval_top1']), abs=0.005)
    saved = Checkpoints(tmp_path / 'run' / 'checkpoints').load()
    assert same(saved['state_dict'], slim.state_dict())

    dense = timm.create_model('resnet20_cifar')
    dense.load_state_dict(weights(tmp_path / 'run', 'dense.safetensors'))
    report = (tmp_path / 'run' / 'report.md').read_text()
    for cut in slim.pruning_plan.cuts:
        assert f'| {cut.structure.name} | {cut.structure.kind} | {cut.structure.units} | {len(cut.keep)} |' in report
    pictures = re.findall(r'\((pictures/.*?)\)', report)
    assert pictures == ['pictures/accuracy.png', 'pictures/layers.png']
    assert all(Image.open(tmp_path / 'run' / name).size[0] > 400 for name in pictures)


def test_report_does_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.backends.backend_agg', None)
    assert train(tmp_path / 'run') == 0
    report = (tmp_path / 'run' / 'report.md').read_text()
    assert 'matplotlib' in report and 'pictures/' not in report


@pytest.mark.parametrize('method', ['epfs', 'sss', 'sfp', 'bn_sfp'])
def test_every_method_ends_on_its_budget_and_cuts_what_it_masked(tmp_path, method):
    arguments = ['--method', method, '--epochs', '3', '--dense-epochs', '1', '--sparse-epochs', '2']
    assert train(tmp_path / 'run', *arguments, base=DIGITS) == 0
    rows = history(tmp_path / 'run')
    assert [row['phase'] for row in rows] == ['dense', 'sparse', 'sparse', 'cut']
    masked, cut = rows[-2:]
    assert float(cut['alive']) == pytest.approx(0.5, abs=0.01)
    assert float(cut['eval_loss']) == pytest.approx(float(masked['eval_loss']), rel=1e-4)
    assert 'masks.png' in (tmp_path / 'run' / 'report.md').read_text()


def test_main_job_learns_the_digits(tmp_path):
    arguments = ['train', 'resnet20_cifar', '--dataset', 'digits', '--macs', '0.5', '--img-size', '8', '--epochs', '12']
    assert train(tmp_path / 'run', base=arguments) == 0
    rows = history(tmp_path / 'run')
    dense = [float(row['eval_top1']) for row in rows if row['phase'] == 'dense'][-1]
    assert dense > 90 and float(rows[-1]['eval_top1']) > dense - 3


KILLED = [
    *DIGITS, '--epochs', '6', '--dense-epochs', '2', '--sparse-epochs', '2', '--model-ema', '--model-ema-decay', '0.7',
    '--distill', '--method', 'epfs',
]


def _die(arguments, updates, while_saving):
    """Run until so many updates are done or checkpoints begun, and die by SIGKILL."""
    torch.set_num_threads(1)
    owner, name = (run_module, '_no') if not while_saving else (run_module, '_no')
    del owner, name
    left = [updates]

    def then_die(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped

    if while_saving:
        safetensors.torch.save = then_die(safetensors.torch.save)
    else:
        Stage._after_update = then_die(Stage._after_update)
    main(arguments)


def kill(arguments, updates, while_saving=False):
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_epfs.cli', 'timm_epfs.training.run', 'sklearn.model_selection'])
    process = context.Process(target=_die, args=(arguments, updates, while_saving))
    process.start()
    process.join()
    return process.exitcode
