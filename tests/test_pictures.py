"""Pictures show the numbers they are made of."""
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import timm
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import timm_epfs
from timm_epfs.core import PruningError
from timm_epfs.plan import Plan
from timm_epfs.report import draw, draw_layers
from timm_epfs.training.run_pictures import masks_over_time

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def slim():
    return timm_epfs.prune('test_vit', macs=0.6, criterion='random')


@pytest.fixture(scope='module')
def shorter():
    return timm_epfs.prune('resnet20_cifar', macs=0.6, kinds=['channels', 'blocks'], criterion='l1')


def bars(figure, label):
    """Heights of the bars of that label by layer, of all rows."""
    names = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    found = {}
    for axis in figure.axes:
        for container in axis.containers:
            if container.get_label() == label:
                found.update({names[round(b.get_x() + b.get_width() / 2)]: b.get_height() for b in container})
    return found


def test_bars_are_the_units_that_each_layer_had_and_has(slim):
    figure, inner = timm_epfs.plot(slim), [c for c in slim.pruning_plan.cuts if c.structure.kind != 'blocks']
    assert bars(figure, 'dense') == {c.structure.name: c.structure.units for c in inner}
    assert bars(figure, 'left') == {c.structure.name: len(c.keep) for c in inner}
    assert list(bars(figure, 'left')) != [] and bars(figure, 'gone with its block') == {}


def test_each_kind_of_unit_has_a_row(slim):
    assert [axis.get_ylabel() for axis in timm_epfs.plot(slim).axes] == ['channels', 'heads']


def test_bars_follow_the_depth(shorter):
    dense = bars(timm_epfs.plot(shorter), 'dense')
    modules = [name for name, _ in timm.create_model('resnet20_cifar').named_modules()]
    ranks = [modules.index(name.partition('#')[0]) for name in sorted(dense, key=list(dense).index)]
    names = [text.get_text() for text in timm_epfs.plot(shorter).axes[-1].get_xticklabels()]
    assert sorted(ranks) == [modules.index(name.partition('#')[0]) for name in names]


def test_what_went_with_a_block_is_hatched_and_has_nothing_left(shorter):
    removed = set(shorter.pruning_plan.removed_blocks())
    figure = timm_epfs.plot(shorter)
    gone, left = bars(figure, 'gone with its block'), bars(figure, 'left')
    assert removed and removed <= set(gone)
    assert {f'{name}.conv1' for name in removed} <= set(gone)
    state = shorter.state_dict()
    for name, height in left.items():
        assert (height == 0) == (name in gone)
        if name.endswith('conv1'):
            assert len(state.get(f'{name}.weight', ())) == height
    hatched = [c for axis in figure.axes for c in axis.containers if c.get_label() == 'gone with its block']
    assert all(bar.get_hatch() for container in hatched for bar in container)


def test_a_plan_its_file_its_folder_and_its_model_give_one_picture(slim, tmp_path):
    slim.pruning_plan.save(tmp_path / 'plan.json')
    timm_epfs.save_pretrained(slim, tmp_path / 'half')
    expected = bars(timm_epfs.plot(slim), 'left')
    told = slim.pruning_plan.to_dict()
    for source in (slim.pruning_plan, told, tmp_path / 'plan.json', str(tmp_path / 'plan.json'), tmp_path / 'half'):
        figure = timm_epfs.plot(source)
        assert isinstance(figure, Figure) and bars(figure, 'left') == expected


def test_a_deep_model_stays_readable_and_small(tmp_path):
    plan = Plan.load(timm_epfs.zoo.variants.plan_path('resnet110_cifar_epfs50'))
    assert sum(cut.structure.kind != 'blocks' for cut in plan.cuts) > 50
    figure = timm_epfs.plot(plan)
    assert len(figure.axes[-1].get_xticklabels()) <= 50 and figure.get_size_inches()[0] <= 15
    assert len(figure.axes[0].containers[0]) == sum(cut.structure.kind != 'blocks' for cut in plan.cuts)
    assert draw_layers(tmp_path / 'layers.png', plan)
    assert (tmp_path / 'layers.png').stat().st_size < 100_000
    assert Image.open(tmp_path / 'layers.png').size[0] > 1000


def test_a_plan_without_structures_gives_an_empty_picture():
    assert timm_epfs.plot(Plan('resnet18', {}, ())).axes


@pytest.mark.parametrize('source, message', [
    (nn.Linear(2, 2), 'Linear has no pruning_plan'),
    (Path('no_such_plan.json'), 'no_such_plan.json'),
    (None, 'needs a plan'),
])
def test_bad_input_gets_one_line(source, message):
    with pytest.raises(PruningError, match=message) as e:
        timm_epfs.plot(source)
    assert '\n' not in str(e.value)


def test_a_folder_without_a_model_gets_one_line(tmp_path):
    with pytest.raises(PruningError, match='holds no model') as e:
        timm_epfs.plot(tmp_path)
    assert '\n' not in str(e.value)


