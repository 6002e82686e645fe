"""Every save can be loaded: models whose layers were replaced by hand, that were cut twice, or that have no name."""
import timm
import torch
from helpers import flat, randomise
from pytest import mark, raises
from torch import nn

import timm_epfs
from timm_epfs import PruningError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def small(name='test_resnet', **args):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **args))


def same(a, b, images=IMAGES):
    with torch.no_grad():
        return torch.equal(flat(a.eval()(images)), flat(b.eval()(images)))


def check_saved(slim, folder):
    """What is loaded is what was saved, by timm alone and from the plan."""
    timm_epfs.save_pretrained(slim, folder)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert same(slim, again) and str(slim.eval()) == str(again)
    rebuilt = timm_epfs.rebuild(again.pruning_plan)
    rebuilt.load_state_dict(slim.state_dict())
    assert same(slim, rebuilt)
    return again


@mark.parametrize('when', ['before the cut', 'after the cut'])
@mark.parametrize('name, path', [('test_resnet', 'fc'), ('test_convnext', 'head.fc')])
@mark.parametrize('classes', [7, 0])
def test_a_classifier_that_was_replaced_by_hand_is_one_of_other_classes(tmp_path, when, name, path, classes):
    def replace_classifier(model):
        features = model.get_submodule(path).in_features
        model.set_submodule(path, nn.Linear(features, classes) if classes else nn.Identity())

    model = small(name)
    if when == 'before the cut':
        replace_classifier(model)
    slim = timm_epfs.prune(model, macs=0.5)
    if when == 'before the cut':
        assert slim.pruning_plan.base_args['num_classes'] == classes
    else:
        replace_classifier(slim)
    again = check_saved(slim, tmp_path / 'out')
    assert again.num_classes == again.pruning_plan.base_args['num_classes'] == classes


def test_a_torchvision_model_of_other_classes_is_saved_by_the_name_alone(tmp_path):
    import torchvision
    model = randomise(torchvision.models.squeezenet1_1(num_classes=7))
    slim = timm_epfs.prune(model, macs=0.5, base='torchvision/squeezenet1_1')
    again = timm.create_model(f'local-dir:{timm_epfs.save_pretrained(slim, tmp_path / "out")}', pretrained=True)
    images = torch.randn(1, 3, 64, 64)
    assert same(slim, again, images) and again.pruning_plan.base_args == {'num_classes': 7}


class LowRank(nn.Module):
    """A layer with a trainable product beside it, as LoRA adds one."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down = layer, nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@mark.parametrize('path, replace, said', [
    ('fc', lambda old: nn.Sequential(nn.Dropout(), nn.Linear(old.in_features, 7)), 'Sequential where test_resnet has Linear'),
    ('fc', LowRank, 'LowRank where test_resnet has Linear'),
    ('conv1.0', lambda old: nn.Conv2d(1, old.out_channels, 3, 2, 1, bias=False), 'Conv2d(1, '),
    ('conv1.0', lambda old: nn.Conv2d(3, old.out_channels, 3, 1, 1, bias=False), 'Conv2d(3, '),
    ('maxpool', lambda old: nn.Identity(), 'nothing where test_resnet has MaxPool2d('),
    ('act1', lambda old: nn.GELU(), "GELU(approximate='none') where test_resnet has ReLU()"),
    ('bn1', lambda old: nn.BatchNorm2d(old.num_features, eps=1e-3), 'BatchNorm(24, eps=0.001) where test_resnet has'),
])
def test_what_its_name_does_not_build_any_more_is_refused_by_the_name_of_the_layer(tmp_path, path, replace, said):
    model = small()
    model.set_submodule(path, replace(model.get_submodule(path)))
    channels = model.conv1[0].in_channels
    slim = timm_epfs.prune(model, macs=0.5, example_input=torch.empty(1, channels, 64, 64))
    with raises(PruningError) as error:
        timm_epfs.save_pretrained(slim, tmp_path / 'out')
    assert str(error.value).startswith(f'save: layer {path} is {said}')
    assert 'as_module=True' in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_what_only_training_differs_in_is_no_difference(tmp_path):
    model = small(drop_rate=0.2, drop_path_rate=0.1)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    slim = timm_epfs.prune(nn.SyncBatchNorm.convert_sync_batchnorm(model), macs=0.5)
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'out')
    assert same(slim, timm.create_model(f'local-dir:{folder}', pretrained=True))


def test_a_saved_model_for_other_classes_is_described_as_it_is(tmp_path):
    slim = timm_epfs.prune(small(num_classes=10), macs=0.7)
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'ten')
    seven = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=7)
    assert seven.pruning_plan.base_args == {**slim.pruning_plan.base_args, 'num_classes': 7}
    again = check_saved(timm_epfs.prune(seven, macs=0.7), tmp_path / 'seven')
    assert again.pruning_plan.base_args['num_classes'] == 7
    seven.reset_classifier(5)
    assert timm_epfs.prune(seven, macs=0.7).pruning_plan.base_args['num_classes'] == 5


@mark.parametrize('name, kinds', [
    ('test_resnet', ['channels', 'blocks']), ('test_vit', ['channels', 'heads']), ('test_efficientnet', ['channels']),
])
def test_cut_trained_and_cut_again(tmp_path, name, kinds):
    args = {'img_size': 32} if 'vit' in name else {}
    model = small(name, num_classes=5, **args)
    for step in range(3):
        model = timm_epfs.prune(model, macs=0.8, kinds=kinds)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()(IMAGES).square().mean().backward()
        optimizer.step()
        loaded = check_saved(model.eval(), tmp_path / str(step))
        assert loaded.pruning_plan.to_json() == model.pruning_plan.to_json()
        model = loaded if step else model
    dense, left = model.pruning_plan.cost['macs']
    assert 0.45 < left / dense < 0.56
