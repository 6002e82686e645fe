"""Pushing and pulling by the real clients, against a Hub on loopback: what comes back is what was pushed."""
import copy
import hashlib
import json
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from hub_server import Fault, Hub, connect
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from PIL import Image

import timm_epfs
from timm_epfs import PruningError, push_to_hub
from timm_epfs.cli import main
from timm_epfs.hub import push
from timm_epfs.report import draw_layers

# The client streams uploads in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings('ignore:Use .content:DeprecationWarning')

REPO = 'me/half'
FILES = ('README.md', 'config.json', 'layers.png', 'model.safetensors')
PICTURES = {}
METRICS = {'dataset': 'digits', 'pruned': {'top1': 90.0}}


@pytest.fixture
def hub():
    with Hub({'token-of-me': 'me', 'token-of-you': 'you'}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def clock(hub, monkeypatch, tmp_path):
    return connect(monkeypatch, hub, tmp_path, 'token-of-me')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each plan is drawn once."""
    def draw(path, plan):
        if plan not in PICTURES:
            assert draw_layers(path, plan)
            PICTURES[plan] = path.read_bytes()
        return path.write_bytes(PICTURES[plan])

    monkeypatch.setattr('timm_epfs.hub.cards.draw_layers', draw)


@pytest.fixture(scope='module')
def slim():
    torch.manual_seed(0)
    return timm_epfs.prune('resnet20_cifar', macs=0.5).eval()


@pytest.fixture(scope='module')
def other():
    """Of the same base, with other weights, other shapes and another plan."""
    torch.manual_seed(1)
    return timm_epfs.prune('resnet20_cifar', macs=0.3, criterion='random').eval()


def pull(name=REPO, **kwargs):
    return timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs).eval()


@torch.no_grad()
def same(a, b):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return a.state_dict().keys() == b.state_dict().keys() and torch.equal(a(images), b(images))


def one_line(error):
    return '\n' not in str(error.value) and len(str(error.value)) < 300


# What a push is


def test_what_is_pulled_is_what_was_pushed_in_one_commit(hub, slim):
    pushed = push_to_hub(slim, REPO, METRICS, commit_message='Half of it')
    first, made = hub.commits(REPO)
    assert (made.sha, made.message) == (pushed.oid, 'Half of it')
    assert pushed.url == f'{hub.endpoint}/{REPO}/commit/{pushed.oid}' and pushed.pull_request is None
    assert pushed.files == FILES == tuple(sorted(made.files.keys() - first.files.keys()))
    again = pull()
    assert same(again, slim) and type(again) is type(slim)
    assert again.pruning_plan.to_json() == slim.pruning_plan.to_json()


def test_what_is_the_same_makes_no_commit(hub, slim, tmp_path, monkeypatch):
    pushed = push_to_hub(slim, REPO, METRICS)
    uploads = len(hub.asked('PUT'))
    reloaded = pull()
    for model in (slim, reloaded):
        again = push_to_hub(model, REPO, METRICS)
        assert (again.oid, again.url, again.files) == (pushed.oid, pushed.url, ())
    assert len(hub.commits(REPO)) == 2 and len(hub.asked('PUT')) == uploads == 2


def test_only_what_changed_is_committed(hub, slim):
    push_to_hub(slim, REPO)
    assert push_to_hub(slim, REPO, METRICS).files == ('README.md',)
    trained = copy.deepcopy(slim)
    with torch.no_grad():
        trained.fc.bias += 1
    assert push_to_hub(trained, REPO, METRICS).files == ('model.safetensors',)
    assert same(pull(), trained)


def test_a_dry_run_shows_what_a_push_sends_and_asks_nobody(hub, slim, monkeypatch):
    with monkeypatch.context() as offline:
        offline.delenv('HF_TOKEN')
        offline.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        told = push_to_hub(slim, REPO, METRICS, dry_run=True)
    assert not hub.log and (told.url, told.oid) == (f'{hub.endpoint}/{REPO}', '')
    assert push_to_hub(slim, REPO, METRICS).files == told.files == FILES
    files = hub.files(REPO)
    assert told.sizes == tuple(len(files[name]) for name in FILES) and told.card == files['README.md'].decode()
    shown = str(told)
    assert all(f'{size:,}' in shown for size in told.sizes)
    assert shown.endswith('\n---\n# half') and '\npipeline_tag: image-classification\n' in shown
    with pytest.raises(PruningError, match="metadata of card= can't be read"):
        push_to_hub(slim, REPO, card='---\n- no: mapping\n---\n', dry_run=True)


def test_an_image_for_the_widget_goes_with_it(hub, slim, tmp_path):
    for name in ('cat.png', 'cat.bmp'):
        Image.new('RGB', (4, 4), 'red').save(tmp_path / name)
    assert 'example.png' in push_to_hub(slim, REPO, widget_image=tmp_path / 'cat.png').files
    files = hub.files(REPO)
    assert files['example.png'] == (tmp_path / 'cat.png').read_bytes()
    widget, = ModelCard(files['README.md'].decode()).data.widget
    assert widget['src'] == f'{hub.endpoint}/{REPO}/resolve/main/example.png'
    with pytest.raises(PruningError, match="cat.bmp can't be used; give a PNG or JPEG") as error:
        push_to_hub(slim, REPO, widget_image=tmp_path / 'cat.bmp')
    assert one_line(error)


def test_a_card_of_somebodys_own_is_kept_until_asked(hub, slim, other):
    push_to_hub(slim, REPO)
    mine = hub.files(REPO)['README.md'].replace(b'# half', b'# My half')
    hub.edit(REPO, 'README.md', mine)
    with pytest.warns(UserWarning, match='written or edited by hand and is kept; overwrite_card=True'):
        assert push_to_hub(other, REPO).files == ('config.json', 'layers.png', 'model.safetensors')
    assert hub.files(REPO)['README.md'] == mine
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert push_to_hub(other, REPO, overwrite_card=True).files == ('README.md',)
        push_to_hub(slim, REPO)
    assert b'# half' in hub.files(REPO)['README.md']


def test_a_given_card_takes_the_place_of_the_generated_one(hub, slim):
    for text in ('---\nlicense: mit\n---\n# First\n', '---\nlicense: mit\n---\n# Second\n'):
        assert 'README.md' in push_to_hub(slim, REPO, card=text).files
        assert hub.files(REPO)['README.md'].decode().startswith(text)
    hub.faults.append(Fault('POST /api/validate-yaml', status=400, times=-1))
    with pytest.raises(PruningError, match='push to me/half: ') as error:
        push_to_hub(slim, REPO, card='---\nlicense: none-such\n---\n')
    assert one_line(error)


# Where it goes


def test_a_branch_is_made_and_pulled_by_its_name(hub, slim, other):
    push_to_hub(slim, REPO)
    for _ in range(2):
        push_to_hub(other, REPO, revision='v2/small')
    assert len(hub.commits(REPO)) == 2 and len(hub.commits(REPO, 'v2/small')) == 2
    assert same(pull(), slim) and same(pull(f'{REPO}@v2/small'), other)


def test_a_pull_request_leaves_main_as_it_is(hub, slim, other):
    push_to_hub(slim, REPO)
    pushed = push_to_hub(other, REPO, create_pr=True, token='token-of-you')
    assert pushed.pull_request == f'{hub.endpoint}/{REPO}/discussions/1' and pushed.files == FILES
    assert same(pull(), slim) and same(pull(f'{REPO}@refs/pr/1'), other)
    assert push_to_hub(slim, REPO, create_pr=True, token='token-of-you').pull_request is None


def test_private_repos_are_their_owners(hub, slim, tmp_path, monkeypatch):
    push_to_hub(slim, REPO, private=True)
    assert same(pull(), slim)
    for token in ('token-of-you', ''):
        monkeypatch.setenv('HF_TOKEN', token)
        with pytest.raises(RepositoryNotFoundError):
            pull(cache_dir=tmp_path / f'of {token}')


def test_nothing_goes_to_a_public_repo_that_was_to_be_private(hub, slim, other):
    push_to_hub(slim, REPO)
    with pytest.raises(PruningError, match='private=True was given, me/half is public'):
        push_to_hub(other, REPO, private=True)
    assert len(hub.commits(REPO)) == 2 and len(hub.asked('PUT')) == 2


# What timm does with it


def test_other_classes_and_channels_are_adapted(hub, slim):
    push_to_hub(slim, REPO)
    again = pull(num_classes=7, in_chans=1)
    assert again.fc.weight.shape == (7, slim.fc.in_features) and again.num_classes == 7
    torch.testing.assert_close(again.conv1.weight, slim.conv1.weight.sum(1, keepdim=True))


def test_offline_it_comes_from_the_cache(hub, slim, monkeypatch):
    push_to_hub(slim, REPO)
    pull()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    requests = len(hub.log)
    assert same(pull(), slim)
    with pytest.raises(LocalEntryNotFoundError):
        pull('me/other')
    with pytest.raises(PruningError, match='push to me/half: huggingface_hub is offline; unset HF_HUB_OFFLINE'):
        push_to_hub(slim, REPO)
    assert len(hub.log) == requests


def test_without_a_connection_the_cache_serves_too(hub, slim, monkeypatch):
    push_to_hub(slim, REPO)
    pull()
    hub.faults.append(Fault('HEAD', status=503, times=2))
    assert same(pull(), slim)


# What can go wrong


@pytest.mark.parametrize('repo', ['half', 'me/half/', 'me/ha lf', '../half', 'a/b/c', '', 'me/--half--'])
def test_ids_that_are_none(hub, slim, repo):
    with pytest.raises(PruningError, match='<owner>/') as error:
        push_to_hub(slim, repo)
    assert one_line(error) and not hub.log


@pytest.mark.parametrize('repo, token, message', [
    (REPO, 'token-of-nobody', r'does not accept the token.*\(401\)'),
    ('you/half', 'token-of-me', r'may not write there.*\(403\)'),
])
def test_a_push_that_is_refused_says_why(hub, slim, repo, token, message):
    with pytest.raises(PruningError, match=f'push to {repo}: .*{message}') as error:
        push_to_hub(slim, repo, token=token)
    assert one_line(error) and error.value.__cause__ is not None and not hub.repos


def test_a_push_without_a_token_says_how_to_log_in(hub, slim, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(PruningError, match='log in with "hf auth login"'):
        push_to_hub(slim, REPO)


def test_arguments_are_checked_before_anything_is_sent(hub, slim):
    with pytest.raises(PruningError, match='a pull request goes to main'):
        push_to_hub(slim, REPO, revision='v2', create_pr=True)
    with pytest.raises(PruningError, match="metrics: unknown field 'top5'"):
        push_to_hub(slim, REPO, {'top5': 1})
    with pytest.raises(PruningError, match='no pruning_plan'):
        push_to_hub(timm.create_model('resnet20_cifar'), REPO)
    assert not hub.log


def test_no_connection(slim, monkeypatch, clock):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:1')
    with pytest.raises(PruningError, match=r'no connection to the Hub \(ConnectError\); check the network') as error:
        push_to_hub(slim, REPO)
    assert one_line(error)


REQUESTS = [
    'POST /api/repos/create', 'GET /api/models/me/half$', 'GET .*/tree/', 'POST /api/validate-yaml',
    'POST .*/preupload/', 'POST .*/batch', 'PUT /large/', 'POST /api/verify/', 'POST .*/commit/',
]


@pytest.mark.parametrize('status', [429, 503])
@pytest.mark.parametrize('request_', REQUESTS)
def test_a_busy_hub_is_asked_again(hub, slim, clock, status, request_):
    hub.faults.append(Fault(request_, status=status, headers={'Retry-After': '7'}, times=2))
    assert push_to_hub(slim, REPO).files == FILES
    assert len(hub.asked(request_)) >= 3 and len(clock.slept) >= 2
    assert len(hub.commits(REPO)) == 2 and hub.faults[0].times == 0


@pytest.mark.parametrize('request_, status', [
    ('HEAD .*/config.json', 429),
    ('HEAD .*/config.json', 503),
    ('GET .*/config.json', 429),
    ('GET /large/', 429),
])
def test_a_busy_hub_is_asked_again_for_a_download(hub, slim, clock, request_, status):
    push_to_hub(slim, REPO)
    hub.faults.append(Fault(request_, status=status, times=2))
    assert same(pull(), slim) and clock.slept


def test_what_is_not_there_is_said_to_be_missing(hub, slim):
    push_to_hub(slim, REPO)
    with pytest.raises(RepositoryNotFoundError):
        pull('me/none')
    with pytest.raises(RevisionNotFoundError):
        pull(f'{REPO}@v2')


def test_after_a_push_that_failed_the_next_sends_only_what_is_missing(hub, slim, clock):
    hub.faults.append(Fault('POST .*/commit/', status=503, times=4))
    with pytest.raises(PruningError, match='push to me/half: .*503') as error:
        push_to_hub(slim, REPO)
    assert one_line(error) and clock.slept == [1, 2, 4]
    assert len(hub.commits(REPO)) == 1
    uploads = len(hub.asked('PUT'))
    assert push_to_hub(slim, REPO).files == FILES
    assert len(hub.commits(REPO)) == 2 and len(hub.asked('PUT')) == uploads


@pytest.mark.parametrize('fault, message', [
    (Fault('PUT /large/', status=503, times=-1), 'push to me/half: .*503'),
    (Fault('PUT /large/', cut=50_000, times=-1), 'push to me/half: no connection to the Hub'),
    (Fault('POST .*/batch', status=400, times=-1), 'push to me/half: BadRequestError'),
])
def test_an_upload_that_never_gets_through_leaves_the_repo_as_it_was(hub, slim, fault, message):
    hub.faults.append(fault)
    with pytest.raises(PruningError, match=message) as error:
        push_to_hub(slim, REPO)
    assert one_line(error) and len(hub.commits(REPO)) == 1


@pytest.mark.parametrize('large', [False, True])
def test_a_file_is_compared_with_the_repos_without_being_read_whole(tmp_path, large):
    path, data = tmp_path / 'weights', bytes(range(256)) * (1 << 17)  # 32 MiB
    path.write_bytes(data)
    hashes = {'oid': hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()}
    if large:
        hashes['lfs'] = {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 134}
    del data
    entry = RepoFile(path='weights', size=path.stat().st_size, **hashes)
    tracemalloc.start()
    try:
        assert not push._differs(path, entry)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    with open(path, 'r+b') as file:
        file.write(b'x')
    assert push._differs(path, entry)


def test_an_upload_that_is_cut_goes_on(hub, slim):
    hub.faults.append(Fault('PUT /large/', cut=50_000, times=3))
    assert push_to_hub(slim, REPO).files == FILES
    assert len(hub.commits(REPO)) == 2 and same(pull(), slim)


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, slim):
    hub.faults.append(Fault('POST .*/commit/', lose=True))
    push_to_hub(slim, REPO)
    assert len(hub.commits(REPO)) == 2 and same(pull(), slim)


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub, slim, other):
    push_to_hub(slim, REPO)
    hub.faults.append(Fault('POST .*/commit/', lose=True))
    with pytest.raises(PruningError, match='no connection'):
        push_to_hub(other, REPO, create_pr=True)
    assert [branch for branch in hub.repos[REPO].branches if branch != 'main'] == ['refs/pr/1']


def test_a_download_that_is_cut_goes_on_where_it_was(hub, slim, monkeypatch):
    push_to_hub(slim, REPO)
    monkeypatch.setattr('huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE', 50_000)
    hub.faults.append(Fault('GET /large/', cut=100_000))
    hub.faults.append(Fault('GET /large/', cut=200_000))
    assert same(pull(), slim)
    assert hub.asked('GET /large/') == ['', 'bytes=100000-', 'bytes=300000-']


def test_a_download_that_fails_leaves_nothing_in_the_cache(hub, slim, tmp_path):
    push_to_hub(slim, REPO)
    hub.faults.append(Fault('GET /large/', status=500, times=1))
    with pytest.raises(Exception, match='500'):
        pull()
    assert not [path for path in Path(tmp_path).rglob('*') if path.suffix in ('.incomplete', '.safetensors')]
    assert same(pull(), slim)


def test_a_push_that_another_one_overtakes_is_still_whole(hub, slim, other):
    push_to_hub(slim, REPO, METRICS)
    trained = copy.deepcopy(slim)
    with torch.no_grad():
        trained.fc.bias += 1
    hub.faults.append(Fault('POST .*/commit/', wait=lambda: push_to_hub(other, REPO, METRICS)))
    # Compared with main as it was, the weights alone differ; in between all of it has changed.
    assert push_to_hub(trained, REPO, METRICS).files == FILES
    assert len(hub.commits(REPO)) == 4 and same(pull(), trained)


def test_of_two_equal_pushes_at_once_one_commits(hub, slim):
    both_are_ready = threading.Barrier(2)
    hub.faults.append(Fault('POST .*/commit/', wait=both_are_ready.wait, times=2))
    with ThreadPoolExecutor(2) as pool:
        pushes = [pool.submit(push_to_hub, slim, REPO) for _ in range(2)]
        assert sorted(push.result().files for push in pushes) == [(), FILES]
    assert len(hub.commits(REPO)) == 2


def test_pushes_that_never_get_through_give_up(hub, slim):
    hub.faults.append(Fault('POST .*/commit/', status=412, times=4))
    with pytest.raises(PruningError, match=r'others kept pushing at the same time; push again \(412\)'):
        push_to_hub(slim, REPO)


def test_a_model_that_no_name_builds_is_not_pushed(hub):
    layers = [torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1)]
    own = timm_epfs.prune(torch.nn.Sequential(*layers), macs=0.5, example_input=torch.empty(1, 3, 8, 8))
    with pytest.raises(PruningError, match='no name builds this model, so timm could not load it from a repo'):
        push_to_hub(own, REPO)
    assert REPO not in hub.repos


# From a shell


def test_the_shell_pushes_a_saved_folder(hub, slim, tmp_path, capsys):
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'saved')
    (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
    command = ['push', str(folder), REPO, '--private', '--metrics', str(tmp_path / 'metrics.json')]
    assert main([*command, '--dry-run']) == 0 and not hub.log
    out = capsys.readouterr().out
    assert out.startswith(f'would push to {REPO}:\nfile') and all(name in out for name in FILES)
    assert main(command) == 0
    oid = hub.commits(REPO)[-1].sha
    assert capsys.readouterr().out == f'pushed {", ".join(FILES)}: {hub.endpoint}/{REPO}/commit/{oid}\n'
    assert hub.repos[REPO].private and '90.00' in hub.files(REPO)['README.md'].decode()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith('nothing to push')
    assert main(['push', str(folder), 'you/half']) == 2
    assert capsys.readouterr().err.startswith('timm-epfs: error: push to you/half: the token may not write there')
    assert main(['push', str(tmp_path / 'none'), REPO]) == 2
    assert "can't be loaded" in capsys.readouterr().err
