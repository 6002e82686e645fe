"""Which experiments of the comparison are run, and what they start from."""
import json
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.training.options import check_options

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
CIFAR10 = BENCHMARKS / 'cifar10'
DENSE, L1 = 'resnet20_cifar/dense-0', 'resnet20_cifar/l1-50-0'


@pytest.fixture
def script(monkeypatch):
    """``run.py`` as a module, without a trace afterwards."""
    monkeypatch.setattr(sys, 'path', [str(BENCHMARKS / 'comparison'), *sys.path])
    monkeypatch.setattr('timm_epfs.training.run.latencies', lambda models, image: [1.0, 1.0])  # to save time
    modules = ('run', 'ship', 'baselines', 'image_sets', 'cifar10_images', 'records', 'methods', 'common')
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs an experiment without training; returns the names of what was run, in order."""
    done = []

    def train(args, experiment, name, seed, images):
        done.append(name)
        if 'weights' in experiment:
            weights = args.runs / name / 'dense.safetensors'
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({'weight': torch.tensor([1 / 3]), 'steps': torch.tensor(7)}, weights)
        else:
            assert script._start(args, experiment, 'resnet20_cifar', images).is_file()
        return {'name': name, 'images': images.name, 'amp': experiment['options'].get('amp', False)}

    def main(*patterns):
        done.clear()
        monkeypatch.setattr(sys, 'argv', [
            'run.py', 'cifar10', *patterns, '--data-dir', '.', '--runs', str(tmp_path / 'runs'),
            '--results', str(tmp_path)])
        script.main()
        return list(done)

    monkeypatch.setattr(script, '_run', train)
    monkeypatch.setattr('image_sets.load', lambda *_: {'test.pixels': torch.zeros(1)})
    return main


def test_the_dense_baseline_comes_first_and_what_has_a_result_is_left_out(run):
    assert run('resnet20_cifar/l1-50') == [DENSE, L1]
    assert run('resnet20_cifar/l1-50') == run('resnet20_cifar/dense') == []


def test_results_of_other_images_are_not_added_to(run, monkeypatch):
    run('resnet20_cifar/l1-50')
    monkeypatch.setattr('image_sets.load', lambda *_: {'test.pixels': torch.ones(1)})
    with pytest.raises(SystemExit, match=r'images \w+, and resnet20_cifar/dense-0.json was made on .* by --results'):
        run('resnet20_cifar.trials/fpgm-50')


def test_images_are_decoded_once_and_again_where_another_folder_is_named(script, tmp_path):
    cache, value = tmp_path / 'images.safetensors', 10

    def folder(name):
        for split, n in (('train', 3), ('test', 2)):
            for i in range(n):
                path = tmp_path / name / split / 'cat' / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (32, 32), (value, 0, 0)).save(path)
        return tmp_path / name

    first = folder('first')
    from cifar10_images import load

    assert load(first, cache)['train.pixels'].shape == (3, 3, 32, 32)
    written = cache.stat().st_mtime_ns
    load(first, cache)
    assert cache.stat().st_mtime_ns == written
    value = 20
    assert load(folder('second'), cache)['test.pixels'][:, 0].eq(20).all()
    with pytest.raises(SystemExit, match='nowhere has no CIFAR-10 that can be read'):
        load(tmp_path / 'nowhere', cache)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['images.safetensors']


def test_what_waits_for_a_gpu_is_passed_over_without_one(run, capsys):
    assert run('resnet110_cifar*/epfs_filters-40') == []
    assert 'resnet110_cifar.papers/epfs_filters-40 is too long for cpu: give --device cuda' in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore:--amp on a processor')
@pytest.mark.parametrize('folder', sorted(BENCHMARKS.glob('*/experiments/*')), ids=lambda folder: folder.name)
def test_every_experiment_asks_for_what_there_is(script, tmp_path, folder):
    model = folder.name.partition('.')[0]
    assert timm.is_model(model) and (folder.parent / model / 'dense.json').exists()
    for path in folder.iterdir():
        experiment = json.loads(path.read_text())
        check_options(script.parse_args([
            'train', model, '--output', str(tmp_path), '--data-dir', '.', *script._flags(experiment['options'])]))
        assert experiment.get('runner', 'train') in script.RUNNERS, path
        assert (folder / f'{experiment.get("shape_of", path.stem)}.json').exists(), path
        removed = path.stem.rpartition('-')[2]
        assert path.stem == 'dense' or abs(100 * (1 - experiment['options']['macs']) - int(removed)) <= 1, path


@pytest.mark.parametrize('asked, amp', [((), True), (('--float32',), False)])
def test_what_an_experiment_ran_in_is_in_its_result(run, tmp_path, asked, amp):
    run('resnet20_cifar/l1-50', *asked)
    assert json.loads((tmp_path / f'{L1}.json').read_text())['amp'] == amp


def test_the_dense_weights_are_kept_beside_their_result_in_half_precision(run, tmp_path):
    run('resnet20_cifar/dense')
    kept = load_file(tmp_path / f'{DENSE}.safetensors')
    assert kept['weight'].dtype == torch.float16 and kept['steps'] == 7


def test_lost_dense_weights_are_trained_again_for_what_has_no_result_and_for_nothing_else(run, tmp_path):
    run('resnet20_cifar/l1-50')
    (tmp_path / f'{DENSE}.safetensors').unlink()
    assert run('resnet20_cifar/l1-50') == []
    (tmp_path / f'{L1}.json').unlink()
    assert run('resnet20_cifar/l1-50') == [DENSE, L1]


@pytest.fixture
def really_run(script, monkeypatch, tmp_path):
    """Runs an experiment for an epoch of one batch on noise; returns its result."""
    tensors = {}
    for split in ('train', 'test'):
        tensors[f'{split}.pixels'] = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
        tensors[f'{split}.targets'] = torch.arange(8)
    monkeypatch.setattr('image_sets.load', lambda *_: tensors)
    images = script.SETS['cifar10'](Path('.'), tmp_path)
    start = tmp_path / 'resnet20_cifar'
    start.mkdir()
    save_file(script.halved(timm.create_model('resnet20_cifar').state_dict()), start / 'dense-0.safetensors')
    args = Namespace(runs=tmp_path / 'runs', results=tmp_path, data_dir=Path('.'), weights_dir=None, device='cpu')

    def result(name, **experiment):
        options = {'method': 'none', 'macs': 0.5, 'epochs': 1, 'dense-epochs': 0, 'batch-size': 8, 'criterion': 'l1'}
        options.update(experiment.pop('options', {}))
        made = script._run(args, {**experiment, 'options': options}, f'resnet20_cifar/{name}-0', 0, images)
        script.write_json(tmp_path / 'resnet20_cifar' / f'{name}-0.json', made)
        return made

    return result


@pytest.fixture
def photographs(tmp_path):
    """A folder as Imagenette's, of two images of each of two classes."""
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'imagenette_{split}.tar', 'w') as tar:
            for number, name in enumerate(('n02102040', 'n01440764')):  # springer spaniel, tench
                for i in range(2):
                    path = tmp_path / f'{name}_{i}.png'
                    Image.new('RGB', (16, 16), (250 * number, 20 * i, 0)).save(path)
                    tar.add(path, f'{name}/{path.name}')
    return tmp_path


