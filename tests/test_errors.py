"""Every bad input gets one clear line, and leaves nothing half-written."""
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from timm_epfs.cli import main
from timm_epfs.core import PruningError
from timm_epfs.plan import FORMAT, Plan
from timm_epfs.pruner import prune
from timm_epfs.surgery import apply_plan, rebuild, slice_checkpoint
from timm_epfs.zoo import save_pretrained
from timm_epfs.zoo import saving as hub


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        raise RuntimeError('this model is broken\nin two lines')


class Untraceable(nn.Module):
    """Its forward asks for numbers, and fails on them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        raise ValueError(f'{x.sum().item():.0f} is wrong')


class Spectrum(nn.Module):
    """All that could be cut goes through an operation that no rule covers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.head(torch.histc(self.conv(x).flatten(), 8).view(1, 8, 1, 1) * self.conv(x))


IMAGE, LABEL = torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)


def call(message, **arguments):
    return arguments, message


BAD_CALLS = {
    'unknown name': call("'resnet5o'; nearest: resnet50", model='resnet5o', macs=0.5),
    'unknown torchvision name': call('nearest: torchvision/resnet18', model='torchvision/resnet19', macs=0.5),
    'name like nothing': call("give a timm name or 'torchvision/<name>'", model='§§§', macs=0.5),
    'no model': call('NoneType was given', model=None, macs=0.5),
    'no such folder': call("nowhere/at/all can't be loaded", model='local-dir:nowhere/at/all', macs=0.5),
    'unknown argument': call('colour', model='test_resnet', macs=0.5, colour=1),
    'arguments for a module': call('num_classes=', model=nn.Linear(2, 2), macs=0.5, num_classes=1),
    'no weights known': call('No pretrained weights', model='resnet20_cifar', macs=0.5, pretrained=True),
    'a keyword of the model misspelt': call('num_clases= .* did you mean num_classes=', num_clases=10, macs=0.5),
    'weights for a module': call('pretrained=True was given with a module', model=nn.Linear(2, 2), pretrained=True),
    'target 0': call('macs=0 was given; give a share between 0 and 1', macs=0),
    'target below 0': call('params=-0.5 was given', params=-0.5),
    'target 1': call('macs=1 was given, the dense model has', macs=1),
    'target above the model': call(r'params=1000000000000.0 was given, the dense model has', params=1e12),
    'target not a number': call('macs=nan was given', macs=float('nan')),
    'target as text': call("macs='0.5' was given", macs='0.5'),
    'target as a percentage': call(r'macs=50 was given, a count of 50 MACs, the dense model has \S+ M;', macs=50),
    'target as another percentage': call('params=1.5 was given, a count of 1.5 parameters', params=1.5),
    'target out of reach': call(r'asked for 0\.0 % of the MACs.* cut leaves \d+\.\d %', macs=1e-4),
    'target out of reach under a floor': call(r'cut leaves \d\d\.\d %', params=0.3, floor=0.9),
    'two budgets': call('macs= and params= were given; a cut has one budget', macs=0.5, params=0.5),
    'no budget': call('no budget was given; give one of macs='),
    'unknown criterion': call("unknown criterion 'l3'", macs=0.5, criterion='l3'),
    'criterion without its data': call("'taylor' needs data, found none", macs=0.5, criterion='taylor'),
    'criterion with empty data': call('found no batch', macs=0.5, criterion='obdc', data=[]),
    'criterion with data that was read': call('can be read only once', macs=0.5, criterion='obdc', data=iter([])),
    'criterion with other channels': call(
        "'taylor' fails on its data; .* RuntimeError", macs=0.5, criterion='taylor', data=[(IMAGE[:, :2], LABEL)]),
    'criterion with other labels': call(
        "'taylor' fails on its data; .* IndexError", macs=0.5, criterion='taylor', data=[(IMAGE, LABEL + 1000)]),
    'criterion with images alone': call(r'needs batches of \(images, ta', macs=0.5, criterion='taylor', data=[IMAGE]),
    'exclude of nothing': call("exclude: nothing that can be cut is named 'nowhere'", macs=0.5, exclude=['nowhere']),
    'exclude of a misspelt name': call("'layr1'; did you mean 'layer1'", macs=0.5, exclude=['layr1']),
    'only of nothing': call("only: nothing that can be cut is named 'nowhere\\*'", macs=0.5, only=['nowhere*']),
    'exclude as text': call("exclude=\\['conv1'\\]", macs=0.5, exclude='conv1'),
    'exclude of a misspelt module': call("'layer1.'; did you mean 'layer1'\\?", macs=0.5, exclude=['layer1.']),
    'exclude of the logits': call("outputs of 'fc' are never cut, only what it reads", macs=0.5, exclude=['fc']),
    'exclude of a normalisation': call("outputs of 'bn1' follow those of 'conv1", macs=0.5, exclude=['bn1']),
    'exclude of a module': call(r"holds an object of type Linear; give a", macs=0.5, exclude=[nn.Linear(1, 1)]),
    'exclude of a number': call('exclude= holds an object of type int', macs=0.5, exclude=3),
    'only of nothing at all': call(r'only=\[\] was given, which leaves nothing to cut', macs=0.5, only=[]),
    'ratios of what is excluded': call(
        "ratios: 'layer1' matches only .*, which stay uncut", macs=0.5, exclude=['layer1'], ratios={'layer1': 0.5}),
    'ratios as a number': call(r"ratios=0\.25 was given; give a dict", macs=0.5, ratios=0.25),
    'ratios as a list': call(r"ratios=\[0\.25\] was given; give a dict", macs=0.5, ratios=[0.25]),
    'seed as text': call("seed='a' was given; give an integer", macs=0.5, seed='a'),
    'streams as text': call("streams='yes' was given; give True, False, or None", macs=0.5, streams='yes'),
    'exclude of everything': call('nothing is left to cut', macs=0.5, exclude=['*']),
    'ratios of nothing': call("ratios: nothing that can be cut is named 'nowhere'", macs=0.5, ratios={'nowhere': 0.5}),
    'unknown scope': call("scope='cosmic'", macs=0.5, scope='cosmic'),
    'rounding to 0': call("round_to=0 was given; give a positive integer, 'auto' or None", macs=0.5, round_to=0),
    'unknown kind': call("'colours'; choose from", macs=0.5, kinds=['colours']),
    'misspelt kind': call("'chanels'; did you mean 'channels'", macs=0.5, kinds=['chanels']),
    'kinds as text': call(r"give a list, as in kinds=\['filters'\]", macs=0.5, kinds='filters'),
    'input unknown': call('give example_input=', model=Failing(), macs=0.5),
    'failing forward': call('forward fails .* this model is broken', model=Failing(), macs=0.5, example_input=IMAGE),
    'a shape as input': call(r'=\(1, 3, 16, 16\) holds no tensor; give a', macs=0.5, example_input=(1, 3, 16, 16)),
    'a number as input': call('example_input=32 holds no tensor', macs=0.5, example_input=32),
    'wrong input': call(r'forward fails on \(1, 2, 16, 16\)', macs=0.5, example_input=IMAGE[:, :2]),
    'untraceable': call(
        r'forward fails on .*test_errors.py:\d+: ValueError: .* is wrong', model=Untraceable(), macs=0.5,
        example_input=IMAGE),
    'operation without a rule': call('nothing is left .* histc', model=Spectrum(), macs=0.5, example_input=IMAGE),
    'nothing to cut': call('nothing is left to cut', model=nn.Linear(16, 4), macs=0.5, example_input=IMAGE[0]),
}


