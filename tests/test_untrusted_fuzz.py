"""Plans and a config.json with some places changed: they load, or are refused in one line, soon and small."""
import copy
import functools
import json
import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from untrusted import SMALL, elements, line, nested, seeds, small, soon

from timm_epfs.core import PruningError
from timm_epfs.plan import Plan
from timm_epfs.surgery import build_base, rebuild
from timm_epfs.zoo import epfs_pruned, save_pretrained

NASTY = (
    None, True, False, 0, 1, -1, 2, 3, 255, 2 ** 18, 2 ** 31, 2 ** 63, 10 ** 6, 10 ** 300, -10 ** 18, 0.5, -0.0, 1e308,
    5e-324, math.nan, math.inf, -math.inf, '', ' ', '\n', '\x00', '\x1b[2J', '\ud800', '../../etc/passwd', '/dev/zero',
    'a.b', '__class__', 'forward', 'all', 'none', '0', '0-1', '1-0', '0-999999999', '999999999', 'x' * 100_000,
    '0,' * 50_000, 'conv1.weight dim 0 out', 'conv1.weight dim 1 in rows 0-2', 'conv1.weight dim 0 out at 0 + 1u + 9x1',
    'resnet50', 'vit_base_patch16_224', 'torchvision/resnet18', 'epfs_pruned', SMALL, 'blocks', 'channels', 'heads', [],
    {}, [[]], [None], [0] * 1000, [10 ** 9] * 3, [3, 224, 224], {'': 0}, {'a': {}}, nested(30), nested(200),
    nested(200, lambda value: {'a': value}),
)
NAMES = (
    '', 'plan', 'base', 'units', 'keep', 'shortcut', '__class__', '../x', 'a.b', '\n', 'training', 'conv1.in_channels',
    'num_classes', 'in_chans', 'img_size', 'depth', 'layers', 'checkpoint_path', 'device', 'url', 'file', 'state_dict',
    'custom_load', 'hf_hub_filename', 'input_size', 'fixed_input_size', 'global_pool', 'first_conv', 'classifier',
    'features_only', 'out_indices', 'feature_cls', 'block_args', 'x' * 10_000,
)
CHARACTERS = '019-,. +ux#\n{}[]":\\é'
FUZZ = settings(
    derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def mutate(draw, data):
    """Change one place of a JSON tree, which a walk from the root finds."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = keys[draw(st.integers(0, len(keys) - 1))]
        if not isinstance(data[key], (dict, list)) or not draw(st.integers(0, 3)):
            break
        data = data[key]
    what = draw(st.sampled_from(('replace', 'replace', 'edit', 'edit', 'move', 'delete', 'add')))
    value = data[key]
    if what == 'delete':
        del data[key]
    elif what == 'add' and isinstance(data, dict):
        data[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    elif what == 'add':
        data.insert(key, copy.deepcopy(value))
    elif what == 'move':
        other = keys[draw(st.integers(0, len(keys) - 1))]
        data[key], data[other] = data[other], value
    elif what == 'edit' and isinstance(value, str):
        position = draw(st.integers(0, len(value)))
        end = position + draw(st.integers(0, 2))
        data[key] = value[:position] + draw(st.sampled_from(('', *CHARACTERS))) + value[end:]
    elif what == 'edit' and isinstance(value, (int, float)):
        data[key] = draw(st.sampled_from((value + 1, value - 1, -value, 2 * value, value / 2, str(value), [value])))
    else:
        data[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))


def attempt(load):
    """What comes of loading something spoilt: a model, or a refusal in one line."""
    with soon():
        try:
            return load()
        except PruningError as e:
            line(e)


def attempt_plan(read):
    """Whether a plan is read and applied; what it gives is no larger than its base."""
    model = attempt(lambda: rebuild(read(), device='meta'))
    if model is not None:
        plan = model.pruning_plan
        assert elements(model) <= elements_of_base(plan.base, json.dumps(plan.base_args))
    return model is not None


@functools.cache
def elements_of_base(name, args):
    return elements(build_base(name, json.loads(args), 'meta'))


def test_spoilt_plans():
    loaded = Counter()

    @settings(FUZZ, max_examples=1500)
    @given(st.data())
    def spoil(data):
        plan = copy.deepcopy(data.draw(st.sampled_from(seeds())))
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(data.draw, plan)
        loaded[attempt_plan(lambda: Plan.from_dict(plan))] += 1

    seeds()
    with small():
        spoil()
    assert loaded.total() >= 1500 and min(loaded[True], loaded[False]) > 100, loaded


def test_spoilt_text():
    texts = [json.dumps(plan) for plan in seeds()]
    loaded = Counter()

    @settings(FUZZ, max_examples=500)
    @given(st.data())
    def spoil(data):
        text = data.draw(st.sampled_from(texts))
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(text)))
            end = data.draw(st.sampled_from((position, position + 1, position + 50, len(text))))
            text = text[:position] + data.draw(st.sampled_from(('', *CHARACTERS))) + text[end:]
        loaded[attempt_plan(lambda: Plan.from_json(text))] += 1

    with small():
        spoil()
    assert loaded.total() >= 500 and min(loaded[True], loaded[False]) > 20, loaded


def as_timm_does(folder, config, pretrained):
    """Call what timm.create_model('local-dir:…') calls, with what it read of config.json."""
    cfg, args = config['pretrained_cfg'], config['model_args']
    if isinstance(cfg, dict):
        cfg = {**cfg, 'source': 'local-dir', 'file': str(folder)}
    given = {name: value for name, value in args.items() if value is not None} if isinstance(args, dict) else {}
    return epfs_pruned(pretrained_cfg=cfg, pretrained_model_args=args, **{**given, 'pretrained': pretrained})


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
def test_spoilt_configs(tmp_path):
    folder = save_pretrained(rebuild(Plan.from_dict(seeds()[-1])), tmp_path / 'out')
    good = json.loads((folder / 'config.json').read_text())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = Counter()

    @settings(FUZZ, max_examples=500)
    @given(st.data())
    def spoil(data):
        config = {name: copy.deepcopy(good[name]) for name in ('model_args', 'pretrained_cfg')}
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(data.draw, config[data.draw(st.sampled_from(('model_args', 'pretrained_cfg')))])
        pretrained = data.draw(st.booleans())
        loaded[attempt(lambda: as_timm_does(folder, config, pretrained)) is not None] += 1

    with small():
        spoil()
    assert loaded.total() >= 500 and min(loaded[True], loaded[False]) > 20, loaded
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