def test_photographs_are_told_apart_by_the_rows_that_the_classifier_has_for_their_classes(script, photographs):
    dense = timm.create_model('test_resnet')
    save_file(dense.state_dict(), photographs / 'weights.safetensors')
    images = script.SETS['imagenette'](photographs, photographs)
    start = images.start('test_resnet', photographs / 'weights.safetensors', photographs / 'start')
    slim = timm.create_model('test_resnet', num_classes=2)
    slim.load_state_dict(load_file(start))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(slim.eval()(image), dense.eval()(image)[:, [0, 217]])  # ImageNet's order: the tench is first


def test_photographs_that_are_missing_are_named(script, tmp_path):
    with pytest.raises(SystemExit, match="imagenette_train.tar is not there: name the folder of Imagenette's two"):
        script.SETS['imagenette'](tmp_path, tmp_path)


def run_on_photographs(script, photographs, runner, macs, epochs):
    """The result of an experiment on the two classes of photographs, from random dense weights."""
    images = script.SETS['imagenette'](photographs, photographs)
    (photographs / 'test_resnet').mkdir()
    weights = timm.create_model('test_resnet', num_classes=2).state_dict()
    save_file(script.halved(weights), photographs / 'test_resnet' / 'dense-0.safetensors')
    args = Namespace(runs=photographs / 'runs', results=photographs, data_dir=photographs, device='cpu')
    options = {'method': 'none', 'macs': macs, 'epochs': epochs, 'dense-epochs': 0, 'batch-size': 2, 'img-size': 32,
               'workers': 0}
    return script._run(args, {'runner': runner, 'options': options}, f'test_resnet/{runner}-0', 0, images)


def test_the_dense_control_is_trained_on_photographs_with_all_its_units(script, photographs):
    result = run_on_photographs(script, photographs, 'whole', macs=0.995, epochs=1)
    assert result['macs'][0] == result['macs'][1] and result['plan']['keep'] == {} and result['epochs']['finetune'] == 1
    assert result['plan']['base_args']['num_classes'] == 2


