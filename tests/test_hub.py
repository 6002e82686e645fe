"""Saving and loading through timm: what comes back is what was saved, or nothing is there."""
import json
import os
import shutil
import signal
import sys

import pytest
import safetensors.torch
import timm
import torch
from hand_plans import VIT, VIT_ARGS, resnet_plan, vit_plan
from timm.models import resolve_model_input_args, save_for_hf
from torch import nn

from timm_epfs.core import PruningError, files, whole_folder
from timm_epfs.plan import Plan
from timm_epfs.surgery import apply_plan, build_base, slice_checkpoint
from timm_epfs.zoo import save_pretrained
from timm_epfs.zoo import saving as hub


def pruned(base, make_plan, **args):
    torch.manual_seed(0)
    model = build_base(base, args).eval()
    plan = make_plan(model)
    apply_plan(model, plan).pruning_plan = plan
    return model


def resnet():
    return pruned('resnet18', lambda model: resnet_plan(model, 'resnet18', num_classes=5), num_classes=5)


def vit():
    return pruned(VIT, vit_plan, **VIT_ARGS)


def torchvision_resnet():
    base = 'torchvision/resnet18'
    return pruned(base, lambda model: resnet_plan(model, base, num_classes=5), num_classes=5)


def images(channels=3):
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(1))