@pytest.fixture(scope='module')
def dense():
    torch.manual_seed(0)
    return timm.create_model('test_resnet').eval()


@pytest.fixture(scope='module')
def slim(dense):
    return prune(dense, macs=0.7)


@pytest.fixture
def plan(slim):
    """A plan's JSON values, to spoil."""
    return slim.pruning_plan.to_dict()


def line(error):
    """The message, which is one line."""
    text = str(error.value)
    assert text and len(text.splitlines()) == 1 and '\\n' not in text
    return text


@pytest.mark.parametrize('case', BAD_CALLS)
def test_bad_calls(case):
    arguments, message = BAD_CALLS[case]
    with pytest.raises(PruningError, match=message) as e:
        prune(**{'model': 'test_resnet', **arguments})
    line(e)


@pytest.mark.parametrize('work', [
    rebuild, lambda plan: slice_checkpoint({}, plan), lambda plan: apply_plan(nn.Linear(2, 2), plan)])
def test_what_is_no_plan_is_said_to_be_none(work):
    with pytest.raises(PruningError, match='the plan is of type int; give a Plan, such as') as e:
        work(3)
    line(e)


def test_weights_that_can_not_be_fetched(monkeypatch):
    def offline(name, **options):
        raise LocalEntryNotFoundError('cannot find the file\non the disk')

    monkeypatch.setattr('timm_epfs.surgery.bases.timm.create_model', offline)
    with pytest.raises(PruningError, match='^the weights of resnet18, which pretrained=True asks for, can') as e:
        prune('resnet18', macs=0.5, pretrained=True)
    line(e)


