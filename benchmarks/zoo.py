"""Every model of timm and torchvision: traced, cut to half its MACs, checked. One row per name, resumable.

All on the meta device, one thread a process. ``python benchmarks/zoo.py --jobs 2`` writes results/zoo.csv and
results/zoo.json, ``--markdown`` results/zoo.md; ``--baseline torch-pruning`` does the same with torch-pruning alone.
"""
import argparse
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import timm
import torchvision
import zoo_checks
from common import RESULTS, Table, header, header_line, write_json, write_text
from pool import run
from timm.models import model_entrypoint
from tqdm import tqdm

from timm_epfs.surgery import TORCHVISION

LOW = 0.5


def main() -> None:
    args = parse_args()
    baseline = args.baseline is not None
    path = args.results / ('zoo_torch_pruning.csv' if baseline else 'zoo.csv')
    table = Table(path, zoo_checks.BASELINE_COLUMNS if baseline else zoo_checks.COLUMNS)
    names = select(args.patterns)
    if not (args.summary or args.markdown):
        work = zoo_checks.measure_torch_pruning if baseline else zoo_checks.measure
        todo = [name for name in names if is_due(table.rows.get(name), args.redo, args.redo_failed)]
        fill(table, work, todo, args)
    result = summary(table, names)
    show(result)
    if not args.patterns:
        write_json(path.with_suffix('.json'), {'machine': header(), **result})
    if args.markdown:
        write_text(path.with_suffix('.md'), markdown(table, result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('patterns', nargs='*', help='names or patterns, all by default')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--limit', type=float, default=120, help='seconds a name may take')
    parser.add_argument('--memory', type=float, default=8, help='GB a process may allocate')
    parser.add_argument('--redo', action='store_true', help='measure again what has a row')
    parser.add_argument('--redo-failed', action='store_true', help='measure again what failed')
    parser.add_argument('--baseline', choices=['torch-pruning'], help='measure this instead of timm_epfs')
    parser.add_argument('--summary', action='store_true', help='only summarise the rows there are')
    parser.add_argument('--markdown', action='store_true', help='only write the table by module')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def all_names() -> List[str]:
    """Every name of timm itself and every classifier of torchvision."""
    ours = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith('timm.')]
    theirs = torchvision.models.list_models(module=torchvision.models)
    return ours + [TORCHVISION + name for name in theirs]


def select(patterns: Sequence[str]) -> List[str]:
    names = all_names()
    return [n for n in names if not patterns or any(fnmatchcase(n, pattern) for pattern in patterns)]


def is_due(row: Dict[str, str], redo: bool, redo_failed: bool) -> bool:
    """Whether a name is to be measured, given its row of an earlier run."""
    return row is None or redo or (redo_failed and row['status'] != 'ok')


def fill(table: Table, work, names: List[str], args: argparse.Namespace) -> None:
    """Measure names in processes of their own, so that none takes the others with it."""
    failed = 0
    try:
        with tqdm(total=len(names), unit='name', smoothing=0.05) as bar:
            for name, row in run(work, names, args.jobs, args.limit, args.memory):
                if 'name' not in row:
                    lost = {'timeout': f'more than {args.limit:g} s', 'crash': 'the process died'}[row['status']]
                    row = {'name': name, 'module': zoo_checks.module_of(name), 'error': lost, **row}
                table.put(row)
                failed += row['status'] != 'ok'
                if row['status'] != 'ok':
                    bar.write(f'{name}: {row["status"]}: {row["error"]}')
                bar.set_postfix(failed=failed)
                bar.update()
    finally:
        table.save()


def summary(table: Table, names: Sequence[str]) -> Dict[str, Any]:
    """Figures over the rows there are, for timm and torchvision."""
    result = {}
    for library in ('timm', 'torchvision'):
        mine = [n for n in names if n.startswith(TORCHVISION) == (library == 'torchvision')]
        done = [n for n in mine if n in table.rows]
        if done:
            result[library] = {'names': len(mine), **_figures(table, done)}
    return result


def _figures(table: Table, names: List[str]) -> Dict[str, Any]:
    rows = [table.rows[n] for n in names]
    ok = [row['name'] for row in rows if row['status'] == 'ok']
    seconds = table.numbers('seconds', names)
    figures = {
        'measured': len(rows),
        'ok': len(ok),
        'share_ok': len(ok) / len(rows),
        'seconds_p50_p90_max': [round(float(np.quantile(seconds, q)), 2) for q in (0.5, 0.9, 1)] if seconds else [],
        'failures': dict(Counter(row['status'] for row in rows if row['status'] != 'ok').most_common()),
    }
    shares = table.numbers('share_cuttable', names)
    if shares:
        figures['share_cuttable_median_min'] = [float(np.median(shares)), min(shares)]
        figures['share_cuttable_low'] = {
            row['name']: float(row['share_cuttable']) for row in rows
            if row['share_cuttable'] and float(row['share_cuttable']) < LOW
        }
        errors = [abs(e) for c in ('cost_error_dense', 'cost_error_pruned') for e in table.numbers(c, names)]
        figures['cost_error_max'] = max(errors, default=None)
        figures['streams_used'] = sum(row['streams_used'] == 'True' for row in rows)
    return figures


def show(result: Dict[str, Any]) -> None:
    for library, figures in result.items():
        print(f'{library}: {figures["ok"]} of {figures["measured"]} measured names ok '
              f'({figures["share_ok"]:.1%}), {figures["names"]} names in all')
        for key, value in figures.items():
            if key not in ('names', 'measured', 'ok', 'share_ok'):
                print(f'  {key}: {value}')


def markdown(table: Table, result: Dict[str, Any]) -> str:
    """The coverage by module of timm, and a line for torchvision."""
    lines = ['# The whole zoo, cut to half its MACs', '', header_line(header()), '']
    for library, figures in result.items():
        ok, names = figures['ok'], figures['names']
        lines.append(f'- {library}: {ok} of {names} names ({ok / names:.1%}); {_in_words(figures)}')
    lines += ['', '| module | names | ok | median share of MACs cuttable | not yet |', '|---|---|---|---|---|']
    groups: Dict[str, List[str]] = {}
    for name in sorted(table.rows):
        group = 'torchvision' if name.startswith(TORCHVISION) else table.rows[name]['module']
        groups.setdefault(group, []).append(name)
    for group in sorted(groups, key=lambda g: (g == 'torchvision', g)):
        lines.append(_markdown_row(table, group, groups[group]))
    return '\n'.join(lines) + '\n'


def _in_words(figures: Dict[str, Any]) -> str:
    median, least = figures['share_cuttable_median_min']
    _, most, longest = figures['seconds_p50_p90_max']
    return (f'share of the MACs in layers that can be cut: median {median:.2f}, lowest {least:.2f}; '
            f'90 % of the names take at most {most:.1f} s, the slowest {longest:.0f} s')


def _markdown_row(table: Table, group: str, names: List[str]) -> str:
    bad = [n for n in names if table.rows[n]['status'] != 'ok']
    shares = table.numbers('share_cuttable', names) if 'share_cuttable' in table.columns else []
    median = f'{np.median(shares):.2f}' if shares else ''
    rest = [f'`{n}` ({table.rows[n]["status"]}: {table.rows[n]["error"]})' for n in bad[:3]]
    rest += [f'{len(bad) - 3} more'] if len(bad) > 3 else []
    return f'| {group} | {len(names)} | {len(names) - len(bad)} | {median} | {", ".join(rest)} |'


if __name__ == '__main__':
    main()
