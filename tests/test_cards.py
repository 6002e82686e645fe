"""A card says what was measured, what was cut and how that was found, and nothing that isn't so."""
import dataclasses
import doctest
import math
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from card_facts import numbers, recipe, section, table, violations
from hand_plans import resnet_plan
from hub_server import Hub, connect
from huggingface_hub import ModelCard
from PIL import Image

import timm_epfs
from timm_epfs import PruningError
from timm_epfs.hub import cards, check_metrics, is_ours, make_card, stamp, write_card
from timm_epfs.surgery import apply_plan, build_base

pytestmark = pytest.mark.filterwarnings('ignore:Use .content:DeprecationWarning')

CARDS = Path(__file__).parents[1] / 'model_cards'

METRICS = {
    'dataset': 'digits',
    'dense': {'top1': 91.5, 'latency_ms': 2.0},
    'pruned': {'top1': 90.25, 'latency_ms': 1.5},
    'latency': {'machine': 'AMD EPYC', 'batch_size': 1, 'dtype': 'float32', 'threads': 2},
}


@pytest.fixture(scope='module')
def slim():
    return timm_epfs.prune('resnet20_cifar', macs=0.5, num_classes=7).eval()


def with_recipe(model, recipe):
    changed = timm.create_model('epfs_pruned', plan=model.pruning_plan)
    changed.pruning_plan = dataclasses.replace(model.pruning_plan, recipe=recipe)
    return changed


def test_the_table_holds_what_was_measured_and_what_was_counted(slim, tmp_path):
    rows = table(make_card(slim, 'me/half', METRICS))
    dense = timm.create_model('resnet20_cifar', num_classes=7)
    sizes = []
    for model in (dense, slim):
        safetensors.torch.save_file(model.state_dict(), tmp_path / 'model.safetensors')
        header = int.from_bytes((tmp_path / 'model.safetensors').read_bytes()[:8], 'little')
        sizes.append((tmp_path / 'model.safetensors').stat().st_size - header - 8)
    params = [sum(p.numel() for p in model.parameters()) for model in (dense, slim)]
    assert numbers(rows['top-1, %']) == [91.5, 90.25, -1.25]
    assert numbers(rows['latency, ms']) == [2, 1.5, -25]
    assert numbers(rows['size, MB'][:2]) == pytest.approx([size / 1e6 for size in sizes], abs=0.005)
    assert numbers(rows['parameters'][:2]) == pytest.approx(params, rel=1e-3)
    assert numbers(rows['parameters'][2:]) == pytest.approx([100 * (params[1] / params[0] - 1)], abs=0.05)
    assert numbers(rows['MACs'][2:]) == pytest.approx([-50], abs=1)


def test_what_is_not_measured_says_so(slim):
    rows = table(make_card(slim, 'me/half'))
    assert rows['top-1, %'] == rows['latency, ms'] == ['not measured'] * 3
    rows = table(make_card(slim, 'me/half', {'dataset': 'digits', 'pruned': {'top1': 90.25}}))
    assert rows['top-1, %'] == ['not measured', '90.25', 'not measured']
    no_cost = with_recipe(slim, {})
    no_cost.pruning_plan = dataclasses.replace(slim.pruning_plan, cost={})
    assert table(make_card(no_cost, 'me/half'))['MACs'] == ['not measured'] * 3


def test_latency_comes_with_where_it_was_measured(slim):
    sentence = re.search(r'Latency [^.]*\.', ' '.join(make_card(slim, 'me/half', METRICS).split()))[0]
    assert [fact for fact in ('AMD EPYC', 'batch size 1', 'float32', 'threads: 2') if fact not in sentence] == []
    assert 'Latency' not in make_card(slim, 'me/half')


def test_what_was_measured_in_int8_has_a_section_of_its_own(slim):
    int8 = {
        'float32': {'top1': 90.25, 'latency_ms': 1.0}, 'int8': {'top1': 90.0, 'latency_ms': 0.5},
        'engine': 'ONNX Runtime', 'machine': 'AMD EPYC', 'batch_size': 1, 'threads': 2,
    }
    card, without = (make_card(slim, 'me/half', metrics) for metrics in ({**METRICS, 'int8': int8}, METRICS))
    found = section(card, 'In int8')
    assert numbers(table(found)['top-1, %']) == [90.25, 90, -0.25]
    assert numbers(table(found)['latency, ms']) == [1, 0.5, -50]
    assert 'ONNX Runtime on AMD EPYC, batch size 1, threads: 2.' in ' '.join(found.split())
    assert stamp(card.replace(f'## In int8\n{found}', '')) == without
    only_top1 = make_card(slim, 'me/half', {'dataset': 'digits', 'int8': {'int8': {'top1': 90.0}}})
    assert table(section(only_top1, 'In int8'))['top-1, %'] == ['not measured', '90.00', 'not measured']


