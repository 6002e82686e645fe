"""Names in timm: every shipped variant passes what timm asks of its own models, and means what its base means."""
import copy
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import _registry
from timm.models._features_fx import GraphExtractNet, get_graph_node_names

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.plan import Plan
from timm_epfs.pruner import example_for
from timm_epfs.report import count_macs
from timm_epfs.surgery import apply_plan, build_base, rebuild
from timm_epfs.zoo import variants

NAMES = variants.names()
VARIANTS = pytest.mark.parametrize('name', NAMES)
# One of each architecture, for what is slow.
FAMILIES = pytest.mark.parametrize('name', [
    'resnet18_epfs55', 'vgg16_bn_cifar_epfs47', 'mobilenetv2_100_epfs50', 'efficientnet_b0_epfs50',
    'convnext_tiny_epfs50', 'deit_small_patch16_224_epfs50', 'resnet20_cifar_epfs50',
])
ROOT = Path(__file__).parents[1]


def base_of(name):
    return name.rpartition('_epfs')[0]


def small(name):
    """Arguments for small images, where the model's structure depends on their size."""
    return {'img_size': 32} if name.startswith('deit') else {}


def images(batch=1, channels=3):
    return torch.randn(batch, channels, 32, 32)


@lru_cache
def variant(name):
    """A variant that no test changes."""
    torch.manual_seed(0)
    return timm.create_model(name, **small(name)).eval()


def described(model):
    """Everything that tells one structure from another."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    return str(model), shapes, getattr(model, 'num_features', None), getattr(model, 'num_classes', None)


# names


def test_timm_lists_the_variants():
    assert len(NAMES) >= 14 and timm.list_models('*_epfs*') == sorted(NAMES, key=_registry._natural_key)
    assert timm.list_models(module='variants') == timm.list_models('*_epfs*')
    assert timm.list_pretrained('*_epfs*') == [f'{name}.{tag}' for name in NAMES for tag in variants.tags(name)]
    assert all(timm.is_model_pretrained(name) == bool(variants.tags(name)) for name in NAMES)


@VARIANTS
def test_the_default_cfg_is_the_bases_without_its_weights(name):
    cfg, base = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(base_of(name))
    assert cfg.architecture == name and cfg.input_size == base.input_size and cfg.mean == base.mean
    assert (cfg.num_classes, cfg.classifier, cfg.first_conv) == (base.num_classes, base.classifier, base.first_conv)
    tags = variants.tags(name)
    assert bool(cfg.has_weights) == bool(tags) and not cfg.custom_load and cfg.tag == (tags[0] if tags else None)
    assert not (cfg.url or cfg.hf_hub_id) and cfg.file == (str(variants.weights_path(name, tags[0])) if tags else None)


def macs_of(model):
    return count_macs(model, *example_for(model))


@VARIANTS
def test_a_name_says_what_is_removed_and_the_plan_how_it_was_found(name):
    base, percent, kind = re.fullmatch(r'(.+)_epfs(\d+)(?:_(blocks))?', name).groups()
    plan = Plan.load(variants.plan_path(name))
    kinds = {cut.structure.kind for cut in plan.cuts if len(cut.keep) < cut.structure.units}
    assert (kinds == {'blocks'}) == (kind == 'blocks')
    dense, left = (macs_of(build_base(model, {}, 'meta').eval()) for model in (base, name))
    short = 0 if plan.recipe['data'] == 'none' else 0.2  # what is learned lands about its budget, not above
    assert -short <= 100 * (1 - left / dense) - int(percent) < 1
    assert plan.base == base and plan.base_args == {} and plan.cost['macs'] == pytest.approx((dense, left), rel=0.005)
    assert {'method', 'criterion', 'data', 'date', 'command'} <= plan.recipe.keys()
    assert ('not learned' in plan.recipe['method']) == (plan.recipe['data'] == 'none')


def test_plans_are_short():
    assert sum(variants.plan_path(name).stat().st_size for name in NAMES) < 1_000_000


def test_a_plan_is_made_again_by_its_command(tmp_path):
    command = Plan.load(variants.plan_path('resnet32_cifar_epfs50')).recipe['command'].split()
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    subprocess.run(
        [sys.executable, *command[1:], '--output', tmp_path], check=True, capture_output=True, cwd=ROOT, env=env,
    )
    again, shipped = (json.loads((folder / 'resnet32_cifar_epfs50.json').read_text())
                      for folder in (tmp_path, variants.FOLDER))
    assert again['cuts'] == shipped['cuts'] and again['cost'] == shipped['cost']


def test_no_plan_that_was_learned_is_made_anew_from_nothing():
    made = runpy.run_path(str(ROOT / 'benchmarks' / 'variants.py'))['VARIANTS']
    assert set(made) == {name for name in NAMES if Plan.load(variants.plan_path(name)).recipe['data'] == 'none'}


def test_importing_is_cheap_and_opens_no_plan():
    """Two percent of the processor time of importing timm, when it was measured; here that it's less than a tenth."""
    program = (
        'import sys, time\n'
        'times = [time.process_time()]\n'
        'import timm; times.append(time.process_time())\n'
        'opened = []\n'
        'sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)\n'
        'import timm_epfs; times.append(time.process_time())\n'
        'print([path for path in opened if path.endswith((".json", ".safetensors"))])\n'
        'print([m for m in ("torch_pruning", "matplotlib", "sklearn", "timm_epfs.trace") if m in sys.modules])\n'
        'print(10 * (times[2] - times[1]) < times[1] - times[0])'
    )
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ('[]\n[]\nTrue\n', '')


