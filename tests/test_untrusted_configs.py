"""An untrusted config.json: it decides what is meant for it to decide, and opens no file before that is checked."""
import json
import pickle

import pytest
import safetensors.torch
import timm
import torch
from untrusted import line, nested, seeds, small

from timm_epfs.core import PruningError
from timm_epfs.plan import Plan
from timm_epfs.plan.limits import MAX_VALUES
from timm_epfs.surgery import rebuild
from timm_epfs.zoo import save_pretrained


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    model = rebuild(Plan.from_dict(seeds()[-1]))
    return model, save_pretrained(model, tmp_path_factory.mktemp('saved') / 'out')


@pytest.fixture
def hostile(saved, tmp_path):
    """A folder with the weights of a saved model, and a function that gives it a config.json and loads it."""
    (tmp_path / 'model.safetensors').symlink_to(saved[1] / 'model.safetensors')

    def load(change, pretrained=True):
        config = json.loads((saved[1] / 'config.json').read_text())
        change(config)
        (tmp_path / 'config.json').write_text(json.dumps(config))
        return timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained)

    return load


def test_a_config_that_is_meant_loads(saved, hostile):
    model = hostile(lambda config: None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved[0].state_dict().values()))


def in_cfg(**fields):
    return lambda config: config['pretrained_cfg'].update(fields)


def in_args(**fields):
    return lambda config: config['model_args'].update(fields)


@pytest.mark.parametrize('change, message', [
    (in_cfg(url='http://127.0.0.1/x.pth'), "'url' is not for a config to set"),
    (in_cfg(url='file:///etc/passwd'), "'url' is not for a config to set"),
    (in_cfg(hf_hub_id='other/repo'), "'hf_hub_id' is not for a config to set"),
    (in_cfg(hf_hub_filename='../../pytorch_model.bin'), "'hf_hub_filename' is not for a config to set"),
    (in_cfg(custom_load=True), "'custom_load' is not for a config to set"),
    (in_cfg(custom_load='hf'), "'custom_load' is not for a config to set"),
    (in_cfg(state_dict={'conv1.weight': [0]}), "'state_dict' is not for a config to set"),
    (in_cfg(colour=1), "unknown field 'colour'"),
    (lambda config: config.update(num_classes=10 ** 12), 'numbers up to'),
    (lambda config: config.update(num_classes=2.5), 'an integer'),
    (in_cfg(input_size=[3, 10 ** 9, 10 ** 9], fixed_input_size=True), 'numbers up to'),
    (in_cfg(input_size=[3, 10 ** 9]), 'expected three numbers'),
    (in_cfg(label_names=['x'] * (MAX_VALUES + 1)), 'more than'),
    (in_cfg(notes=nested(100)), 'nested more than'),
    (in_args(plan='/etc/passwd'), "model_args.plan: found "),
    (in_args(plan=None), "model_args.plan: found "),
    (lambda config: config['model_args'].pop('plan'), 'needs a plan'),
    (lambda config: config.pop('model_args'), 'needs a plan'),
    (in_args(checkpoint_path='x.pth'), "'checkpoint_path', which is not for"),
    (in_args(device='cuda'), "'device', which is not for"),
    (in_args(num_classes=10 ** 12), 'numbers up to'),
    (in_args(num_classes='../x'), 'expected a word'),
    (in_args(colour=1), 'colour'),
    (in_args(features_only=True, out_indices=[0] * (MAX_VALUES + 1)), 'more than'),
    (in_args(**{'a.b': 1}), 'the name of an argument'),
])
@pytest.mark.parametrize('pretrained', [False, True])
def test_what_a_config_does_not_decide(hostile, change, message, pretrained, monkeypatch):
    def opened(*args, **kwargs):
        raise AssertionError('a file was opened')

    for name in ('description.read_weights', 'weights.download_cached_file', 'weights.download_from_hf'):
        monkeypatch.setattr(f'timm_epfs.zoo.{name}', opened)
    with small(), pytest.raises(PruningError) as error:
        hostile(change, pretrained)
    assert message in line(error)


@pytest.mark.parametrize('files', [
    ('pytorch_model.bin',), ('model.safetensors',), ('model.safetensors', 'pytorch_model.bin'),
])
def test_no_pickle_is_read_where_weights_are_missing_or_empty(saved, tmp_path, files, monkeypatch):
    """timm takes pytorch_model.bin where it finds no weights, and an empty file is no weights."""
    (tmp_path / 'config.json').write_text((saved[1] / 'config.json').read_text())
    for name in files:
        if name.endswith('.bin'):
            torch.save(saved[0].state_dict(), tmp_path / name)
        else:
            safetensors.torch.save_file({}, tmp_path / name)

    def load(*args, **kwargs):
        raise AssertionError('a pickle was read')

    monkeypatch.setattr(torch, 'load', load)
    monkeypatch.setattr(pickle, 'load', load)
    with pytest.raises(PruningError, match='weights not read from') as error:
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    line(error)


@pytest.mark.parametrize('change, message', [
    (in_cfg(url='http://127.0.0.1/x.pth'), "'url' is not for a config to set"),
    (in_cfg(hf_hub_filename='../../pytorch_model.bin'), "'hf_hub_filename' is not for a config to set"),
    (in_cfg(colour=1), 'colour'),
])
def test_a_config_that_names_a_variant_decides_no_more(hostile, change, message):
    def named(config):
        config['architecture'] = 'resnet20_cifar_epfs50'
        config.pop('model_args')
        change(config)

    with pytest.raises(PruningError) as error:
        hostile(named)
    assert message in line(error)
