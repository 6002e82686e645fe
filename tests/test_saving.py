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


def hooked(layer):
    """A layer whose output a user's hook doubles."""
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def patched(layer):
    """A layer whose method a user replaced."""
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    return layer


@mark.parametrize('path, replace, said', [
    ('layer1', hooked, 'Sequential() and a forward hook where test_resnet has Sequential()'),
    ('layer2', patched, 'Sequential() and another forward where test_resnet has Sequential()'),
    ('fc', lambda old: nn.Sequential(nn.Dropout(), nn.Linear(old.in_features, 7)), 'Sequential where test_resnet has '),
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
    seen = []
    model.layer1.register_forward_hook(lambda module, args, out: seen.append(out))
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


class Net(nn.Module):
    """A model of one's own, of whose attributes one follows the cut."""

    def __init__(self, width=32):
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x))).mean((2, 3)).view(-1, self.width)
        return {'logits': self.head(torch.relu(self.mix(x)))}


def net():
    torch.manual_seed(0)
    return randomise(Net())


def check_module(slim, fresh, folder, **options):
    """Plan and weights give the model back, on a dense one with other weights, which stays as it was."""
    timm_epfs.save_pretrained(slim, folder, **options)
    assert sorted(path.name for path in folder.iterdir()) == ['plan.json', 'pruned.safetensors']
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    again = timm_epfs.load_pretrained(fresh, folder)
    assert same(slim, again) and type(again) is type(slim)
    after = fresh.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before | after)
    return again


def test_a_model_of_ones_own_is_loaded_into_one_that_is_built_afresh(tmp_path):
    slim = timm_epfs.prune(net(), macs=0.5, example_input=IMAGES[:1])
    again = check_module(slim, Net(), tmp_path / 'out')
    assert again.width == again.stem.out_channels < 32
    twice = timm_epfs.prune(again, macs=0.69, example_input=IMAGES[:1])
    check_module(twice, Net(), tmp_path / 'twice')
    timm_epfs.save_pretrained(twice, tmp_path / 'out', overwrite=True)
    assert same(timm_epfs.load_pretrained(Net().to('meta'), tmp_path / 'out'), twice)


@mark.parametrize('name, args', [
    ('test_resnet', {}), ('test_resnet', {'feature_cls': 'dict'}), ('test_vit', {'img_size': 32}),
    ('test_efficientnet', {'out_indices': (1, 2)}),
])
def test_features_of_a_model_are_saved_as_a_module(tmp_path, name, args):
    slim = timm_epfs.prune(small(name, features_only=True, **args), macs=0.6)
    assert slim.pruning_plan.base is None
    again = check_module(slim, timm.create_model(name, features_only=True, **args), tmp_path / 'out')
    assert again.feature_info.channels() == slim.feature_info.channels()


def test_features_of_a_saved_model_are_cut_on(tmp_path):
    folder = timm_epfs.save_pretrained(timm_epfs.prune(small(), macs=0.6), tmp_path / 'whole')
    features = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True)
    slim = timm_epfs.prune(features, macs=0.6)
    fresh = timm.create_model(f'local-dir:{folder}', features_only=True)
    check_module(slim, fresh, tmp_path / 'features')


def test_a_model_with_other_layers_than_its_name_builds_is_saved_as_a_module(tmp_path):
    def build():
        model = small()
        model.fc = nn.Sequential(nn.Dropout(), nn.Linear(model.num_features, 7))
        return model

    again = check_module(timm_epfs.prune(build(), macs=0.5), build(), tmp_path / 'out', as_module=True)
    with raises(PruningError, match='names no base'):
        timm_epfs.rebuild(again.pruning_plan)


def test_a_model_with_a_name_is_loaded_into_a_module_too(tmp_path):
    slim = timm_epfs.prune(small(), macs=0.5)
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'out')
    assert same(timm_epfs.load_pretrained(timm.create_model('test_resnet'), folder), slim)


@mark.parametrize('model, said', [
    (lambda: Net(48), r'not the plan\'s base: stem.weight has shape \(48, 3, 3, 3\) where dim 0 should have 32'),
    (lambda: nn.Linear(3, 4), 'stem.weight is missing'),
    (lambda: nn.Sequential(Net()), 'stem.weight is missing'),
    (lambda: timm_epfs.prune(Net(), macs=0.5, example_input=IMAGES[:1]), 'this Net is pruned already; give the dense'),
    (lambda: 'net', 'the model is of type str; give the dense nn.Module'),
])
def test_what_can_not_be_loaded_into_a_module(tmp_path, model, said):
    slim = timm_epfs.prune(net(), macs=0.5, example_input=IMAGES[:1])
    folder = timm_epfs.save_pretrained(slim, tmp_path / 'out')
    with raises(PruningError, match=said) as error:
        timm_epfs.load_pretrained(model(), folder)
    assert '\n' not in str(error.value)


