"""The pictures of ``run.py``'s results: ``python benchmarks/comparison/pictures.py``.

Writes, for each model and set of images, <model>.png (top-1, MACs and latency of each experiment, bars: standard
deviation over its seeds), <model>-masks.png (what is alive, and λ, over epochs) and <model>-layers.png (what the best
run left of each layer), beside the results.
"""
import argparse
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple

from records import plan_of
from table import FOLDERS, Runs, by_experiment, by_images, ranked, read, top1

from timm_epfs.report import draw, draw_layers
from timm_epfs.training.run_pictures import masks_over_time

MARKERS = 'osD^vPX*<>'
COLOURS = ['#1f4e8c', '#c0562b', '#2e7d5b', '#6a4c93', '#b8860b', '#00838f', '#ad1457', '#555555']
FAMILIES = {'epfs': ('EPFS', '#1f4e8c'), 'none': ('cut by a ranking, or from scratch', '#555555')}
OTHERS = ('other methods that learn', '#c0562b')
FAR = 8  # points below dense: what is further down would squeeze the rest, and is a number at the edge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--results', type=Path, nargs='+', default=FOLDERS, help='folders of the results, and of the pictures')
    for results in filter(Path.exists, parser.parse_args().results):
        for model, runs in read(results):
            for number, (images, found) in enumerate(by_images(runs).items(), 1):
                dense, experiments = by_experiment(found)
                if experiments:
                    _draw(results, model if number == 1 else f'{model}-{number}', images, dense, experiments)


def _draw(results: Path, stem: str, images: str, dense: float, experiments: Mapping[str, Runs]) -> None:
    draw(results / f'{stem}.png', (11, 1.6 + 0.2 * len(experiments)), _ranks(images, dense, experiments))
    learned = {name: runs for name, runs in experiments.items() if any(_sparse(run) for run in runs)}
    if learned:
        draw(results / f'{stem}-masks.png', (12, max(4, 0.6 + 0.17 * len(learned))), _masks(learned))
    best = max((run for runs in experiments.values() for run in runs), key=top1)
    title = f'{best["name"]}: {100 * _macs(best):.0f} % of the MACs, top-1 {top1(best):.2f} % (dense {dense:.2f} %)'
    draw_layers(results / f'{stem}-layers.png', plan_of(best['plan']), title)


def _ranks(images: str, dense: float, experiments: Mapping[str, Runs]) -> Callable[[Any], None]:
    """One line per experiment, of one budget after the other, the best of each first."""
    names = ranked(experiments)

    def paint(figure: Any) -> None:
        accuracy, macs, latency = figure.subplots(1, 3, sharey=True, width_ratios=(4, 1.1, 1.1))
        rows = [experiments[name] for name in names]
        _panel(accuracy, f'top-1 after fine-tuning, % ({images})', rows, top1, dense - FAR)
        _panel(macs, 'MACs, share of dense', rows, _macs)
        _panel(latency, f'latency, share of dense\n{_conditions(experiments)}', rows, _latency)
        accuracy.axvline(dense, color='#999999', linestyle='--', linewidth=1, label=f'dense ({dense:.2f} %)')
        accuracy.set_yticks(range(len(names)), names, fontsize='x-small')
        accuracy.set_ylim(len(names) - 0.4, -0.6)
        labels = {label: line for line, label in zip(*accuracy.get_legend_handles_labels())}
        figure.legend(labels.values(), labels.keys(), loc='outside upper left', ncols=4, fontsize='x-small')
    return paint


def _panel(axis: Any, title: str, rows: List[Runs], value: Callable[[Any], float], least: float = -math.inf) -> None:
    """The mean of a value over the seeds of each experiment; of less than ``least``, its number at the edge."""
    for at, runs in enumerate(rows):
        values = [value(run) for run in runs]
        x, (label, colour) = mean(values), _family(runs)
        if x < least:
            axis.text(0.01, at, f'◂ {x:.2f}', color=colour, fontsize='x-small', va='center',
                      transform=axis.get_yaxis_transform())
        else:
            spread = stdev(values) if len(values) > 1 else None
            axis.errorbar(x, at, xerr=spread, fmt='o', color=colour, markersize=4, capsize=2, label=label)
    axis.grid(axis='y', linewidth=0.3)
    axis.set_xlabel(title, fontsize='small')


def _family(runs: Runs) -> Tuple[str, str]:
    """What an experiment is called in the legend, and its colour."""
    return FAMILIES.get(runs[0]['experiment']['options']['method'], OTHERS)


def _styles(names: Iterable[str]) -> Dict[str, Dict[str, Any]]:
    """A colour and a marker for each experiment."""
    return {
        name: {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def _masks(experiments: Mapping[str, Runs]) -> Callable[[Any], None]:
    styles = _styles(experiments)

    def paint(figure: Any) -> None:
        alive, strength = figure.subplots(1, 2)
        labelled = set()
        for name, run in ((name, run) for name, runs in experiments.items() for run in runs):
            steered = any('lambda' in row for row in _sparse(run))
            label = None if name in labelled else name
            labelled.add(name)
            masks_over_time(
                alive, strength if steered else None, run['history'], linewidth=1, markersize=3, label=label,
                **styles[name])
        lines, labels = alive.get_legend_handles_labels()
        figure.legend(lines, labels, title='each seed', loc='outside right upper', fontsize='x-small')
    return paint


def _macs(run: Mapping[str, Any]) -> float:
    return run['macs'][1] / run['macs'][0]


def _latency(run: Mapping[str, Any]) -> float:
    return run['latency_ms'][1] / run['latency_ms'][0]


def _sparse(run: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    return [row for row in run['history'] if row['phase'] == 'sparse']


def _conditions(experiments: Mapping[str, Runs]) -> str:
    """What latency was measured under, all of it where that differs between runs."""
    found = [run['latency'] for runs in experiments.values() for run in runs]
    threads, batches, devices = (sorted({f[key] for f in found}) for key in ('threads', 'batch_size', 'device'))
    either = ' or '.join
    return f'batch {either(map(str, batches))}, {either(devices)}\nthreads: {either(map(str, threads))}'


if __name__ == '__main__':
    main()