def _cuts(result):
    from records import plan_of

    return {cut.structure.name: cut for cut in plan_of(result['plan']).cuts}


@pytest.mark.parametrize('kinds', [['channels'], ['blocks']])
def test_a_result_keeps_of_a_plan_what_gives_all_of_it_again(script, kinds):
    from records import plan_of

    plan = timm_epfs.prune('resnet20_cifar', macs=0.6, kinds=kinds, criterion='l1', num_classes=7).pruning_plan
    record = json.loads(json.dumps(script.plan_record(plan)))
    cut = {cut.structure.name for cut in plan.cuts if len(cut.keep) < cut.structure.units}
    assert record['keep'].keys() == cut and 'cuts' not in record
    assert plan_of(record).to_json() == plan.to_json()


def test_every_committed_result_gives_the_plan_that_it_measured(script):
    from records import plan_of

    for folder in filter(Path.is_dir, sorted((CIFAR10 / 'results').iterdir())):
        results = [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]
        plans = [plan_of(result['plan']) for result in results]
        slim = timm_epfs.rebuild(plans[-1], 'meta')
        assert sum(parameter.numel() for parameter in slim.parameters()) == results[-1]['params'][1], folder.name


def test_the_table_of_methods_is_of_committed_results(script):
    import methods

    for method in methods.METHODS:
        for model, name in zip(methods.MODELS, method.experiments):
            assert bool(methods._results(model, name)) == (name is not None), name
    header, _, *rows = methods.methods().splitlines()
    assert len(rows) == len(methods.METHODS) + len([*methods._training_free()])
    assert {row.count('|') for row in rows} == {header.count('|')}


def test_a_structure_that_is_no_more_is_named(script):
    from records import plan_of

    with pytest.raises(PruningError, match='cuts layer9, and resnet20_cifar has no such structure'):
        plan_of({'base': 'resnet20_cifar', 'base_args': {}, 'recipe': {}, 'cost': {}, 'keep': {'layer9': '0-5'}})


def test_shares_that_are_set_by_hand_are_kept_and_the_rest_meets_the_budget(really_run):
    result = really_run('wide', options={'method-kwargs': {'ratios': {'layer3.*.conv1': 0}}})
    left = {name: len(cut.keep) for name, cut in _cuts(result).items()}
    assert {name: left[name] for name in left if name.startswith('layer3.') and name.endswith('.conv1')} == {
        f'layer3.{block}.conv1': 64 for block in range(3)}
    assert result['macs'][1] / result['macs'][0] == pytest.approx(0.5, abs=0.01)


def test_a_shape_that_another_experiment_found_is_filled_with_the_units_that_a_criterion_ranks_highest(really_run):
    found = _cuts(really_run('found', options={'criterion': 'random'}))
    filled = _cuts(really_run('filled', runner='shape', shape_of='found'))
    assert {name: len(cut.keep) for name, cut in filled.items()} == {name: len(cut.keep) for name, cut in found.items()}
    assert any(list(cut.keep) != list(found[name].keep) for name, cut in filled.items())


def test_torch_pruning_cuts_the_same_share_of_each_layer(script, photographs):
    result = run_on_photographs(script, photographs, 'torch_pruning', macs=0.4, epochs=0)
    assert result['macs'][1] / result['macs'][0] == pytest.approx(0.4, abs=0.02)
    shares = [len(cut.keep) / cut.structure.units for cut in _cuts(result).values() if cut.structure.kind != 'blocks']
    assert 0.5 < min(shares) and max(shares) - min(shares) < 0.06, shares


def test_center_loss_goes_on_while_fine_tuning(really_run):
    plain, centered = (
        really_run(name, **more, options={'epochs': 2, 'criterion': 'l2'})['history'][-1]
        for name, more in (('plain', {}), ('centered', {'runner': 'centered', 'center': 10.0})))
    assert centered['train_loss'] > 2 * plain['train_loss']


def test_a_plan_that_ships_tells_what_its_weights_were_trained_with(really_run):
    import ship

    result = really_run('taught', runner='centered', center=0.1, options={'distill': True})
    recipe = ship._plan(result, 'resnet20_cifar/taught').recipe
    assert (recipe['teacher'], recipe['finetune_center']) == ('the dense model', 0.1)


def test_what_can_not_ship_is_said_before_anything_is_written(script, monkeypatch, tmp_path):
    import ship
    monkeypatch.setattr(sys, 'argv', ['ship.py', L1, '--runs', str(tmp_path), '--results', str(tmp_path)])
    for missing in ('images.safetensors', f'{L1}.json', f'{L1}/pruned/model.safetensors'):
        with pytest.raises(SystemExit, match=f'{missing} is not there: run.py makes it'):
            ship.main()
        (tmp_path / missing).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / missing).touch()
