"""hub_upload.py pushes what isn't there yet, whatever fails on the way, and says what it did."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Fault, Hub, connect
from PIL import Image

import timm_epfs

pytestmark = pytest.mark.filterwarnings('ignore:Use .content:DeprecationWarning')

ROOT = Path(__file__).parents[1]
NAMES = ['resnet20_epfs50.digits', 'resnet20_epfs70.digits', 'vgg_epfs50.digits']


@pytest.fixture
def hub():
    with Hub({'token-of-me': 'me'}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def clock(hub, monkeypatch, tmp_path):
    return connect(monkeypatch, hub, tmp_path, 'token-of-me')


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    macs = dict(zip(NAMES, (0.5, 0.3, 0.4)))
    return {name: timm_epfs.prune('resnet20_cifar', macs=share).eval() for name, share in macs.items()}


@pytest.fixture
def script(models, monkeypatch, tmp_path):
    """The script, with three variants of its own and an empty folder of cards."""
    spec = importlib.util.spec_from_file_location('hub_upload', ROOT / 'hub_upload.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, 'variants', lambda: NAMES)
    monkeypatch.setattr(script, 'build', models.__getitem__)
    monkeypatch.setattr(script, 'CARDS', tmp_path)
    monkeypatch.setattr('timm_epfs.hub.cards.draw_layers', lambda path, plan: False)
    return script


def statuses(out):
    """The last table that was printed."""
    *_, table = out.split('\n\n')
    head, *rows = [line.split(maxsplit=2) for line in table.splitlines()]
    assert head == ['name', 'repo', 'status'] and all(repo == f'me/{name}' for name, repo, _ in rows)
    return {name: status for name, _, status in rows}


def test_what_is_there_is_not_pushed_again(script, hub, capsys):
    everything = 'README.md, config.json, model.safetensors'
    assert script.main(['--org', 'me', '--dry-run']) == 0
    out = capsys.readouterr().out
    assert statuses(out) == dict.fromkeys(NAMES, f'would push {everything}') and not hub.log
    assert all(f'me/{name}:\nfile' in out and f'---\n# {name}\n' in out for name in NAMES)
    assert script.main(['--org', 'me', '--private', '--only', 'resnet20_*']) == 0
    assert statuses(capsys.readouterr().out) == dict.fromkeys(NAMES[:2], f'pushed {everything}')
    assert all(repo.private for repo in hub.repos.values())
    assert script.main(['--org', 'me']) == 0
    again = statuses(capsys.readouterr().out)
    assert again == {**dict.fromkeys(NAMES[:2], 'unchanged'), NAMES[2]: f'pushed {everything}'}
    assert [len(hub.commits(f'me/{name}')) for name in NAMES] == [2, 2, 2]


def test_one_that_fails_does_not_stop_the_others(script, hub, capsys, monkeypatch, models):
    def build(name):
        if name == NAMES[0]:
            raise RuntimeError('no\nweights')
        return models[name]

    monkeypatch.setattr(script, 'build', build)
    hub.faults.append(Fault(f'POST .*/{NAMES[1]}/commit/', status=500, times=4))
    assert script.main(['--org', 'me']) == 1
    found = statuses(capsys.readouterr().out)
    assert found[NAMES[0]] == f'failed: {NAMES[0]}: RuntimeError no weights'
    assert found[NAMES[1]].startswith(f'failed: push to me/{NAMES[1]}: ') and '500' in found[NAMES[1]]
    assert found[NAMES[2]].startswith('pushed')

    monkeypatch.setattr(script, 'build', models.__getitem__)
    uploads = len(hub.asked('PUT'))
    assert script.main(['--org', 'me']) == 0
    assert statuses(capsys.readouterr().out)[NAMES[2]] == 'unchanged'
    assert len(hub.asked('PUT')) == uploads + 1  # the weights of the second were there, no commit named them
    assert [len(hub.commits(f'me/{name}')) for name in NAMES] == [2, 2, 2]


def test_cards_come_from_their_folder(script, hub, tmp_path):
    (tmp_path / f'{NAMES[0]}.md').write_text('---\nlicense: mit\n---\n# By hand\n')
    (tmp_path / f'{NAMES[1]}.json').write_text(json.dumps({'dataset': 'digits', 'pruned': {'top1': 91.25}}))
    (tmp_path / f'{NAMES[2]}.json').write_text('{"top1": NaN')
    assert script.main(['--org', 'me']) == 1
    assert '# By hand' in hub.files(f'me/{NAMES[0]}')['README.md'].decode()
    assert '| 91.25 |' in hub.files(f'me/{NAMES[1]}')['README.md'].decode()
    assert f'me/{NAMES[2]}' not in hub.repos
    Image.new('RGB', (4, 4)).save(tmp_path / f'{NAMES[1]}.jpg')
    script.main(['--org', 'me', '--only', NAMES[1]])
    assert 'example.jpg' in hub.files(f'me/{NAMES[1]}')


def test_what_can_not_be_done_ends_with_two(script, hub, capsys):
    assert script.main(['--org', 'me', '--only', 'vit*']) == 2
    assert "no variant that has weights matches 'vit*'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        script.main([])
    assert error.value.code == 2 and not hub.log


IN_A_PROCESS_OF_ITS_OWN = '''
import sys, timm
try:
    timm.create_model('hf-hub:me/half', pretrained=True)
except RuntimeError as e:
    print(e)
import hub_upload
hub_upload.variants = lambda: ['half.digits']
hub_upload.build = lambda name: timm.create_model('hf-hub:me/half', pretrained=True)
sys.exit(hub_upload.main(['--org', 'me']))
'''


def test_in_a_process_that_only_knows_the_environment(hub, models, tmp_path):
    """HF_ENDPOINT and HF_TOKEN are all it needs; timm without timm_epfs says what the card says it does."""
    timm_epfs.push_to_hub(models[NAMES[0]], 'me/half')
    env = {
        **os.environ, 'HF_ENDPOINT': hub.endpoint, 'HF_TOKEN': 'token-of-me', 'HF_HOME': str(tmp_path / 'home'),
        'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1', 'NO_PROXY': '*',
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    }
    done = subprocess.run(
        [sys.executable, '-c', IN_A_PROCESS_OF_ITS_OWN], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    alone, *table = done.stdout.splitlines()
    assert alone == 'Unknown model (epfs_pruned)' and alone in hub.files('me/half')['README.md'].decode()
    assert statuses('\n'.join(table))['half.digits'].startswith('pushed')
    again = timm.create_model('hf-hub:me/half.digits', pretrained=True).state_dict()
    want = models[NAMES[0]].state_dict()
    assert again.keys() == want.keys() and all(torch.equal(again[name], want[name]) for name in want)