def test_how_far_it_can_go_is_how_far_it_goes():
    with pytest.raises(PruningError) as e:
        prune('test_resnet', macs=1e-4, round_to=1)
    reach = float(line(e).split('cut leaves ')[1].split(' %')[0]) / 100
    plan = prune('test_resnet', macs=reach + 0.001, round_to=1).pruning_plan
    assert plan.cost['macs'][1] / plan.cost['macs'][0] == pytest.approx(reach, abs=0.002)


def test_a_pruned_model_is_pruned_again(dense, slim):
    twice = prune(slim, macs=0.5)
    first, second = (model.pruning_plan.cost['macs'] for model in (slim, twice))
    assert second == (first[0], pytest.approx(first[1] / 2, rel=0.02))
    again = rebuild(twice.pruning_plan)
    again.load_state_dict(slice_checkpoint(dense.state_dict(), twice.pruning_plan))
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGE), twice(IMAGE))


def spoil_cut(**fields):
    def spoil(plan):
        plan['cuts'][0].update(fields)
    return spoil


BAD_PLANS = {
    'newer format': (lambda plan: plan.update(format=FORMAT + 1), f'format {FORMAT + 1}.*upgrade'),
    'no format': (lambda plan: plan.pop('format'), 'not a timm_epfs plan'),
    'no cuts': (lambda plan: plan.pop('cuts'), "no field 'cuts'"),
    'unknown field': (lambda plan: plan.update(extra=1), "unknown field 'extra'"),
    'index out of range': (spoil_cut(keep='0-2,999'), 'cuts\\[0\\].keep: unit 999 is out of range'),
    'index duplicated': (spoil_cut(keep='0,1,1'), 'repeated or unsorted'),
    'index unsorted': (spoil_cut(keep='3,1'), 'repeated or unsorted'),
    'index that is none': (spoil_cut(keep='some'), 'cuts\\[0\\].keep'),
    'missing members': (spoil_cut(members=[]), 'cuts\\[0\\].members'),
    'no field members': (lambda plan: plan['cuts'][0].pop('members'), "no field 'members'"),
    'member that is none': (spoil_cut(members=['conv1']), 'cuts\\[0\\].members\\[0\\]'),
    'weights smuggled in': (lambda plan: plan.update(base_args={'checkpoint_path': 'x'}), "'checkpoint_path'"),
    'unknown base': (lambda plan: plan.update(base='resnet5o'), 'nearest: resnet50'),
    'another base': (lambda plan: plan.update(base='test_vit'), "this is not the plan's base"),
    'another size of base': (lambda plan: plan.update(base='resnet18'), "this is not the plan's base"),
}


@pytest.mark.parametrize('case', BAD_PLANS)
def test_bad_plans(plan, case, tmp_path):
    spoil, message = BAD_PLANS[case]
    spoil(plan)
    (tmp_path / 'plan.json').write_text(json.dumps(plan))
    with pytest.raises(PruningError, match=message) as e:
        rebuild(Plan.load(tmp_path / 'plan.json'))
    line(e)
    with pytest.raises(PruningError, match=message) as e:
        timm.create_model('epfs_pruned', plan=plan)
    line(e)