def test_metadata_is_what_the_hub_reads(slim):
    data = ModelCard(make_card(slim, 'me/half', METRICS)).data
    assert data.library_name == 'timm' and data.license == 'apache-2.0' and data.datasets == ['digits']
    assert set(data.tags) == {'timm', 'timm_epfs', 'pruning', 'image-classification'}
    result, = data.eval_results
    assert (data.model_name, result.dataset_name, result.metric_value) == ('half', 'digits', 90.25)
    described = {'dataset': 'CIFAR-10 (JPEG, quality 75)', 'pruned': {'top1': 1}}
    data = ModelCard(make_card(slim, 'me/half', described)).data
    assert data.datasets is None and data.eval_results[0].dataset_type == 'cifar-10-jpeg-quality-75'
    bare = ModelCard(make_card(slim, 'me/half')).data
    assert bare.eval_results is None and bare.datasets is None


@pytest.mark.parametrize('license_name', ['apache-2.0', 'dinov3-license', None])
@pytest.mark.parametrize('metrics', [None, METRICS, {**METRICS, 'dataset': 'My cats', 'dataset_id': 'me/cats'}])
def test_metadata_meets_the_hubs_specification(slim, license_name, metrics):
    model = with_recipe(slim, {})
    notes = ['made from the weights of timm/test_resnet.r160_in1k']
    model.pretrained_cfg = {**slim.pretrained_cfg, 'license': license_name, 'notes': notes}
    card = make_card(model, 'me/half', metrics, widget_image='example.png')
    data = yaml.safe_load(card.split('---')[1])
    assert violations(data) == []
    assert ModelCard(card).data.to_dict() == data
    assert data['base_model'] == 'timm/test_resnet.r160_in1k'
    if metrics:
        assert data['datasets'] == [metrics.get('dataset_id', 'digits')]
    if data.get('license') == 'other':
        assert data['license_link'] == 'https://huggingface.co/timm/test_resnet.r160_in1k'


@pytest.mark.parametrize('path', sorted(CARDS.glob('*/README.md')), ids=lambda path: path.parent.name)
def test_metadata_of_the_cards_that_ship_meets_it_too(path):
    data = yaml.safe_load(path.read_text(encoding='utf-8').split('---')[1])
    assert violations(data) == [] and data['datasets'] == ['uoft-cs/cifar10']


@pytest.mark.parametrize('change', [
    {'license': 'Apache'}, {'license': 'other'}, {'datasets': ['CIFAR 10']}, {'datasets': 'digits'}, {'tags': 'timm'},
    {'base_model': 'me/a b'}, {'pipeline_tag': 'classification'}, {'model-index': [{'name': 'half'}]},
    {'widget': [{'src': 'example.png'}]}, {'library_name': None},
])
def test_what_does_not_meet_it_is_seen(slim, change):
    data = yaml.safe_load(make_card(slim, 'me/half', METRICS).split('---')[1])
    assert violations(data) == [] and violations({**data, **change}) == [*change]


def base_model(model):
    return ModelCard(make_card(model, 'me/half')).data.base_model


def test_the_base_model_is_the_repo_that_the_weights_came_from(slim, tmp_path, monkeypatch):
    weights, repo = timm.create_model('test_resnet').state_dict(), 'timm/test_resnet.r160_in1k'
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', lambda *args, **kwargs: dict(weights))
    model = timm_epfs.prune('test_resnet', macs=0.5, pretrained=True)
    folder = timm_epfs.save_pretrained(model, tmp_path / 'out')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3)
    again = timm_epfs.prune(f'local-dir:{folder}', macs=0.5, pretrained=True)
    by_plan = timm.create_model('epfs_pruned', plan=model.pruning_plan, pretrained=True)
    assert {base_model(each) for each in (model, loaded, again, by_plan)} == {repo}
    untrained = timm_epfs.prune('test_resnet', macs=0.5)
    assert untrained.pretrained_cfg['hf_hub_id'] == repo and base_model(untrained) is None
    assert base_model(timm.create_model('epfs_pruned', plan=model.pruning_plan)) is None
    assert base_model(slim) is None


