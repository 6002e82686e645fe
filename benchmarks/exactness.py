"""Masked against cut, on real numbers: 30 % of every structure marked exact, in one model of each family.

Weights are random, and no norm parameter, statistic, bias or constant stays at a value that could hide a mistake.
Masking zeroes, in the dense model, the entries by which consumers read the removed units, and for a residual block what
its branches end with. One row per name in results/exactness.csv, resumable.
"""
import argparse
import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
import zoo
from common import RESULTS, Table, header, header_line, one_line, write_json, write_text
from pool import run
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm
from zoo_checks import module_of

from timm_epfs.plan import make_plan
from timm_epfs.pruner import example_for, trace_model
from timm_epfs.surgery import TORCHVISION, apply_plan, build_base
from timm_epfs.trace import Trace

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

from helpers import distance, flat, masked, randomise  # noqa: E402

COLUMNS = (
    'name', 'module', 'status', 'error', 'error64', 'changed', 'exact', 'inexact', 'reasons', 'params', 'message',
)
SHARE, TOLERANCE, BATCH = 0.3, 1e-4, 2


def main() -> None:
    args = parse_args()
    table = Table(args.results / 'exactness.csv', COLUMNS)
    if not args.summary:
        names = args.names or representatives(args)
        todo = [n for n in names if n not in table.rows or args.redo or table.rows[n]['status'] != 'ok']
        try:
            with tqdm(total=len(todo), unit='name') as bar:
                for name, row in run(measure, todo, args.jobs, args.limit, args.memory):
                    row = {'name': name, 'module': module_of(name), **row}
                    table.put(row)
                    if row['status'] != 'ok':
                        bar.write(f'{name}: {row["status"]}: error {row.get("error")} {row.get("message", "")}')
                    bar.update()
        finally:
            table.save()
    result = summary(table)
    print(json.dumps(result, indent=1))
    if not args.names:
        write_json(args.results / 'exactness.json', {'machine': header(), **result})
        write_text(args.results / 'exactness.md', markdown(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help='these names only')
    parser.add_argument('--families', type=Path, help='JSON object whose keys are the names to check; '
                        'without it the smallest name of each python module of timm')
    parser.add_argument('--max-params', type=float, default=150e6, help='leave out larger models')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--limit', type=float, default=300, help='seconds a name may take')
    parser.add_argument('--memory', type=float, default=10, help='GB a process may allocate')
    parser.add_argument('--redo', action='store_true', help='measure again what has a row')
    parser.add_argument('--summary', action='store_true', help='only summarise the rows there are')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def representatives(args: argparse.Namespace) -> List[str]:
    """The families' names, or the smallest of each module of timm, and the smallest of each module of torchvision."""
    names = zoo.all_names()
    chosen = list(json.loads(args.families.read_text())) if args.families else []
    rest = [n for n in names if not chosen or n.startswith(TORCHVISION)]
    smallest: Dict[Tuple[bool, str], Tuple[int, str]] = {}
    for name in tqdm(rest, desc='smallest of each module', unit='name', leave=False):
        key = (name.startswith(TORCHVISION), module_of(name))
        found = (_parameters(build_base(name, device='meta')), name)
        smallest[key] = min(smallest.get(key, found), found)
    chosen = {name: _parameters(build_base(name, device='meta')) for name in chosen}
    chosen.update({name: params for params, name in smallest.values()})
    return [name for name, params in sorted(chosen.items(), key=lambda item: item[1]) if params < args.max_params]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def measure(name: str) -> Dict[str, Any]:
    """The row of one name."""
    row = {'status': 'failed'}
    try:
        torch.manual_seed(0)
        model = randomise(build_base(name).eval())
        traced = trace_model(model)
        structures = traced.structures
        exact = [s for s in structures if s.exact]
        row.update(
            params=_parameters(model),
            exact=len(exact),
            inexact=len(structures) - len(exact),
            reasons=' | '.join(f'{n} × {why}' for why, n in Counter(
                s.reason for s in structures if not s.exact).most_common()),
        )
        row['error'], row['changed'] = compare(model, traced)
        if not row['error'] <= TOLERANCE:
            row['error64'], _ = compare(model.double(), traced)
        good = row.get('error64', row['error']) <= TOLERANCE and (row['changed'] > 0 or not exact)
        row['status'] = 'ok' if good else 'differs'
    except Exception as e:
        row['message'] = one_line(e)
    return row


@torch.no_grad()
def compare(model: nn.Module, traced: Trace) -> Tuple[float, float]:
    """How far masked is from cut, and how far masking moved the output, both relative to the masked output."""
    keep, left = {}, {}
    blocks = [s.name for s in traced.structures if s.kind == 'blocks']
    gone_blocks = set(np.random.default_rng(0).permutation(blocks)[:round(SHARE * len(blocks))])
    for i, s in enumerate(traced.structures):
        if s.kind == 'blocks':
            gone = int(s.name in gone_blocks)
        else:
            gone = max(1, round(SHARE * s.units)) if s.exact else 0
        keep[s.name] = np.sort(np.random.default_rng(i).permutation(s.units)[gone:])
        left[s.name] = len(keep[s.name])
    plan = make_plan(traced, keep, {})
    inputs = _inputs(model)
    dense = _output(model, inputs)
    cut = _output(apply_plan(copy.deepcopy(model), plan), inputs)
    zeroed = _output(masked(model, traced.structures, keep), inputs)
    return distance(zeroed, cut), distance(zeroed, dense)


def _inputs(model: nn.Module):
    generator = torch.Generator().manual_seed(1)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def real(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.randn(BATCH, *x.shape[1:], generator=generator).to(dtype)

    return tree_map(real, example_for(model))


def _output(model: nn.Module, inputs) -> torch.Tensor:
    args, kwargs = inputs
    return flat(model(*args, **kwargs))


def summary(table: Table) -> Dict[str, Any]:
    """Figures over all rows, and how many structures are not exact for which reason."""
    rows = list(table.rows.values())
    measured = sorted((r for r in rows if r['error']), key=lambda r: -_error(r))
    reasons: Counter = Counter()
    for r in rows:
        for part in filter(None, r['reasons'].split(' | ')):
            count, _, why = part.partition(' × ')
            reasons[why] += int(count)
    return {
        'names': len(rows),
        'ok': sum(r['status'] == 'ok' for r in rows),
        'not_ok': {r['name']: r['status'] for r in rows if r['status'] != 'ok'},
        'worst': {r['name']: _error(r) for r in measured[:5]},
        'median_error': float(np.median([_error(r) for r in measured])) if measured else None,
        'float64_needed': {r['name']: (float(r['error']), float(r['error64'])) for r in measured if r['error64']},
        'structures_exact': sum(int(r['exact'] or 0) for r in rows),
        'structures_inexact': sum(int(r['inexact'] or 0) for r in rows),
        'reasons': dict(reasons.most_common()),
    }


def markdown(result: Dict[str, Any]) -> str:
    worst, error = next(iter(result['worst'].items()))
    lines = [
        '# Masked against cut',
        '',
        f'In each of {result["names"]} models, 30 % of the units of every exact structure and 30 % of the residual '
        'blocks, drawn at random, were masked in one copy and cut in another, in float32. The outputs agree to within '
        f'1e-4 in {result["ok"]} of them, relative to the output: median error {result["median_error"]:.1e}, worst '
        f'{error:.1e} (`{worst}`){_in_float64(result)}. {result["structures_exact"]:,} structures are exact, '
        f'{result["structures_inexact"]:,} are not:',
        '',
        '| why not | structures |',
        '|---|---|',
        *(f'| {why} | {count:,} |' for why, count in result['reasons'].items()),
        '',
        header_line(header()),
    ]
    return '\n'.join(lines) + '\n'


def _in_float64(result: Dict[str, Any]) -> str:
    pairs = result['float64_needed'].items()
    rounded = [f'`{name}` ({single:.1e} in float32, {double:.1e} in float64)' for name, (single, double) in pairs]
    return f'. Compared in float64, because they amplify float32\'s rounding: {", ".join(rounded)}' if rounded else ''


def _error(row: Dict[str, str]) -> Optional[float]:
    return float(row['error64'] or row['error'])


if __name__ == '__main__':
    main()