@mark.parametrize('files, said', [
    ({}, 'holds no plan; give a folder that timm_epfs.save_pretrained wrote'),
    ({'config.json': '{"model_type": "vit"}', 'model.safetensors': ''}, 'holds no plan; .*not a model.s own'),
    ({'config.json': '[]'}, 'holds no plan'),
    ({'config.json': '[' * 10 ** 5}, 'holds no plan'),
    ({'config.json': '{"model_args": {"plan": "elsewhere.json"}}'}, 'holds no plan'),
    ({'plan.json': '{}'}, 'not a timm_epfs plan'),
])
def test_folders_that_hold_no_pruned_module(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with raises(PruningError, match=said):
        timm_epfs.load_pretrained(Net(), tmp_path)


def test_weights_of_another_cut_are_refused(tmp_path):
    for macs in (0.5, 0.69):
        slim = timm_epfs.prune(net(), macs=macs, example_input=IMAGES[:1])
        timm_epfs.save_pretrained(slim, tmp_path / str(macs))
    (tmp_path / '0.5' / 'plan.json').replace(tmp_path / '0.69' / 'plan.json')
    with raises(PruningError, match='are of another model: stem.weight has shape'):
        timm_epfs.load_pretrained(Net(), tmp_path / '0.69')


def test_what_is_no_tensor_is_not_saved(tmp_path):
    class Counting(Net):
        def get_extra_state(self):
            return {'steps': 3}

    slim = timm_epfs.prune(Counting(), macs=0.5, example_input=IMAGES[:1])
    with raises(PruningError, match="_extra_state in the model's state_dict is no tensor but of type dict"):
        timm_epfs.save_pretrained(slim, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# The state of an optimizer


def trained(model, make_optimizer, steps=2):
    optimizer = make_optimizer(model)

    def closure():
        optimizer.zero_grad()
        loss = flat(model.train()(IMAGES)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def moments_by_name(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {(names[p], key): value for p, entry in optimizer.state.items() for key, value in entry.items()}


OPTIMIZERS = {
    'SGD': lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    'AdamW': lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    'named': lambda model: torch.optim.Adam(reversed(list(model.named_parameters())), lr=0.01),
    'frozen': lambda model: torch.optim.AdamW([p for name, p in model.named_parameters() if name != 'conv1.0.weight']),
}


@mark.parametrize('kind', OPTIMIZERS)
def test_moments_are_cut_as_their_parameters_are(kind):
    dense = small(num_classes=5)
    before = trained(dense, OPTIMIZERS[kind])
    slim = timm_epfs.prune(dense, macs=0.5, kinds=['channels', 'blocks'])
    plan = slim.pruning_plan
    assert plan.removed_blocks()
    parameters = {name: p for name, p in dense.named_parameters() if kind != 'frozen' or name != 'conv1.0.weight'}
    after = OPTIMIZERS[kind](slim)
    after.load_state_dict(timm_epfs.slice_checkpoint(before.state_dict(), plan, parameters))

    dense_moments, moments = moments_by_name(dense, before), moments_by_name(slim, after)
    for key in {key for _, key in moments}:
        # what cuts weights cuts anything of their names and shapes
        of_dense = {name: dense_moments.get((name, key), tensor) for name, tensor in dense.state_dict().items()}
        scalar = next(value for (_, k), value in moments.items() if k == key).ndim == 0
        want = of_dense if scalar else timm_epfs.slice_checkpoint(of_dense, plan)
        assert all(torch.equal(value, want[name]) for (name, k), value in moments.items() if k == key)
    assert {name for name, _ in moments} == {n for n, _ in slim.named_parameters() if n in parameters}
    after.zero_grad()
    flat(slim.train()(IMAGES)).sum().backward()
    after.step()


def test_states_of_optimizers_that_can_not_be_cut():
    dense = small()
    plan = timm_epfs.prune(dense, macs=0.5).pruning_plan
    parameters = dict(dense.named_parameters())
    state = trained(dense, OPTIMIZERS['SGD']).state_dict()
    fewer = dict(list(parameters.items())[1:])
    lbfgs = trained(dense, lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2)).state_dict()
    for given, by_name, said in [
        (state, None, r'give parameters=dict\(dense.named_parameters\(\)\)'),
        (state, fewer, 'the optimizer has .* parameters, and .* were given that are not the same'),
        (state, dict(Net().named_parameters()), 'the optimizer has'),
        (state, dict(reversed(parameters.items())), 'can\'t be cut; start with a new optimizer'),
        (lbfgs, parameters, 'can\'t be cut; start with a new optimizer'),
    ]:
        with raises(PruningError, match=said):
            timm_epfs.slice_checkpoint(given, plan, by_name)
