"""The pictures of ``run.py``'s results: ``python benchmarks/cifar10/pictures.py``.

Writes, for each model and set of images, results/<model>.png (top-1 against MACs and against latency, one point an
experiment, bars: standard deviation over its seeds), results/<model>-masks.png (what is alive, and λ, over epochs) and
results/<model>-layers.png (what the best run left of each layer).
"""
import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, Iterator, List, Mapping, Tuple

from table import RESULTS, Runs, by_experiment, by_images, read

from timm_epfs.pictures import draw, draw_layers
from timm_epfs.plan import Plan
from timm_epfs.training.pictures import masks_over_time

MARKERS = 'osD^vPX*<>'
COLOURS = ['#1f4e8c', '#c0562b', '#2e7d5b', '#6a4c93', '#b8860b', '#00838f', '#ad1457', '#555555']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results, and of the pictures')
    results = parser.parse_args().results
    for model, runs in read(results):
        for number, (images, found) in enumerate(by_images(runs).items(), 1):
            dense, experiments = by_experiment(found)
            if experiments:
                _draw(results, model if number == 1 else f'{model}-{number}', images, dense, experiments)


def _draw(results: Path, stem: str, images: str, dense: float, experiments: Mapping[str, Runs]) -> None:
    styles = _styles(experiments)
    draw(results / f'{stem}.png', (12, 4.5), _fronts(images, dense, experiments, styles))
    learned = {name: runs for name, runs in experiments.items() if any(_sparse(run) for run in runs)}
    if learned:
        draw(results / f'{stem}-masks.png', (12, 4), _masks(learned, styles))
    best = max((run for runs in experiments.values() for run in runs), key=lambda run: run['top1']['finetuned'])
    share, top1 = _macs(best), best['top1']['finetuned']
    title = f'{best["name"]}: {100 * share:.0f} % of the MACs, top-1 {top1:.2f} % (dense {dense:.2f} %)'
    draw_layers(results / f'{stem}-layers.png', Plan.from_dict(best['plan']), title)


def _styles(experiments: Mapping[str, Runs]) -> Dict[str, Dict[str, Any]]:
    """A colour and a marker for each method, the same at every budget; the best first, as legends list them."""
    ranked = sorted(experiments, key=lambda name: -mean(_top1(experiments[name])))
    methods = dict.fromkeys(_method(name) for name in ranked)
    return {
        method: {'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, method in enumerate(methods)
    }


def _fronts(images: str, dense: float, experiments: Mapping[str, Runs], styles: Mapping[str, Dict[str, Any]]) -> Any:
    def paint(figure: Any) -> None:
        macs, latency = figure.subplots(1, 2, sharey=True)
        for axis, share in ((macs, _macs), (latency, _latency)):
            for method, style in styles.items():
                points = sorted(_points(experiments, method, share))
                x, y, x_spread, y_spread = zip(*points)
                label = f'{method} ({max(y):.2f} %)'
                axis.errorbar(
                    x, y, y_spread, x_spread, label=label, linewidth=1, markersize=5, capsize=2, **style)
            axis.axhline(dense, color='#999999', linestyle='--', linewidth=1, label=f'dense ({dense:.2f} %)')
            axis.margins(0.15)
        macs.set(xlabel='MACs, share of dense', ylabel='top-1 after fine-tuning, %')
        latency.set(xlabel=f'latency, share of dense ({_conditions(experiments)})')
        lines, labels = macs.get_legend_handles_labels()
        figure.legend(
            lines, labels, title=images, loc='outside right upper', fontsize='x-small', title_fontsize='small')
    return paint


def _masks(experiments: Mapping[str, Runs], styles: Mapping[str, Dict[str, Any]]) -> Any:
    def paint(figure: Any) -> None:
        alive, strength = figure.subplots(1, 2)
        labelled = set()
        for name, run in ((name, run) for name, runs in experiments.items() for run in runs):
            steered = any('lambda' in row for row in _sparse(run))
            label = None if name in labelled else name
            labelled.add(name)
            masks_over_time(
                alive, strength if steered else None, run['history'], linewidth=1, markersize=3, label=label,
                **styles[_method(name)])
        lines, labels = alive.get_legend_handles_labels()
        figure.legend(lines, labels, title='each seed', loc='outside right upper', fontsize='x-small')
    return paint


def _points(experiments: Mapping[str, Runs], method: str, share: Any) -> Iterator[Tuple[float, float, float, float]]:
    """Mean share and top-1 of each experiment of a method, and their standard deviations over the seeds."""
    for name, runs in experiments.items():
        if _method(name) == method:
            shares, top1 = [share(run) for run in runs], _top1(runs)
            yield mean(shares), mean(top1), *((stdev(v) if len(v) > 1 else 0.0) for v in (shares, top1))


def _method(name: str) -> str:
    """``epfs_filters-50``, less the percent that is removed."""
    return name.rpartition('-')[0] or name


def _top1(runs: Runs) -> List[float]:
    return [run['top1']['finetuned'] for run in runs]


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
    return f'batch {either(map(str, batches))}, {either(devices)}, threads: {either(map(str, threads))}'


if __name__ == '__main__':
    main()