@pytest.mark.parametrize('text', ['', '{', 'null', '[]', '{"format": NaN}', '\x00', '{"a":' * 100_000])
def test_what_is_no_json_is_no_plan(text):
    with pytest.raises(PruningError, match='^plan') as e:
        Plan.from_json(text)
    line(e)


def test_a_plan_for_another_model_leaves_it_as_it_was(slim):
    model = timm.create_model('test_resnet', num_classes=7, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PruningError, match="not the plan's base") as e:
        apply_plan(model, slim.pruning_plan)
    line(e)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_checkpoint_that_does_not_fit_is_named_by_three_tensors(slim):
    other = timm.create_model('test_resnet', channels=(8, 8, 8, 8)).state_dict()
    with pytest.raises(PruningError) as e:
        slice_checkpoint(other, slim.pruning_plan)
    named = [name for name in other if f'{name} ' in line(e)]
    assert len(named) == 3 and all(str(tuple(other[name].shape)) in line(e) for name in named)
    assert ' more' in line(e)


def test_a_checkpoint_of_another_architecture_is_named_by_what_is_missing(slim):
    with pytest.raises(PruningError, match='is missing') as e:
        slice_checkpoint(timm.create_model('test_vit').state_dict(), slim.pruning_plan)
    assert line(e).count('is missing') == 3


def test_a_full_disk_leaves_nothing(slim, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(hub.safetensors.torch, 'save_file', full)
    with pytest.raises(PruningError, match='No space left on device') as e:
        save_pretrained(slim, tmp_path / 'out')
    line(e)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_leaves_no_folder_and_the_old_one_whole(slim, tmp_path):
    """Killed after the weights and before the config: what has the asked name is whole, or isn't there."""
    save_pretrained(slim, tmp_path / 'old')
    before = {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()}
    script = textwrap.dedent('''
        import os, signal, sys, timm
        from timm_epfs.zoo import saving as hub
        model = timm.create_model(f'local-dir:{sys.argv[1]}/old', pretrained=True)
        hub._save_config = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        hub.save_pretrained(model, sys.argv[1] + '/' + sys.argv[2], overwrite=True)
    ''')
    killed = [subprocess.Popen([sys.executable, '-c', script, str(tmp_path), name]) for name in ('old', 'new')]
    assert [process.wait(timeout=120) for process in killed] == [-9, -9]
    assert not (tmp_path / 'new').exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()} == before


def test_a_model_without_a_plan_is_not_saved(dense, tmp_path):
    with pytest.raises(PruningError, match='has no pruning_plan') as e:
        save_pretrained(dense, tmp_path / 'out')
    line(e)
    assert list(tmp_path.iterdir()) == []