@pytest.mark.parametrize('notes', [
    ['made from the weights of ../x'], ['made from the weights of a\nb: c'], ['made from the weights of alone'],
    ['by hand'], [7], 'x', 7,
])
def test_a_base_model_that_is_none_is_left_out(slim, notes):
    model = with_recipe(slim, {})
    model.pretrained_cfg = {**slim.pretrained_cfg, 'notes': notes}
    assert base_model(model) is None


@pytest.mark.parametrize('given, listed, named', [
    ('mit', 'mit', None),
    ('dinov3-license', 'other', 'dinov3-license'),
    (None, None, None),
])
def test_the_license_is_the_bases(slim, given, listed, named):
    model = with_recipe(slim, {})
    model.pretrained_cfg = {**slim.pretrained_cfg, 'license': given}
    card = make_card(model, 'me/half')
    data = yaml.safe_load(card.split('---')[1])
    assert (data.get('license'), data.get('license_name')) == (listed, named)
    assert f'**License of the base**: {given or "not stated"}' in card


@pytest.mark.parametrize('told, says', [
    ({'method': 'epfs', 'macs': 0.5}, ['Learned .*EPFS']),
    ({'method': 'one-shot', 'criterion': 'l2'}, ['.*one shot.*`l2`.*not learned']),
    ({'method': 'one-shot', 'criterion': 'random'}, ['.*random.*nothing was learned']),
    ({'method': 'uniform'}, ['.*`uniform`.*none of the methods that learn']),
    ({}, ['.*not stated']),
    ({'steps': [{'method': 'sss'}, {'method': ['odd']}]}, ['Learned .*SSS', '.*odd.*none of the methods that learn']),
    ({'steps': 3}, ['.*not stated']),
])
def test_a_plan_that_was_not_learned_is_called_what_it_is(slim, told, says):
    found = section(make_card(with_recipe(slim, told), 'me/half'), 'How it was found')
    sentences = re.findall(r'^- ([A-Z].*)$', found.split('```')[0], re.MULTILINE)
    assert len(sentences) == len(says) and all(map(re.match, says, sentences))
    assert recipe(found) == told
    assert ('timm_epfs makes these choices' in found) == any(name in str(told) for name in ('epfs', 'sss'))


def test_the_recipe_is_repeated_as_the_plan_has_it(slim):
    told = {'method': 'epfs', 'data': 'digits', 'date': '2026-11-20', 'command': 'timm-epfs train | `sh`\n```'}
    assert recipe(section(make_card(with_recipe(slim, told), 'me/half'), 'How it was found')) == told


def test_the_papers_are_cited(slim):
    keys = {'epfs': 'xu2021epfs', 'sss': 'huang2018sss', 'sfp': 'he2018sfp'}
    for method in (*keys, 'one-shot'):
        cited = section(make_card(with_recipe(slim, {'method': method}), 'me/half'), 'Citation')
        assert 'rw2019timm' in cited
        assert {name for name, key in keys.items() if key in cited} == {method} & set(keys)


def test_the_picture_shows_what_is_left(slim, tmp_path, monkeypatch):
    write_card(tmp_path, slim, 'me/half')
    assert '](layers.png)' in (tmp_path / 'README.md').read_text()
    first = (tmp_path / 'layers.png').read_bytes()
    assert Image.open(tmp_path / 'layers.png').size[0] > 400
    write_card(tmp_path, slim, 'me/half')
    assert (tmp_path / 'layers.png').read_bytes() == first

    (tmp_path / 'layers.png').unlink()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    write_card(tmp_path, slim, 'me/half')
    text = (tmp_path / 'README.md').read_text()
    assert [path.name for path in tmp_path.iterdir()] == ['README.md']
    assert '![' not in text and 'matplotlib' not in text