# what timm's tests ask of a model


@VARIANTS
@torch.no_grad()
def test_forward(name):
    out = variant(name)(images(2))
    assert out.shape == (2, timm.get_pretrained_cfg(name).num_classes) and out.isfinite().all()


@VARIANTS
def test_backward(name):
    model = copy.deepcopy(variant(name)).train()
    model.reset_classifier(42)
    out = model(images(2))
    out.mean().backward()
    assert out.shape == (2, 42) and out.isfinite().all()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@VARIANTS
@torch.no_grad()
def test_default_cfg(name):
    model = copy.deepcopy(variant(name))
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert cfg['architecture'] == name and isinstance(model.pruning_plan, Plan)
    features = model.forward_features(images())
    assert model.num_features in features.shape
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images()).shape == (1, model.num_features if not name.startswith('vgg') else model.head_hidden_size)
    model.reset_classifier(7)
    assert model(images()).shape == (1, 7)
    assert f'{cfg["classifier"]}.weight' in keys and f'{cfg["first_conv"]}.weight' in keys


@VARIANTS
@torch.no_grad()
def test_features_only(name):
    wrapper = timm.create_model(name, features_only=True, out_indices=(0, 1), **small(name)).eval()
    with torch.device('meta'):
        base = timm.create_model(base_of(name), features_only=True, out_indices=(0, 1), **small(name)).eval()
        want = base(images())
    got = wrapper(images())
    assert [x.shape[1] for x in got] == wrapper.feature_info.channels()
    plan = Plan.load(variants.plan_path(name))
    assert (wrapper.feature_info.channels() != base.feature_info.channels()) == any(
        plan.attributes.get(f'feature_info.{i}.num_chs', info['num_chs']) != info['num_chs']
        for i, info in enumerate(base.feature_info.get_dicts()))
    assert [x.shape[2:] for x in got] == [x.shape[2:] for x in want]
    assert wrapper.feature_info.reduction() == base.feature_info.reduction()
    assert all(x.isfinite().all() for x in got)


@VARIANTS
@torch.no_grad()
def test_forward_intermediates(name):
    model, base = variant(name), build_base(base_of(name), small(name), 'meta').eval()
    out, found = model.forward_intermediates(images(), indices=2, output_fmt='NCHW')
    wanted = base.forward_intermediates(images().to('meta'), indices=2, output_fmt='NCHW', intermediates_only=True)
    assert [x.shape[2:] for x in found] == [x.shape[2:] for x in wanted]
    x = images()
    torch.testing.assert_close(model.forward_intermediates(x)[0], model.forward_features(x))
    assert out.isfinite().all()


@FAMILIES
@torch.no_grad()
@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning', 'ignore:.torch.jit')
def test_torchscript(name):
    model = timm.create_model(name, scriptable=True, **small(name)).eval()
    x = images()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@FAMILIES