def same_tensors(a, b, but=()):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name not in but)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A pruned ResNet and the folder it was saved to."""
    model = resnet()
    return model, save_pretrained(model, tmp_path_factory.mktemp('saved') / 'resnet')


@pytest.mark.parametrize('make', [resnet, vit, torchvision_resnet])
def test_what_comes_back_is_what_was_saved(make, tmp_path):
    model = make()
    folder = save_pretrained(model, tmp_path / 'deep' / 'out')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    assert type(again) is type(model) and str(again) == str(model)
    assert again.pruning_plan.to_json() == model.pruning_plan.to_json()
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert [path.name for path in folder.parent.iterdir()] == ['out']
    assert again.num_classes == 5 and again.pretrained_cfg['source'] == 'local-dir'
    assert not hasattr(model, 'default_cfg') or model.default_cfg.get('architecture') != 'epfs_pruned'


def test_without_pretrained_only_the_structure_comes_back(saved):
    model, folder = saved
    torch.manual_seed(1)  # not the seed that the saved model was made with
    again = timm.create_model(f'local-dir:{folder}')
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert not torch.equal(again.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


def test_a_loaded_model_saves_again_through_timm_itself(saved, tmp_path):
    model, folder = saved
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert 'state_dict' not in again.pretrained_cfg
    save_for_hf(again, str(tmp_path), safe_serialization=True)
    assert same_tensors(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)


def test_other_classes_get_a_new_head(saved):
    model, folder = saved
    again = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    assert again.fc.weight.shape == (7, 512) and again.num_classes == 7
    assert same_tensors(again, model, but=('fc.weight', 'fc.bias'))
    headless = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(headless(images()), model.forward_head(model.forward_features(images()), pre_logits=True))


def test_other_channels_adapt_the_stem_as_timm_does(saved):
    model, folder = saved
    again = timm.create_model(f'local-dir:{folder}', pretrained=True, in_chans=1)
    torch.testing.assert_close(again.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    assert same_tensors(again, model, but=('conv1.weight',))


def test_other_image_sizes_resample_positions(tmp_path):
    model = vit()
    folder = save_pretrained(model, tmp_path / 'out')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=64)
    want = timm.layers.resample_abs_pos_embed(model.pos_embed, (4, 4), (2, 2))
    torch.testing.assert_close(again.pos_embed, want)
    assert same_tensors(again, model, but=('pos_embed',))


@pytest.mark.parametrize('make, args, kind', [
    (resnet, {}, timm.models.FeatureListNet),
    (resnet, {'feature_cls': 'getter'}, timm.models._features.FeatureGetterNet),
    (vit, {}, timm.models._features.FeatureGetterNet),
])
def test_features_only_gives_the_features_of_the_cut_model(make, args, kind, tmp_path):
    model = make()
    folder = save_pretrained(model, tmp_path / 'out')
    features = timm.create_model(
        f'local-dir:{folder}', pretrained=True, features_only=True, out_indices=(0, 1), **args,
    ).eval()
    with torch.no_grad():
        want = model.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
        got = features(images())
    assert type(features) is kind
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert features.feature_info.channels() == [feature.shape[1] for feature in got]


def test_features_only_where_the_base_has_a_class_for_it():
    plan = Plan('efficientnet_b0', {}, ())
    features = timm.create_model('epfs_pruned', plan=plan, features_only=True)
    want = timm.create_model('efficientnet_b0', features_only=True)
    with torch.no_grad():
        assert [f.shape for f in features(images())] == [f.shape for f in want(images())]


def test_without_weights_of_its_own_a_plan_cuts_the_bases(monkeypatch, tmp_path):
    plan = resnet().pruning_plan
    dense = timm.create_model('resnet18').state_dict()
    asked = []

    def dense_weights(repo, **kwargs):
        asked.append(repo)
        return dict(dense)

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', dense_weights)
    plan.save(tmp_path / 'plan.json')
    want = slice_checkpoint(dense, plan)
    # As timm's own training script asks for it, too.
    script = resolve_model_input_args('epfs_pruned', plan=str(tmp_path / 'plan.json'))
    for args in ({'model_name': 'epfs_pruned', 'plan': tmp_path / 'plan.json'}, script):
        model = timm.create_model(pretrained=True, **{'num_classes': 7, **args}).state_dict()
        assert model['fc.weight'].shape == (7, 512)
        assert all(torch.equal(model[name], want[name]) for name in want if not name.startswith('fc.'))
    assert asked == ['timm/resnet18.a1_in1k'] * 2


def test_a_file_of_pruned_weights_loads(saved):
    model, folder = saved
    overlay = {'file': str(folder / 'model.safetensors'), 'num_classes': 5}
    again = timm.create_model(
        'epfs_pruned', pretrained=True, plan=model.pruning_plan, pretrained_cfg_overlay=overlay,
    )
    assert same_tensors(again, model)


@pytest.mark.parametrize('file, message', [
    ('weights.pth', 'not safetensors, the only format that is read'),
    ('none.safetensors', 'weights not read from'),
    ('torn.safetensors', 'weights not read from'),
])
def test_weights_that_can_not_be_read(file, message, tmp_path):
    (tmp_path / 'torn.safetensors').write_bytes(b'\x10')
    with pytest.raises(PruningError, match=message):
        timm.create_model(
            'epfs_pruned', pretrained=True, plan=resnet().pruning_plan,
            pretrained_cfg_overlay={'file': str(tmp_path / file)},
        )


@pytest.mark.parametrize('make', [resnet, torchvision_resnet])
def test_weights_of_another_model_are_refused_in_one_line(make, tmp_path):
    model = make()
    folder = save_pretrained(model, tmp_path / 'out')
    tensors = model.state_dict()
    tensors.pop('layer1.0.conv1.weight')
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(PruningError, match='layer1.0.conv1.weight') as error:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('plan, message', [
    (None, 'needs a plan'),
    ('none.json', 'No such file'),
    ({'format': 1}, "no field 'base'"),
    (Plan(None, {}, ()), 'names no base'),
    (Plan('torchvision/resnet18', {}, ()), 'no weights are known'),
])
def test_the_entry_point_says_what_it_needs(plan, message):
    with pytest.raises(PruningError, match=message):
        timm.create_model('epfs_pruned', pretrained=True, plan=plan)


def test_a_config_can_not_load_a_checkpoint_of_its_choice(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    config['model_args']['plan']['base_args']['checkpoint_path'] = 'evil.pth'
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(PruningError, match='checkpoint_path'):
        timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)


def test_tied_and_strided_tensors_are_saved(tmp_path):
    model = resnet().to(memory_format=torch.channels_last)
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    folder = save_pretrained(model, tmp_path / 'out')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert same_tensors(again, model)


def test_a_head_changed_after_the_cut_is_saved_as_it_is(tmp_path):
    model = resnet()
    model.reset_classifier(9)
    again = timm.create_model(f'local-dir:{save_pretrained(model, tmp_path / "out")}', pretrained=True)
    assert same_tensors(again, model) and again.num_classes == 9


def test_what_can_not_be_saved(tmp_path):
    with pytest.raises(PruningError, match='this ResNet has no pruning_plan'):
        save_pretrained(timm.create_model('resnet18'), tmp_path / 'out')
    model = nn.Linear(2, 2)
    model.pruning_plan = Plan('resnet18', {'num_classes': 10 ** 6}, ())  # what loading refuses isn't saved
    with pytest.raises(PruningError, match='expected numbers up to 262144'):
        save_pretrained(model, tmp_path / 'out')
    assert not any(tmp_path.iterdir())


def test_folders_that_are_taken(saved, tmp_path):
    model, _ = saved
    (tmp_path / 'empty').mkdir()
    save_pretrained(model, tmp_path / 'empty')
    with pytest.raises(PruningError, match='not empty; name another folder or pass overwrite=True'):
        save_pretrained(model, tmp_path / 'empty')
    (tmp_path / 'file').write_text('')
    with pytest.raises(PruningError, match='is a file'):
        save_pretrained(model, tmp_path / 'file', overwrite=True)
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('')
    with pytest.raises(PruningError, match="holds 'thesis.tex'"):
        save_pretrained(model, tmp_path / 'home', overwrite=True)
    assert (tmp_path / 'home' / 'thesis.tex').exists()
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'README.md').write_text('what a model may have, too, but never by itself')
    with pytest.raises(PruningError, match="holds 'README.md', which isn't part of a model"):
        save_pretrained(model, tmp_path / 'notes', overwrite=True)


def test_overwriting_replaces_the_old_model(saved, tmp_path):
    other = vit()
    save_pretrained(other, tmp_path / 'out')
    save_pretrained(saved[0], tmp_path / 'out', overwrite=True)
    assert same_tensors(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), saved[0])
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('error, raised', [
    (OSError(28, 'No space left on device'), PruningError),
    (safetensors.SafetensorError('I/O error: No space left on device'), PruningError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
@pytest.mark.parametrize('step', ['safetensors.torch.save_file', 'save_config_for_hf', 'Path.rename'])
def test_a_save_that_fails_leaves_what_was_there(saved, tmp_path, monkeypatch, step, error, raised):
    model, _ = saved
    save_pretrained(model, tmp_path / 'old')
    before = {path: path.read_bytes() for path in (tmp_path / 'old').iterdir()}

    def fail(*args, **kwargs):
        raise error

    owner, _, name = f'timm_epfs.zoo.saving.{step}'.rpartition('.')
    with monkeypatch.context() as patch:
        patch.setattr(files, '_exchange', lambda *paths: False)
        patch.setattr(f'{owner}.{name}', fail)
        for folder, overwrite in (('new', False), ('old', True)):
            with pytest.raises(raised):
                save_pretrained(model, tmp_path / folder, overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / 'old').iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ['old']


def test_an_overwrite_that_fails_at_the_last_step_puts_the_old_model_back(saved, tmp_path, monkeypatch):
    model, _ = saved
    save_pretrained(model, tmp_path / 'out')
    rename = hub.Path.rename

    def fail_for_the_new(self, target):
        if self.suffix == '.tmp':
            raise OSError(5, 'Input/output error')
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, '_exchange', lambda *paths: False)
        patch.setattr(hub.Path, 'rename', fail_for_the_new)
        with pytest.raises(PruningError, match='Input/output error'):
            save_pretrained(model, tmp_path / 'out', overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert same_tensors(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), model)


@pytest.mark.skipif(sys.platform != 'linux', reason='replaces a folder in two steps')
@pytest.mark.parametrize('kill', ['before', 'after'])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch, kill):
    """The child is killed at its first change of names, whichever way it is made."""
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'old').touch()
    child = os.fork()
    if not child:
        def killing(change):
            def change_and_die(*paths):
                done = kill == 'after' and change(*paths)
                os.kill(os.getpid(), signal.SIGKILL)
                return done
            return change_and_die

        files._exchange, hub.Path.rename = killing(files._exchange), killing(hub.Path.rename)
        with whole_folder(tmp_path / 'out') as part:
            (part / 'new').touch()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['old' if kill == 'before' else 'new']