def test_the_cuts_are_counted():
    model = build_base('resnet18', {'num_classes': 5})
    plan = resnet_plan(model, 'resnet18', num_classes=5)
    apply_plan(model, plan).pruning_plan = plan
    units = sum(cut.structure.units for cut in plan.cuts)
    said = section(make_card(model, 'me/half'), 'What was cut')
    assert re.findall(r'(\d+) of (\d+) (\w+)', said) == [
        (str(len(plan.cuts)), str(len(plan.cuts)), 'structures'), (str(units // 2), str(units), 'channels')]


def test_the_snippets_run(slim, monkeypatch, tmp_path):
    with Hub({'token-of-me': 'me'}) as hub:
        connect(monkeypatch, hub, tmp_path, 'token-of-me')
        timm_epfs.push_to_hub(slim, 'me/half')
        found = re.findall(r'```python\n(.*?)```', hub.files('me/half')['README.md'].decode(), re.DOTALL)
        names = {}
        for snippet in found:
            exec(snippet, names)
            if 'logits' in snippet:
                assert names['logits'].shape == (1, 7) and not names['model'].training
                image = Image.new('RGB', (40, 50))
                assert names['transform'](image).shape == (3, 32, 32)
        assert len(found) == 2 and names['model'].num_classes == 7
        assert torch.equal(names['model'].conv1.weight, slim.conv1.weight)


def test_a_plan_without_weights_is_not_sent_to_the_hub_for_them(slim):
    card = make_card(slim, 'me/half', METRICS, has_weights=False)
    assert "timm.create_model('half', num_classes=7)" in card and 'It comes without weights' in card
    assert 'hf-hub' not in card and 'pretrained=True' not in card


# Whose card it is


def test_a_stamp_holds_until_the_text_is_edited(slim):
    card = make_card(slim, 'me/half', METRICS)
    assert is_ours(card) and stamp(card) == card
    assert is_ours(card.replace('\n', '\r\n')) and is_ours(card + '\n')
    assert not is_ours(card.replace('91.50', '99.99'))
    assert not is_ours(card + 'Thanks to all.\n') and not is_ours('# By hand\n') and not is_ours('')


def test_a_model_that_was_loaded_again_has_the_same_card(slim, tmp_path):
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'out')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert make_card(again, 'me/half', METRICS) == make_card(slim, 'me/half', METRICS)


# What was measured


def test_metrics_come_back_as_they_are():
    assert check_metrics(METRICS) == METRICS and check_metrics(None) == check_metrics({}) == {}
    examples = doctest.testmod(cards)
    assert examples.attempted and not examples.failed


@pytest.mark.parametrize('metrics, message', [
    ({'top1': 90}, "metrics: unknown field 'top1'; known: dataset, dataset_id, dense, pruned, latency, int8"),
    ({'pruned': {'top5': 90}}, "metrics.pruned: unknown field 'top5'"),
    ({'pruned': 90}, 'expected a dict with top1, latency_ms'),
    ([], 'expected a dict'),
    ({'dataset': 'digits', 'dense': {'top1': math.nan}}, 'found nan, expected percent'),
    ({'dataset': 'digits', 'dense': {'top1': 101}}, 'found 101, expected percent'),
    ({'dataset': 'digits', 'dense': {'top1': True}}, 'found True, expected percent'),
    ({'dataset': 'digits', 'dense': {'top1': '90'}}, "found '90', expected percent"),
    ({'dense': {'latency_ms': 0}}, 'found 0, expected milliseconds'),
    ({'dense': {'latency_ms': math.inf}}, 'found inf, expected milliseconds'),
    ({'dataset': 'two\nlines'}, 'expected one line of text'),
    ({'dataset': 'cats', 'dataset_id': 'my cats'}, "expected a dataset's id on the Hub"),
    ({'latency': {'batch_size': 1.5}}, 'expected a whole number'),
    ({'pruned': {'top1': 90}}, 'without the dataset'),
    ({**METRICS, 'latency': {'machine': 'AMD EPYC', 'batch_size': 1}}, "without the dtype; add 'latency'"),
    ({'dense': {'latency_ms': 1.0}}, 'without the machine'),
    ({'int8': {'int8': {'top1': 90}}}, 'without the dataset'),
    ({'int8': {'int8': {'latency_ms': 1.0}, 'machine': 'AMD EPYC', 'batch_size': 1}}, "engine; add 'int8'"),
])
def test_metrics_that_make_no_sense(metrics, message):
    with pytest.raises(PruningError, match=message) as error:
        check_metrics(metrics)
    assert '\n' not in str(error.value)


def test_the_template_is_one_file():
    link = Path(__file__).parents[1] / 'model_cards' / 'template.md'
    assert link.resolve().name == cards.TEMPLATE.name and link.resolve().parent.name == 'hub'
    assert link.read_text(encoding='utf-8') == cards.TEMPLATE.read_text(encoding='utf-8')