@torch.no_grad()
def test_fx(name):
    model, x = variant(name), images()
    _, nodes = get_graph_node_names(model)
    torch.testing.assert_close(GraphExtractNet(model, [nodes[-1]])(x), model(x))


# every keyword means what it means for the base


@VARIANTS
@pytest.mark.parametrize('kwargs', [
    {}, {'num_classes': 10}, {'num_classes': 0}, {'in_chans': 1}, {'global_pool': 'max'}, {'drop_rate': 0.3},
    {'drop_path_rate': 0.2}, {'img_size': 64}, {'output_stride': 16}, {'pretrained_cfg_overlay': {'num_classes': 5}},
    {'pretrained_cfg': {'num_classes': 6, 'input_size': (1, 32, 32)}}, {'exportable': True}, {'bogus': 1},
], ids=lambda kwargs: '-'.join(kwargs))
def test_a_keyword_does_what_it_does_for_the_base(name, kwargs):
    if 'global_pool' in kwargs and name.startswith('deit'):
        kwargs = {'global_pool': 'avg'}
    with torch.device('meta'):
        try:
            want = timm.create_model(base_of(name), **kwargs)
        except (TypeError, RuntimeError, AssertionError) as e:
            with pytest.raises(PruningError, match=f"can't be built .* {type(e).__name__}"):
                timm.create_model(name, **kwargs)
        else:
            plan = Plan.load(variants.plan_path(name))
            assert described(timm.create_model(name, **kwargs)) == described(apply_plan(want, plan))


def test_output_stride_and_channels_reach_the_feature_extractor():
    features = timm.create_model('resnet18_epfs55', features_only=True, output_stride=8, in_chans=1, out_indices=[2, 4])
    assert [tuple(x.shape[2:]) for x in features(images(channels=1))] == [(4, 4), (4, 4)]
    assert features.feature_info.reduction() == [8, 8]


def test_a_checkpoint_of_the_variant_loads(tmp_path):
    safetensors.torch.save_file(variant('resnet20_cifar_epfs50').state_dict(), tmp_path / 'weights.safetensors')
    model = timm.create_model('resnet20_cifar_epfs50', checkpoint_path=str(tmp_path / 'weights.safetensors')).eval()
    x = images()
    assert torch.equal(model(x), variant('resnet20_cifar_epfs50')(x))


def test_a_variant_is_pruned_further_and_saved(tmp_path):
    slim = timm_epfs.prune('resnet20_cifar_epfs50', macs=0.5)
    assert slim.pruning_plan.base == 'resnet20_cifar'
    assert slim.pruning_plan.cost['macs'][1] / slim.pruning_plan.cost['macs'][0] == pytest.approx(0.25, abs=0.02)
    folder = timm_epfs.save_pretrained(variant('resnet20_cifar_epfs50'), tmp_path / 'out')
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = images()
    assert torch.equal(again(x), variant('resnet20_cifar_epfs50')(x))


# initialisation


def scale(tensor):
    return tensor.detach().abs().float().mean().item()


def expected_scale(name, module, weight):
    """Mean absolute value of a weight by the rule of its family."""
    normal, uniform = (2 / torch.pi) ** 0.5, 0.5
    out, fan_in = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
    if name.startswith('convnext') or name.startswith('deit') and isinstance(module, torch.nn.Linear):
        return 0.02 * normal
    if isinstance(module, torch.nn.Conv2d) and not name.startswith('deit'):
        groups = module.groups if name.startswith(('mobilenet', 'efficientnet')) else 1
        return (2 * groups / out) ** 0.5 * normal
    if name.startswith('vgg16_bn_epfs'):
        return 0.01 * normal
    return uniform * (len(weight) if name.startswith(('mobilenet', 'efficientnet')) else fan_in) ** -0.5


@VARIANTS
def test_a_variant_is_initialised_for_its_own_shape(name):
    large = {
        key: module for key, module in variant(name).named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module.weight.numel() > 1000}
    assert len(large) >= 10
    for key, module in large.items():
        assert scale(module.weight) == pytest.approx(expected_scale(name, module, module.weight), rel=0.15), key


