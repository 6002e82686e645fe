"""The trainer: one command from a dense model to a pruned one, that survives being killed."""
import csv
import doctest
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import sklearn.datasets
import timm
import torch
from helpers import forkserver
from PIL import Image
from sklearn.datasets import load_digits
from timm.task import ClassificationTask
from torch import nn

from timm_epfs.cli import main, parse_args
from timm_epfs.core import PruningError
from timm_epfs.latency import clock
from timm_epfs.training import checkpoints
from timm_epfs.training import run as run_module
from timm_epfs.training.checkpoints import Checkpoints
from timm_epfs.training.data import Digits
from timm_epfs.training.options import check_options
from timm_epfs.training.phase import Phase
from timm_epfs.training.summary import claim_folder

# Small enough for five updates per epoch in half a second.
DIGITS = ['train', 'resnet20_cifar', '--dataset', 'digits', '--img-size', '8', '-b', '64', '--macs', '0.5']
ONE_SHOT = [*DIGITS, '--method', 'none', '--epochs', '2', '--dense-epochs', '1']


def few_digits(**options):
    return [part[:400] for part in load_digits(**options)]


@pytest.fixture
def all_digits():
    """For a test that learns something."""


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Latency is measured, but not for long, and some of the digits are enough."""
    if 'all_digits' not in request.fixturenames:
        monkeypatch.setattr(sklearn.datasets, 'load_digits', few_digits)
    monkeypatch.setattr(run_module, 'latencies', lambda models, image: clock.latencies(models, image, seconds=0.05))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of two colours, 12 to train and 5 to evaluate on."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, number in (('train', 6), ('validation', 2)):
        for label, colour in (('dark', 60), ('light', 190)):
            (root / split / label).mkdir(parents=True)
            for i in range(number + (label == 'dark' and split == 'validation')):
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


def test_digits_are_split_without_overlap_and_by_class(all_digits):
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


@pytest.mark.parametrize('method, options', [
    ('epfs', []), ('epfs', ['--widths', 'sensitivity']), ('sss', []), ('sfp', []), ('bn_sfp', [])])
def test_every_method_ends_on_its_budget_and_cuts_what_it_masked(tmp_path, method, options):
    arguments = ['--method', method, *options, '--epochs', '3', '--dense-epochs', '1', '--sparse-epochs', '2']
    assert train(tmp_path / 'run', *arguments, base=DIGITS) == 0
    rows = history(tmp_path / 'run')
    assert [row['phase'] for row in rows] == ['dense', 'sparse', 'sparse', 'cut']
    masked, cut = rows[-2:]
    assert float(cut['alive']) == pytest.approx(0.5, abs=0.01)
    assert float(cut['eval_loss']) == pytest.approx(float(masked['eval_loss']), rel=1e-4)
    assert 'masks.png' in (tmp_path / 'run' / 'report.md').read_text()


def test_main_job_learns_the_digits(tmp_path, all_digits):
    arguments = ['train', 'resnet20_cifar', '--dataset', 'digits', '--macs', '0.5', '--img-size', '8', '--epochs', '9']
    assert train(tmp_path / 'run', base=arguments) == 0
    rows = history(tmp_path / 'run')
    dense = [float(row['eval_top1']) for row in rows if row['phase'] == 'dense'][-1]
    assert dense > 90 and float(rows[-1]['eval_top1']) > dense - 3


KILLED = [
    *DIGITS, '--epochs', '6', '--dense-epochs', '2', '--sparse-epochs', '2', '--model-ema', '--model-ema-decay', '0.7',
    '--distill', '--method', 'epfs',
]


def _die(arguments, updates, checkpoint):
    """Run, and die by SIGKILL at an update, or just before a file gets its name."""
    torch.set_num_threads(1)
    done, plain_update, plain_write = [0], Phase._after_update, checkpoints.write_whole

    def update(stage):
        done[0] += 1
        if done[0] == updates:
            os.kill(os.getpid(), signal.SIGKILL)
        plain_update(stage)

    def write(path, function):
        def then_die(part):
            function(part)
            if path.name == checkpoint:
                os.kill(os.getpid(), signal.SIGKILL)
        plain_write(path, then_die)

    Phase._after_update, checkpoints.write_whole, sklearn.datasets.load_digits = update, write, few_digits
    sys.exit(main(arguments))


def run_apart(arguments, updates=None, checkpoint=None):
    """Exit code of a run in a process of its own."""
    process = forkserver().Process(target=_die, args=(arguments, updates, checkpoint))
    process.start()
    process.join()
    return process.exitcode


def test_killed_in_any_phase_and_resumed_gives_the_same_model(tmp_path):
    whole, killed = ([*KILLED, '-o', str(tmp_path / name)] for name in ('whole', 'killed'))
    assert run_apart(whole) == 0
    for updates, checkpoint, left in (
            (3, None, []),                 # in the first epoch: nothing is saved yet
            (8, None, [1]),                # dense
            (9, None, [1, 2]),             # sparse
            (None, '00004.json', [2, 3]),  # while the end of the sparse phase is being saved
            (8, None, [3, 4]),             # fine-tuning
    ):
        assert run_apart([*killed, '--resume'], updates, checkpoint) == -signal.SIGKILL
        found = [int(path.stem) for path in (tmp_path / 'killed' / 'checkpoints').glob('*.json')]
        assert sorted(found) == left
    assert run_apart([*killed, '--resume']) == 0
    for name in ('pruned/model.safetensors', 'pruned/config.json', 'dense.safetensors', 'summary.csv'):
        assert (tmp_path / 'killed' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name
    assert not list((tmp_path / 'killed').rglob('.*'))


def test_cut_in_steps_stopped_at_each_and_resumed_gives_the_same_model(tmp_path, monkeypatch):
    class Stopped(BaseException):
        pass

    arguments = ['--cut-steps', '3', '--epochs', '4', '--opt', 'adamw', '--model-ema', '--model-ema-decay', '0.7']
    assert train(tmp_path / 'whole', *arguments) == 0
    plain_update = Phase._after_update
    for number, left in ((13, [1, 2]), (6, [2, 3])):  # after the second cut and after the third
        updates = iter(range(number - 1))

        def update(phase, updates=updates):
            plain_update(phase)
            if next(updates, None) is None:
                raise Stopped

        monkeypatch.setattr(Phase, '_after_update', update)
        with pytest.raises(Stopped):
            train(tmp_path / 'stopped', *arguments, '--resume')
        found = [int(path.stem) for path in (tmp_path / 'stopped' / 'checkpoints').glob('*.json')]
        assert sorted(found) == left
    monkeypatch.setattr(Phase, '_after_update', plain_update)
    assert train(tmp_path / 'stopped', *arguments, '--resume') == 0
    for name in ('pruned/model.safetensors', 'pruned/config.json', 'summary.csv'):
        assert (tmp_path / 'stopped' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name

    rows = history(tmp_path / 'whole')
    assert [row['phase'] for row in rows] == ['dense', *['cut', 'finetune'] * 3]
    cubic = [0.5 + 0.5 * (1 - step / 3) ** 3 for step in (1, 2, 3)]  # Zhu and Gupta, equation 1
    assert [float(row['alive']) for row in rows if row['phase'] == 'cut'] == pytest.approx(cubic, abs=0.01)
    slim = timm.create_model(f'local-dir:{tmp_path / "whole" / "pruned"}', pretrained=True)
    assert len(slim.pruning_plan.recipe['steps']) == 3


def test_where_weights_are_from_is_not_forgotten_by_resuming(tmp_path, monkeypatch):
    dense, arguments = timm.create_model('test_resnet').state_dict(), ['--num-classes', '10', '--pretrained']
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *args, **kwargs: dict(dense))
    base = ['train', 'test_resnet', *ONE_SHOT[2:], *arguments]
    assert train(tmp_path / 'run', base=base) == 0
    config = (tmp_path / 'run' / 'pruned' / 'config.json').read_text()
    assert 'timm/test_resnet.r160_in1k' in config
    assert train(tmp_path / 'run', '--resume', base=base) == 0
    assert (tmp_path / 'run' / 'pruned' / 'config.json').read_text() == config


def test_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, capsys):
    assert train(tmp_path / 'run') == 0
    expected = weights(tmp_path / 'run')
    newest = tmp_path / 'run' / 'checkpoints' / '00002.safetensors'
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    assert train(tmp_path / 'run', '--resume') == 0
    err = capsys.readouterr().err
    assert '00002.json is refused, the checksum of 00002.safetensors is wrong; using the one before' in err
    assert 'epoch 2/2 finetune' in err and 'epoch 1/2 dense' not in err
    assert same(weights(tmp_path / 'run'), expected)

    for path in newest.parent.glob('*.json'):
        path.write_text(path.read_text()[:100])
    assert train(tmp_path / 'run', '--resume') == 2
    assert error(capsys) == f'--resume: all 2 checkpoints in {newest.parent} are damaged; start again with --overwrite'


def test_a_cut_is_compensated_before_fine_tuning_if_asked(tmp_path):
    recipes, changes = {}, {}
    for name, options in {'plain': (), 'compensated': ('--compensate',)}.items():
        assert train(tmp_path / name, *options) == 0
        slim = timm.create_model(f'local-dir:{tmp_path / name / "pruned"}', pretrained=True)
        recipes[name] = slim.pruning_plan.recipe
        losses = {row['phase']: float(row['eval_loss']) for row in history(tmp_path / name)}
        changes[name] = abs(losses['cut'] - losses['dense'])
    assert recipes['plain']['criterion'] == 'l2' and 'compensated' not in recipes['plain']
    assert recipes['compensated']['compensated']['images'] > 100
    assert changes['compensated'] < 0.5 * changes['plain']


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('timm-epfs: error: ')]
    assert len(lines) == 1
    return lines[0].removeprefix('timm-epfs: error: ')


STATE = {
    'optimizer': {'state': {0: {'step': torch.tensor(3.), 'none': None}, 1: {}}, 'betas': (0.9, 0.999)},
    'half': torch.randn(3, 2).bfloat16(), 'ints': torch.arange(4), 'scalar': np.float64(0.1), 'array': np.eye(2),
    'text': 'λ', 'flag': True, 'big': 1e300, 'third': 1 / 3, 'inf': float('inf'), 'list': [1, [2.5, ()]],
}


def test_checkpoint_gives_back_what_was_saved(tmp_path):
    assert doctest.testmod(checkpoints).failed == 0
    saved = Checkpoints(tmp_path)
    shared = torch.arange(6.)
    saved.save({**STATE, 'part': shared[:3], 'all': shared}, 1)
    found = saved.load()
    assert found['optimizer']['state'][0]['step'] == 3 and found['optimizer']['state'][1] == {}
    assert found['optimizer']['betas'] == (0.9, 0.999) and found['list'] == [1, [2.5, ()]]
    for name in ('text', 'flag', 'big', 'third', 'inf', 'scalar'):
        assert found[name] == STATE[name] and type(found[name]) in (str, bool, float)
    assert found['half'].dtype == torch.bfloat16 and torch.equal(found['half'], STATE['half'])
    assert torch.equal(found['part'], shared[:3]) and np.array_equal(found['array'], np.eye(2))


def test_last_checkpoints_are_kept(tmp_path):
    saved = Checkpoints(tmp_path / 'new', keep=2)
    assert saved.load() is None
    for number in (8, 9, 10):
        saved.save({'number': number}, number)
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == [
        '00009.json', '00009.safetensors', '00010.json', '00010.safetensors']
    assert saved.load() == {'number': 10}


@pytest.fixture
def two(tmp_path):
    """Two checkpoints."""
    saved = Checkpoints(tmp_path)
    for number in (1, 2):
        saved.save({'number': number, 'weights': torch.full((50,), float(number))}, number)
    return saved


@pytest.mark.parametrize('name', ['00002.json', '00002.safetensors'])
@pytest.mark.parametrize('where', [0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize('damage', ['cut', 'flip'])
def test_no_damage_goes_unseen(two, tmp_path, name, where, damage):
    data = bytearray((tmp_path / name).read_bytes())
    at = int(where * len(data))
    data[at] ^= 1
    (tmp_path / name).write_bytes(data[:at] if damage == 'cut' else data)
    with pytest.warns(UserWarning, match='00002.json is refused'):
        assert two.load()['number'] == 1


@pytest.mark.parametrize('name, refused', [('00002.safetensors', True), ('00002.json', False)])
def test_where_a_file_is_gone_the_checkpoint_before_is_used(two, tmp_path, name, refused):
    """Without its .json, which is written last, it never was one."""
    (tmp_path / name).unlink()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert two.load()['number'] == 1
    assert ['00002.json is refused' in str(warning.message) for warning in said] == [True] * refused


def test_loss_that_is_no_number_stops_the_run_and_leaves_a_good_checkpoint(tmp_path, capsys):
    arguments = ['--epochs', '3', '--warmup-epochs', '0']
    assert train(tmp_path / 'run', *arguments, '--finetune-lr', '1e30') == 2
    assert re.match(r'the loss of step [1-3] of the finetune phase is NaN or infinite', error(capsys))
    saved = Checkpoints(tmp_path / 'run' / 'checkpoints').load()
    assert (saved['phase'], saved['epoch']) == ('dense', 1)
    assert all(tensor.isfinite().all() for tensor in saved['state_dict'].values())
    assert train(tmp_path / 'run', *arguments, '--finetune-lr', '0.01', '--resume') == 0


def test_folder_of_a_run_is_not_lost_by_mistake(tmp_path, capsys):
    run = tmp_path / 'run'
    assert train(run) == 0
    before = (run / 'summary.csv').read_bytes()
    assert train(run) == 2 and '--resume' in error(capsys)
    assert train(run, '--resume', '--macs', '0.4') == 2
    assert error(capsys).startswith(f'--resume: the run in {run} was started with macs 0.5, now it is 0.4')
    assert train(run, '--resume') == 0 and (run / 'summary.csv').read_bytes() == before
    (run / 'thesis.tex').touch()
    assert train(run, '--overwrite') == 2 and "holds 'thesis.tex'" in error(capsys)
    (run / 'thesis.tex').unlink()
    assert train(run, '--overwrite', '--seed', '1') == 0 and (run / 'summary.csv').read_bytes() != before


@pytest.mark.parametrize('options', [None, '{"lr": 0.1}', '[]', 'not JSON'])
@pytest.mark.parametrize('flag', [None, '--overwrite', '--resume'])
def test_a_folder_of_the_users_that_looks_like_a_run_is_left_alone(tmp_path, capsys, options, flag):
    """Only the options that a run writes first, and deletes last, make a folder a run's."""
    work = tmp_path / 'work'
    for name in ('checkpoints/00001.json', 'checkpoints/.cache.tmp', 'pictures/cat.png', '.notes.tmp'):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    if options:
        (work / 'args.json').write_text(options)
    before = {path: path.read_text() for path in work.rglob('*') if path.is_file()}
    assert train(work, *([flag] if flag else [])) == 2
    assert re.search(r"holds '(args.json|checkpoints)', which is not part of a run; name another folder", error(capsys))
    assert {path: path.read_text() for path in work.rglob('*') if path.is_file()} == before


