"""The tables of ``run.py``'s results, and nothing that isn't in them: ``python benchmarks/comparison/table.py``.

Writes <images>/results/<model>.md, one table for each set of images; seeds of one experiment are one row, and those of
one budget stand together, the best first.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Collection, Dict, Iterator, List, Mapping, Sequence, Tuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from common import header_line, write_text  # noqa: E402

COLUMNS = (
    'experiment', 'seeds', 'MACs', 'parameters', 'top-1 when cut, %', 'fine-tuned, %', 'Δ to dense',
    'on training images, %', 'epochs', 'in',
)

Runs = List[Dict[str, Any]]
FOLDERS = [path.parent / 'results' for path in sorted(HERE.parent.glob('*/experiments'))]  # of results, by images


def main() -> None:
    for results in filter(Path.exists, FOLDERS):
        for model, runs in read(results):
            if not by_experiment(runs)[1]:  # the dense weights that trials start from
                continue
            text = markdown(model, runs)
            write_text(results / f'{model}.md', text)
            print(text)


def read(results: Path) -> Iterator[Tuple[str, Runs]]:
    """Every model's name and results."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        yield folder.name, [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]


def by_images(runs: Sequence[Dict[str, Any]]) -> Dict[str, Runs]:
    """Results that may be compared, by the images they were made with."""
    groups = defaultdict(list)
    for run in runs:
        groups[run['images']].append(run)
    return groups


def by_experiment(runs: Sequence[Dict[str, Any]]) -> Tuple[float, Dict[str, Runs]]:
    """Top-1 of the dense baseline in percent, and the other results by experiment: one per seed."""
    groups = defaultdict(list)
    for run in runs:
        groups[run['name'].partition('/')[2].rpartition('-')[0]].append(run)
    dense = groups.pop('dense', runs)[0]
    return _start(dense, runs), groups


def ranked(experiments: Mapping[str, Runs]) -> List[str]:
    """Names of one budget after the other, the best of each first."""
    return sorted(experiments, key=lambda name: (_removed(name), -mean(map(top1, experiments[name]))))


def _removed(name: str) -> int:
    """``epfs_filters-50``: the percent of the MACs that is asked to go."""
    percent = name.rpartition('-')[2]
    return int(percent) if percent.isdecimal() else 0


def top1(run: Mapping[str, Any]) -> float:
    """In percent, after fine-tuning."""
    return run['top1']['finetuned']


def markdown(model: str, runs: Sequence[Dict[str, Any]]) -> str:
    parts = [f'# {model}', '']
    for images, found in by_images(runs).items():
        parts += [*_table(images, found), '']
    return '\n'.join(parts)


def _table(images: str, runs: Runs) -> List[str]:
    _, experiments = by_experiment(runs)
    starts = {run['name']: _start(run, runs) for run in runs}
    rows = [_row(name, experiments[name], starts) for name in ranked(experiments)]
    machines = sorted({header_line(run['machine']) for run in runs})
    return [
        f'{images}. Dense: {_range(starts.values())}. Where there are several seeds, mean ± standard deviation. '
        'On training images: augmented, over the last epoch.',
        *machines,
        '',
        f'| {" | ".join(COLUMNS)} |', '|' + '---|' * len(COLUMNS),
        *(f'| {" | ".join(row)} |' for row in rows),
    ]


def _start(run: Dict[str, Any], runs: Runs) -> float:
    """Top-1 of the weights that a run started from, which the last of the others tell where it trained them on."""
    if not run['epochs']['dense']:
        return run['top1']['dense']
    others = [other for other in runs if not other['epochs']['dense'] and _date(other) <= _date(run)]
    return max(others, key=_date, default=run)['top1']['dense']


def _date(run: Mapping[str, Any]) -> str:
    return run['machine']['date']


def _range(values: Collection[float]) -> str:
    least, most = (f'{pick(values):.2f}' for pick in (min, max))
    return f'{least} %' if least == most else f'{least} to {most} % (Δ is to the weights that a run started from)'


def _row(name: str, runs: Runs, starts: Mapping[str, float]) -> List[str]:
    gap = mean(top1(run) - starts[run['name']] for run in runs)
    return [
        name.rpartition('-')[0] or name, str(len(runs)),
        *(f'{mean(run[quantity][1] / run[quantity][0] for run in runs):.3f}' for quantity in ('macs', 'params')),
        _spread([run['top1']['cut'] for run in runs]), _spread([top1(run) for run in runs]), f'{gap:+.2f}',
        f'{mean(run["history"][-1]["train_top1"] for run in runs):.2f}',
        ' + '.join(f'{count} {phase}' for phase, count in runs[0]['epochs'].items() if count),
        ', '.join(sorted({_precision(run) for run in runs})),
    ]


def _precision(run: Dict[str, Any]) -> str:
    options = run['experiment']['options']
    return options.get('amp-dtype', 'bfloat16') if options.get('amp') else 'float32'


def _spread(values: Sequence[float]) -> str:
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


if __name__ == '__main__':
    main()