@VARIANTS
def test_what_is_not_random_is_the_bases_cut(name):
    base = build_base(base_of(name), small(name))
    apply_plan(base, Plan.load(variants.plan_path(name)))
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    got = {**dict(variant(name).named_parameters()), **dict(variant(name).named_buffers())}
    assert got.keys() == tensors.keys() and all(tensor.isfinite().all() for tensor in got.values())
    constant = [key for key, tensor in tensors.items() if tensor.numel() and tensor.min() == tensor.max()]
    assert constant and [key for key in constant if not torch.equal(got[key], tensors[key])] == []


@pytest.mark.filterwarnings('ignore:the budget')
def test_what_constructors_compute_is_the_bases_cut():
    base, args = 'swin_tiny_patch4_window7_224', {'img_size': 56, 'embed_dim': 48, 'depths': (2, 1, 1, 1)}
    plan = timm_epfs.prune(base, macs=0.6, criterion='uniform', **args).pruning_plan
    buffers = dict(rebuild(plan).named_buffers())
    assert len(buffers) > len(rebuild(plan).state_dict().keys() & buffers.keys())  # some are in no checkpoint
    for key, buffer in apply_plan(build_base(base, plan.base_args), plan).named_buffers():
        assert torch.equal(buffers[key], buffer)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(timm.create_model('resnet20_cifar_epfs50').state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0]['fc.weight'], models[2]['fc.weight'])


def test_a_plan_for_a_smaller_base_does_not_cut_a_larger_one():
    plan = Plan.load(variants.plan_path('deit_small_patch16_224_epfs50'))
    with pytest.raises(PruningError, match="not the plan's base"):
        rebuild(replace(plan, base='deit_base_patch16_224'), 'meta')


# weights


def test_without_weights_pretrained_says_what_to_do():
    with pytest.raises(PruningError, match="resnet18_epfs55 has no published weights; use pretrained=False, or cut the "
                                           "weights of resnet18: timm.create_model.'epfs_pruned', plan=") as error:
        timm.create_model('resnet18_epfs55', pretrained=True)
    assert '\n' not in str(error.value)
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('resnet18_epfs55.none')


@pytest.fixture
def shipped(registry, monkeypatch, tmp_path):
    """A folder of variants with one name, another percentage of a base that has one, and weights under two tags."""
    monkeypatch.setattr(variants, 'FOLDER', tmp_path)
    plan = timm_epfs.prune('resnet20_cifar', macs=0.7, base='resnet20_cifar').pruning_plan
    plan.save(tmp_path / 'resnet20_cifar_epfs30.json')
    models = {}
    for tag in ('a_cifar10', 'b_cifar10'):
        models[tag] = rebuild(plan).eval()
        safetensors.torch.save_file(models[tag].state_dict(), tmp_path / f'resnet20_cifar_epfs30.{tag}.safetensors')
    variants._register_folder()
    return models


def test_weights_beside_a_plan_are_tags(shipped):
    name, x = 'resnet20_cifar_epfs30', images()
    assert timm.list_pretrained('*_epfs30') == [f'{name}.a_cifar10', f'{name}.b_cifar10']
    assert timm.is_model_pretrained(name) and timm.get_pretrained_cfg(f'{name}.b_cifar10').tag == 'b_cifar10'
    for asked, tag in ((name, 'a_cifar10'), (f'{name}.a_cifar10', 'a_cifar10'), (f'{name}.b_cifar10', 'b_cifar10')):
        model = timm.create_model(asked, pretrained=True).eval()
        assert torch.equal(model(x), shipped[tag](x)) and model.pretrained_cfg['tag'] == tag
    seven = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1)
    assert seven.fc.weight.shape[0] == 7
    torch.testing.assert_close(seven.conv1.weight, shipped['a_cifar10'].conv1.weight.sum(1, keepdim=True))
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    want = shipped['a_cifar10'].forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x), want, strict=True))