def test_an_overwrite_that_is_killed_leaves_a_folder_that_is_still_a_run(tmp_path, monkeypatch):
    for name in ('pruned/config.json', 'summary.csv', 'args.json'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"epochs_by_phase": {}}')

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt):
            claim_folder(tmp_path, resume=False, overwrite=True)
    claim_folder(tmp_path, resume=False, overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('arguments, message', [
    (['--data-dir', 'x'], '--dataset digits needs no folder, --data-dir x was given; drop it'),
    (['--dataset', ''], 'train needs images, no --data-dir was given; give it, or --dataset digits for a first try'),
    (['--sparse-epochs', '1'], '--method none has no sparse phase, --sparse-epochs 1 was given; drop it'),
    (['--method-kwargs', 'l1=1'], 'unknown keyword l1=; known are criterion, floor'),
    (['--method-kwargs', 'exlude=conv1'], 'unknown keyword exlude=; did you mean exclude=?'),
    (['--method-kwargs', 'macs=0.3'], "--method none can't cut"),
    (['--method-kwargs', 'scope=magic'], "'magic'"),
    (['--method', 'epfs', '--cut-steps', '2'], '--cut-steps 2 needs --method none, --method is epfs'),
    (['--cut-steps', '2'], '--cut-steps 2 needs as many epochs of fine-tuning, there are 1'),
    (['--method', 'epfs', '--criterion', 'l1'], '--criterion needs --method none, --method is epfs'),
    (['--method', 'epfs', '--compensate'], '--compensate is for cuts that nothing was learned for, --method is epfs'),
    (['--method', 'epfs', '--sparse-epochs', '0'], '--method epfs learns in the sparse phase, which has 0 epochs'),
    (['--dense-epochs', '3'], '3 dense and 0 sparse epochs were asked for, --epochs is 2 for all phases'),
    (['--method', 'epfs', '--sparse-epochs', '1', '--method-kwargs', 'centre=1'], 'did you mean center=?'),
    (['--macs', '0.0001'], 'the largest possible cut leaves'),
    (['--method', 'epfs', '--sparse-epochs', '1', '--macs', '0.0001'], 'the largest possible cut leaves'),
    (['--criterion', 'magic'], 'magic'),
    (['--macs', '-1'], 'macs=-1.0 was given; give a share between 0 and 1'),
    (['--resume', '--overwrite'], '--resume and --overwrite were both given'),
    (['--pretrained', '--checkpoint', 'a.safetensors'], '--pretrained and --checkpoint were both given'),
    (['--checkpoint', 'a.pth'], 'checkpoint a.pth is not a .safetensors file, the only format that is read'),
    (['--amp', '--amp-dtype', 'float16'], '--amp-dtype float16 has no fast kernels on cpu'),
    (['--device', 'nowhere'], "device 'nowhere' can't be used"),
    (['--opt', 'newton'], "optimizer 'newton' with schedule 'cosine' can't be set up"),
    (['-b', '2000'], 'data: each process has 320 training images, less than one batch of 2000'),
    (['--num-classes', '9'], "data: split 'train' of digits has 10 classes, the model has 9"),
    (['--num-classes', '0'], 'train needs a classifier, ResNetCifar has none and returns shape (1, 64)'),
    (['--in-chans', '4'], 'train reads images of 1 or 3 channels, the model takes 4'),
])
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, capsys, arguments, message):
    assert train(tmp_path / 'run', *arguments) == 2
    assert message in error(capsys)
    assert not (tmp_path / 'run' / 'summary.csv').exists()  # before any training