def test_without_matplotlib_one_line_says_what_to_install(slim, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(PruningError, match=r"pip install 'timm-epfs\[plot\]'") as e:
        timm_epfs.plot(slim)
    assert '\n' not in str(e.value)


def test_masks_over_time_are_those_of_the_sparse_phase():
    history = [
        {'phase': 'dense', 'alive': 1.0},
        {'phase': 'sparse', 'alive': 0.8, 'lambda': 0.1},
        {'phase': 'sparse', 'alive': 0.5, 'lambda': 0.2},
        {'phase': 'cut', 'alive': 0.5},
    ]
    alive, strength = Figure().subplots(1, 2)
    masks_over_time(alive, strength, history)
    (line,), (steered,) = alive.get_lines(), strength.get_lines()
    assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata() == pytest.approx([100, 80, 50])
    assert steered.get_xdata().tolist() == [1, 2] and steered.get_ydata() == pytest.approx([0.1, 0.2])


class TestComparison:
    """The pictures of the comparison on CIFAR-10."""

    @pytest.fixture
    def pictures(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / 'benchmarks' / 'comparison'))
        for name in ('pictures', 'table'):
            monkeypatch.delitem(sys.modules, name, raising=False)
        import pictures
        yield pictures
        for name in ('pictures', 'table', 'records', 'common'):
            sys.modules.pop(name, None)

    @pytest.fixture
    def experiments(self):
        rng = np.random.default_rng(0)
        return {
            f'{method}-{percent}': [
                {
                    'top1': {'finetuned': float(rng.uniform(84, 90))}, 'macs': [2.0, 2 - percent / 50],
                    'latency_ms': [4.0, float(rng.uniform(2, 4))],
                    'latency': {'threads': 1, 'batch_size': 1, 'device': 'cpu'},
                    'experiment': {'options': {'method': 'epfs' if method == 'epfs' else 'none'}},
                    'history': [{'phase': 'sparse', 'alive': 0.5, 'lambda': 0.1}] if method == 'epfs' else [],
                }
                for _ in range(seeds)
            ]
            for method, percent, seeds in (('epfs', 50, 3), ('epfs', 25, 1), ('l1', 50, 2))
        }

    def test_points_are_means_and_bars_deviations_over_the_seeds(self, pictures, experiments):
        figure = Figure()
        pictures._ranks('images', 91.0, experiments)(figure)
        top1, macs, latency = figure.axes
        names = [label.get_text() for label in top1.get_yticklabels()]
        at = names.index('epfs-50')
        assert names[0] == 'epfs-25' and set(names[1:]) == {'epfs-50', 'l1-50'}
        line = top1.containers[at]
        values = [run['top1']['finetuned'] for run in experiments['epfs-50']]
        assert (line[0].get_xdata()[0], line[0].get_ydata()[0]) == (pytest.approx(mean(values)), at)
        low, high = line[2][0].get_segments()[0][:, 0]
        assert (high - low) / 2 == pytest.approx(stdev(values))
        assert [line[0].get_xdata()[0] for line in macs.containers] == pytest.approx([0.75, 0.5, 0.5])
        shares = [run['latency_ms'][1] / 4 for run in experiments['l1-50']]
        assert latency.containers[names.index('l1-50')][0].get_xdata()[0] == pytest.approx(mean(shares))

    def test_what_a_run_lost_is_told_from_the_last_weights_before_it(self, pictures):
        def run(name, date, dense, trained=0):
            return {
                'name': f'net/{name}-50-0', 'machine': {'date': date}, 'epochs': {'dense': trained},
                'top1': {'dense': dense},
            }

        runs = [run('l1', '2026-01-01', 88.2), run('l2', '2026-01-03', 88.3), run('fpgm', '2026-01-09', 88.4)]
        sparse = [run('group_norm', day, 85.0, trained=6) for day in ('2026-01-02', '2026-01-05', '2025-12-31')]
        table = sys.modules['table']
        assert [table._start(run, [*sparse, *runs]) for run in sparse] == [88.2, 88.3, 85.0]
        dense = {**run('', '2026-01-03', 88.25, trained=6), 'name': 'net/dense-0'}
        assert table.by_experiment([dense, *runs])[0] == 88.3  # as it was stored

    def test_what_is_far_below_dense_stands_at_the_edge_with_its_number(self, pictures, experiments):
        experiments['l1-50'] = experiments['l1-50'][:1]
        experiments['l1-50'][0]['top1']['finetuned'] = 12.34
        figure = Figure()
        pictures._ranks('images', 91.0, experiments)(figure)
        top1 = figure.axes[0]
        assert [text.get_text() for text in top1.texts] == ['◂ 12.34'] and top1.get_xlim()[0] > 70

    def test_as_many_experiments_as_a_model_has_look_different(self, pictures):
        folders = (ROOT / 'benchmarks/cifar10/experiments').iterdir()
        names = max(([path.stem for path in folder.glob('*.json')] for folder in folders), key=len)
        styles = pictures._styles(names)
        assert len({(style['color'], style['marker']) for style in styles.values()}) == len(styles) >= 20

    def test_committed_results_give_small_pictures(self, pictures, tmp_path, monkeypatch):
        """All are painted; to save time, only those of the model with the most experiments are written."""
        committed, painted = ROOT / 'benchmarks/cifar10/results', set()

        def draw_some(path, size, paint):
            painted.add(path.name)
            if path.stem.partition('-')[0] == 'resnet20_cifar':
                return draw(path, size, paint)
            return paint(Figure(figsize=size))

        shutil.copytree(committed, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.png'))
        for module in ('pictures', 'timm_epfs.report.pictures'):
            monkeypatch.setattr(f'{module}.draw', draw_some)
        monkeypatch.setattr(sys, 'argv', ['pictures.py', '--results', str(tmp_path)])
        pictures.main()
        drawn = {path.name: path.stat().st_size for path in tmp_path.glob('*.png')}
        assert len(drawn) == 3 and max(drawn.values()) < 100_000
        assert painted == {path.name for path in committed.glob('*.png')}