def test_weights_that_fit_draw_no_random_numbers(shipped):
    state = torch.get_rng_state()
    model = timm.create_model('resnet20_cifar_epfs30', pretrained=True, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


# names of one's own


@pytest.mark.parametrize('as_', ['plan', 'dict', 'path'])
def test_register(registry, as_):
    path = variants.plan_path('resnet20_cifar_epfs50')
    plan = {'plan': Plan.load, 'dict': lambda path: json.loads(path.read_text()), 'path': str}[as_](path)
    timm_epfs.register('my_resnet', plan)
    assert timm.list_models('my_*') == ['my_resnet'] and not timm.is_model_pretrained('my_resnet')
    torch.manual_seed(0)
    assert described(timm.create_model('my_resnet'))[:2] == described(variant('resnet20_cifar_epfs50'))[:2]
    with pytest.raises(PruningError, match='my_resnet has no weights; use pretrained=False, or register it'):
        timm.create_model('my_resnet', pretrained=True)


@pytest.mark.parametrize('name', ['timm', 'register', 'Plan', 'default_cfgs', '__all__'])
def test_a_model_may_be_called_like_anything_in_our_code(registry, name):
    plan = variants.plan_path('resnet20_cifar_epfs50')
    timm_epfs.register(name, plan)
    variants.register('the_next', plan)
    for made in (name, 'the_next'):
        assert described(timm.create_model(made))[:2] == described(variant('resnet20_cifar_epfs50'))[:2]


def test_entry_points_are_attributes_of_their_module(registry):
    assert variants.resnet20_cifar_epfs50 is timm.models.model_entrypoint('resnet20_cifar_epfs50')
    with pytest.raises(AttributeError, match='no_such_model'):
        _ = variants.no_such_model


def test_registered_weights(registry, tmp_path, monkeypatch):
    model = timm_epfs.prune('resnet20_cifar', macs=0.5, num_classes=5, in_chans=1).eval()
    folder, x = timm_epfs.save_pretrained(model, tmp_path / 'out'), images(channels=1)
    asked = []

    def from_hub(repo, name, cache_dir=None):
        asked.append(repo)
        return folder / name

    monkeypatch.setattr('timm_epfs.zoo.weights.download_from_hf', from_hub)
    for i, weights in enumerate([folder, folder / 'model.safetensors', 'hf-hub:me/mine@main']):
        timm_epfs.register(f'mine_{i}', model.pruning_plan, weights)
        cfg = timm.get_pretrained_cfg(f'mine_{i}')
        assert cfg.num_classes == 5 and cfg.input_size == (1, 32, 32) and timm.is_model_pretrained(f'mine_{i}')
        assert torch.equal(timm.create_model(f'mine_{i}', pretrained=True).eval()(x), model(x))
        assert timm.create_model(f'mine_{i}', pretrained=True, num_classes=3).fc.weight.shape[0] == 3
    assert asked == ['me/mine@main'] * 2


def test_a_registered_torchvision_model(registry):
    plan = timm_epfs.prune('torchvision/resnet18', macs=0.5, criterion='uniform').pruning_plan
    timm_epfs.register('their_resnet', plan)
    model = timm.create_model('their_resnet').eval()
    assert model(images()).shape == (1, 1000) and model.pretrained_cfg['architecture'] == 'their_resnet'


@pytest.mark.parametrize('name, plan, weights, message', [
    ('resnet18', None, None, "timm has a model named 'resnet18' already; choose another name"),
    ('resnet18_epfs55', None, None, 'already'),
    ('my.resnet', None, None, 'not a valid timm name; use letters'),
    ('my/resnet', None, None, 'not a valid timm name'),
    ('', None, None, 'not a valid timm name'),
    ('mine', Plan(None, {}, ()), None, 'names no base'),
    ('mine', Plan('mine', {}, ()), None, 'names no base'),
    ('mine', 'none.json', None, 'plan not read from none.json'),
    ('mine', None, 'none.safetensors', "no weights in 'none.safetensors'; give a .safetensors file, a folder"),
    ('mine', None, 'weights.pth', 'no weights in'),
    ('mine', None, '.', 'weights not read from'),
])
def test_what_can_not_be_registered(registry, name, plan, weights, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = timm.list_models()
    with pytest.raises(PruningError, match=message) as error:
        timm_epfs.register(name, plan or variants.plan_path('resnet20_cifar_epfs50'), weights)
    assert '\n' not in str(error.value) and timm.list_models() == before