@pytest.mark.parametrize('capability, slow', [('AVX2', True), ('AVX512', False)])
def test_bfloat16_on_a_processor_without_it_is_warned_of(tmp_path, monkeypatch, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        check_options(parse_args([*ONE_SHOT, '--output', str(tmp_path), '--amp']))
    assert ['without AVX-512' in str(warning.message) for warning in said] == [True] * slow


def test_data_that_can_not_be_used_is_refused_in_one_line(tmp_path, folder, capsys, monkeypatch):
    base = ['train', 'resnet20_cifar', '--macs', '0.5', '--method', 'none', '--img-size', '8', '-b', '4', '-j', '0',
            '--epochs', '1', '--dense-epochs', '1', '--data-dir']
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    (tmp_path / 'empty' / 'validation').mkdir()
    assert train(tmp_path / 'run', base=[*base, str(tmp_path / 'empty')]) == 2
    assert "no images of split 'train'" in error(capsys)
    assert train(tmp_path / 'run', '--num-classes', '1', '--overwrite', base=[*base, str(folder)]) == 2
    assert 'has 2 classes, the model has 1; give --num-classes 2' in error(capsys)

    monkeypatch.setattr(Digits, 'classes', ())  # a dataset that doesn't say
    assert train(tmp_path / 'run', '--num-classes', '9', '--overwrite') == 2
    assert error(capsys) == 'data: an image has label 9, the model has 9 classes; give --num-classes'


def test_everything_at_once_on_a_folder_of_images(tmp_path, folder):
    arguments = [
        'train', 'resnet20_cifar', '--data-dir', str(folder), '--num-classes', '2', '--in-chans', '1',
        '--img-size', '8', '-b', '4', '-j', '1', '--macs', '0.6', '--epochs', '3', '--dense-epochs', '1',
        '--sparse-epochs', '1', '--amp', '--channels-last', '--model-ema', '--distill', '--grad-accum-steps', '2',
        '--mixup', '0.2', '--smoothing', '0.1', '--clip-grad', '1', '--opt', 'adamw', '--lr', '0.001', '--hflip', '0.5',
    ]
    assert train(tmp_path / 'run', base=arguments) == 0
    slim = timm.create_model(f'local-dir:{tmp_path / "run" / "pruned"}', pretrained=True)
    assert slim(torch.randn(2, 1, 8, 8)).shape == (2, 2)
    assert [row['phase'] for row in history(tmp_path / 'run')] == ['dense', 'sparse', 'cut', 'finetune']


def options(**changes):
    return Namespace(**{**dict(
        device='cpu', distributed=False, amp=False, channels_last=False, torchcompile=None, model_ema=False,
        grad_accum_steps=1, clip_grad=None, clip_mode='norm', opt='sgd', lr=0.1, sched='cosine', min_lr=0.0,
        weight_decay=0.0, momentum=0.9, opt_kwargs={}, warmup_epochs=0, warmup_lr=0.0, seed=0,
    ), **changes})


def test_accumulated_batches_are_one_large_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, target = torch.randn(22, 3, 2, 2), torch.randint(3, (22,))
    ends = []
    for every, size in ((1, 8), (4, 2)):  # 22 = 8 + 8 + 6: the last group is a smaller one
        model.load_state_dict(start)
        stage = Phase(options(grad_accum_steps=every), 'dense', ClassificationTask(model, verbose=False), 1, 3)
        stage.train(list(zip(images.split(size), target.split(size))), lambda steps, values: None)
        assert stage.done == 3
        ends.append(model[1].weight.detach().clone())
    assert torch.allclose(*ends, atol=1e-6) and not torch.allclose(ends[0], start['1.weight'], atol=1e-3)


@pytest.mark.parametrize('asked, said', [
    (['--macs', '0.5', '--criterion', 'taylor'], '--criterion taylor scores units on data'),
    (['--latency', '0.5'], '--latency with --method none measures time'),
    (['--macs', '0.5', '--method-kwargs', "round_to='auto'"], '--round-to auto with --method none measures time'),
])
def test_what_processes_would_not_agree_about_is_refused(tmp_path, monkeypatch, asked, said):
    monkeypatch.setattr(run_module.Run, '_wait', lambda self: None)
    args = parse_args([
        'train', 'resnet20_cifar', '--dataset', 'digits', '--method', 'none', '-o', str(tmp_path), *asked])
    check_options(args)
    args.rank, args.distributed = 1, True
    with pytest.raises(PruningError, match=f'^{said}, and each process would get .* run it in one process$'):
        run_module.Run(args, {})


def test_two_processes_evaluate_each_image_once(tmp_path, folder):
    """Of five images two processes read three each; the sixth is read twice and counts once."""
    arguments = [
        'train', 'resnet20_cifar', '--data-dir', str(folder), '--num-classes', '2', '--img-size', '16', '-b', '3',
        '-vb', '2', '-j', '0', '--macs', '0.6', '--epochs', '3', '--dense-epochs', '1', '--sparse-epochs', '1',
        '-o', str(tmp_path / 'run'),
    ]
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'timm_epfs',
         *arguments],
        check=True, capture_output=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])},
    )
    rows = history(tmp_path / 'run')
    assert [row['phase'] for row in rows] == ['dense', 'sparse', 'cut', 'finetune']
    assert float(rows[2]['eval_loss']) == pytest.approx(float(rows[1]['eval_loss']), rel=1e-4)

    slim = timm.create_model(f'local-dir:{tmp_path / "run" / "pruned"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=slim))
    paths = sorted((folder / 'validation').rglob('*.png'))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        target = torch.tensor([int(path.parent.name == 'light') for path in paths])
        loss = nn.functional.cross_entropy(slim(images), target)
    assert len(paths) == 5 and float(rows[-1]['eval_loss']) == pytest.approx(float(loss), rel=1e-3)
