"""The tables and the picture of what ``training_free.py`` measured."""
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

import matplotlib.pyplot as plt
import numpy as np
from common import header_line

STEPS = {
    'cut': 'cut', 'bn': 'BatchNorm recalibrated', 'bn_corrected': 'BatchNorm corrected', 'compensated': 'compensated',
}
Rows = Dict[Tuple[str, float], Dict[int, Dict[str, float]]]  # top-1 and ratios by ranking and MACs, and by seed


def markdown(results: Dict[str, Any]) -> str:
    """All cuts by budget and ranking, and what more images give."""
    dense = list(dense_rows(results).values())
    images = usual_images(results)
    lines = [
        f'# {results["model"]} without any training',
        '',
        f'Top-1 on {dense[0]["test_images"]:,} images, dense {spread(row["top1"] for row in dense)} %. Fitted on '
        f'{images:,} other images without labels ({results["images"]}). With ±: mean and standard deviation over '
        f'several choices of these.',
        header_line(results['machine']),
        '',
        f'| MACs | ranking | {" | ".join(STEPS.values())} | lost |',
        '|---|---|' + '---|' * (len(STEPS) + 1),
    ]
    found = rows_by_cut(results, images)
    for ranking, macs in sorted(found, key=lambda key: (-key[1], key[0])):
        seeds = found[ranking, macs]
        errors = [row['error'] for row in seeds.values() if 'error' in row]
        if errors:
            lines.append(f'| – | {ranking} at {macs:g} fails: {errors[0]} |{" – |" * (len(STEPS) + 1)}')
            continue
        ratio = np.mean([row['macs_ratio'] for row in seeds.values()])
        steps = ' | '.join(spread(row[step] for row in seeds.values() if step in row) for step in STEPS)
        lines.append(f'| {ratio:.3f} | {ranking} | {steps} | {spread(lost(results, seeds))} |')
    return '\n'.join([*lines, *by_images(results)]) + '\n'


def by_images(results: Dict[str, Any]) -> List[str]:
    """A table of top-1 after compensation by number of images, where several were tried."""
    found = {images: rows_by_cut(results, images) for images in sorted({row['images'] for row in cuts(results)})}
    several = sorted({key for rows in list(found.values())[:-1] for key in rows})
    if not several:
        return []
    lines = [
        '',
        'Top-1 after compensation, by the number of images:',
        '',
        f'| MACs | ranking | {" | ".join(f"{images:,}" for images in found)} |',
        '|---|---|' + '---|' * len(found),
    ]
    for key in several:
        values = [spread(row['compensated'] for row in rows.get(key, {}).values() if 'compensated' in row)
                  for rows in found.values()]
        lines.append(f'| {key[1]:g} | {key[0]} | {" | ".join(values)} |')
    return lines


def draw(results: Dict[str, Any], path: Path) -> None:
    """Top-1 against MACs: each ranking, compensated and with BatchNorm recalibrated."""
    found = rows_by_cut(results, usual_images(results))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    rankings = sorted({ranking for ranking, _ in found})
    curves = [(ranking, step) for ranking in rankings for step in ('compensated', 'bn')]
    for ranking, step in curves:
        points = [
            (np.mean([row['macs_ratio'] for row in seeds.values() if step in row]),
             np.mean([row[step] for row in seeds.values() if step in row]))
            for (name, _), seeds in found.items() if name == ranking and any(step in row for row in seeds.values())]
        if points:
            style = {'compensated': '-', 'bn': ':'}[step]
            axes.plot(*zip(*sorted(points)), style, marker='.', label=f'{ranking}, {STEPS[step]}')
    axes.axhline(np.mean([row['top1'] for row in dense_rows(results).values()]), color='grey', linewidth=0.8)
    axes.set(xlabel='share of the MACs', ylabel='top-1, %', title=f'{results["model"]} without any training')
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
    figure.savefig(path, dpi=110, metadata={'Software': None})
    plt.close(figure)


def rows_by_cut(results: Dict[str, Any], images: int) -> Rows:
    """The cuts that were fitted on so many images."""
    found: Rows = defaultdict(lambda: defaultdict(dict))
    for row in cuts(results):
        if row['images'] == images:
            found[row['ranking'], row['macs']][row['seed']] = row
    return found


def lost(results: Dict[str, Any], seeds: Dict[int, Dict[str, float]], step: str = '') -> List[float]:
    """Points lost after a step, by seed; after compensation, or what comes instead of it, if none is named."""
    step = step or ('compensated' if any('compensated' in row for row in seeds.values()) else 'bn')
    return [dense_rows(results)[seed]['top1'] - row[step] for seed, row in seeds.items() if step in row]


def cuts(results: Dict[str, Any]) -> List[Dict[str, Any]]:
    return [row for row in results['cuts'].values() if 'ranking' in row]


def dense_rows(results: Dict[str, Any]) -> Dict[int, Dict[str, Any]]:
    """The dense model, by seed."""
    return {row['seed']: row for row in results['cuts'].values() if 'ranking' not in row}


def usual_images(results: Dict[str, Any]) -> int:
    """The number of images that most cuts were fitted on."""
    numbers = [row['images'] for row in cuts(results)]
    return max(set(numbers), key=numbers.count)


def spread(values: Iterable[float]) -> str:
    """Mean, and standard deviation of several values."""
    values = list(values)
    if not values:
        return '–'
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')