SHELL_ERRORS = {
    'no command': ('', 'required: COMMAND'),
    'unknown command': ('prone test_resnet', "'prone' .*; did you mean prune\\?"),
    'abbreviated option': ('prune test_resnet --mac 0.5 -o OUT', 'unrecognized arguments: --mac; did you mean --macs'),
    'name taken for a pattern': (
        'prune --exclude layer1 test_resnet --macs 0.5 -o OUT', 'required: NAME; --exclude takes .* these before it'),
    'rounding to text': ('prune test_resnet --macs 0.5 --round-to x -o OUT', "'x' is neither a whole number .* auto"),
    'unknown option': ('prune test_resnet --macs 0.5 -o OUT --exlude conv1', 'mean --exclude\\? .*prune --help'),
    'unknown name': ('inspect resnet5o', 'nearest: resnet50'),
    'unknown name to prune': ('prune resnet5o --macs 0.5 -o OUT', 'nearest: resnet50'),
    'no budget': ('prune test_resnet -o OUT', '--macs --params --latency is required'),
    'two budgets': ('prune test_resnet --macs 0.5 --params 0.5 -o OUT', 'not allowed with'),
    'no output': ('prune test_resnet --macs 0.5', '-o/--output'),
    'target 0': ('prune test_resnet --macs 0 -o OUT', 'macs=0'),
    'target below 0': ('prune test_resnet --macs -0.5 -o OUT', 'macs=-0.5'),
    'target out of reach': ('prune test_resnet --macs 0.0001 -o OUT', 'the largest possible cut leaves'),
    'target as text': ('prune test_resnet --macs half -o OUT', "'half' is not a number; give a share \\(0.5\\) or a"),
    'target as a percentage': ('prune test_resnet --params 50% -o OUT', "'50%' is not a number; give a share"),
    'unknown criterion': ('prune test_resnet --macs 0.5 --criterion l3 -o OUT', "nearest is 'l"),
    'criterion without its data': ('prune test_resnet --macs 0.5 --criterion taylor -o OUT', 'give --data-dir'),
    'unknown kind': ('prune test_resnet --macs 0.5 --kinds colours -o OUT', "'colours'"),
    'exclude of nothing': ('prune test_resnet --macs 0.5 --exclude nowhere -o OUT', "'nowhere'"),
    'no data': ('prune test_resnet --macs 0.5 --data-dir OUT/x -o OUT', 'does not exist'),
    'data without images': ('prune test_resnet --macs 0.5 --data-dir . -o OUT', "no images of split 'train'"),
    'batch of nothing': ('prune test_resnet --macs 0.5 -b 0 -o OUT', "'0'"),
    'no checkpoint': ('prune test_resnet --macs 0.5 --checkpoint OUT.safetensors -o OUT', 'does not exist'),
    'pickle': ('prune test_resnet --macs 0.5 --checkpoint model.pth -o OUT', 'convert it'),
    'pickle by another name': ('prune test_resnet --macs 0.5 --checkpoint pickle.safetensors -o OUT', "can't be read"),
    'checkpoint of another model': (
        'prune test_resnet --macs 0.5 --checkpoint vit.safetensors -o OUT', 'does not fit: .*; .*; .* and \\d+ more'),
    'taken folder': ('prune test_resnet --macs 0.5 -o TAKEN', 'is not empty'),
    'folder of something else': ('prune test_resnet --macs 0.5 -o TAKEN --overwrite', "holds 'thesis.txt'"),
    'file as folder': ('prune test_resnet --macs 0.5 -o TAKEN/thesis.txt', 'is a file'),
    'unknown device': ('prune test_resnet --macs 0.5 --device abacus -o OUT', "'abacus' can't be used"),
    'bad model arguments': ('inspect test_resnet --model-kwargs colour', "'colour' is not key=value"),
    'misspelt model arguments': ('inspect test_resnet --model-kwargs in_chan=1', 'in_chan= .* did you mean in_chans='),
    'unknown model arguments': ('inspect test_resnet --model-kwargs colour=3', 'colour'),
}


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'TAKEN').mkdir()
    (folder / 'TAKEN' / 'thesis.txt').write_text('years of work')
    torch.save({'a': torch.zeros(1)}, folder / 'model.pth')
    (folder / 'pickle.safetensors').write_bytes((folder / 'model.pth').read_bytes())
    safetensors.torch.save_file(timm.create_model('test_vit').state_dict(), folder / 'vit.safetensors')
    return folder


@pytest.mark.parametrize('case', SHELL_ERRORS)
def test_the_shell_says_it_in_one_line_and_exits_with_2(case, bad_files, monkeypatch, capsys):
    command, message = SHELL_ERRORS[case]
    monkeypatch.chdir(bad_files)
    before = {path: path.read_bytes() for path in bad_files.rglob('*') if path.is_file()}
    try:
        code = main(command.split())
    except SystemExit as e:  # argparse's own way out
        code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ''
    assert err.count('\n') == 1 and err.startswith('timm-epfs: error: ')
    assert re.search(message, err), err
    assert {path: path.read_bytes() for path in bad_files.rglob('*') if path.is_file()} == before


def test_a_folder_that_is_taken_is_refused_before_any_work(bad_files, monkeypatch, capsys):
    def work(*args, **kwargs):
        raise AssertionError('built a model first')

    monkeypatch.setattr('timm_epfs.cli.data_arguments.create_model', work)
    monkeypatch.chdir(bad_files)
    assert main('prune test_resnet --macs 0.5 -o TAKEN'.split()) == 2
    assert '--overwrite' in capsys.readouterr().err
