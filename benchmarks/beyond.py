"""Models from outside the classification zoo, cut to half their MACs by timm_epfs and by torch-pruning.

On real numbers: a cut counts if half of the MACs are left, if the model runs and returns what it did, and if every
module computes what it does in the dense model with the removed units masked. One row per name in results/beyond.csv,
resumable; ``--markdown`` writes results/beyond.md. ``beyond_models.py`` says what to install.
"""
import argparse
import copy
import importlib.util
import sys
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
from beyond_models import LIBRARIES, MODELS
from common import RESULTS, Table, header, header_line, one_line, write_json, write_text
from pool import run
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch_pruning_recipe import DrawnMagnitude, one_shot
from tqdm import tqdm

import timm_epfs
from timm_epfs.core import OutOfReach
from timm_epfs.report import count_macs

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))

from helpers import distance, masked, randomise  # noqa: E402

COLUMNS = (
    'name', 'status', 'macs', 'macs_ratio', 'error', 'exact', 'inexact', 'on_numbers', 'skipped', 'seconds', 'message',
    'rival', 'rival_macs_ratio', 'rival_message',
)
TARGET, NEAR, TOLERANCE = 0.5, 0.01, 1e-3
RIVAL_NEAR = 0.9  # torch-pruning is given half of the channels, whatever MACs that leaves


def main() -> None:
    args = parse_args()
    table = Table(args.results / 'beyond.csv', COLUMNS)
    names = [n for n in MODELS if not args.patterns or any(fnmatchcase(n, pattern) for pattern in args.patterns)]
    if not args.markdown:
        for library in sorted({LIBRARIES[name] for name in names} - {'own'}):
            if importlib.util.find_spec(library) is None:
                print(f'{library} is not installed, so its models are left out')
                names = [name for name in names if LIBRARIES[name] != library]
        fill(table, names, args)
    result = summary(table)
    print(result)
    if not args.patterns:
        write_json(args.results / 'beyond.json', {'machine': header(), **result})
        write_text(args.results / 'beyond.md', markdown(table, result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('patterns', nargs='*', help='names or patterns, all by default')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--limit', type=float, default=300, help='seconds a name may take')
    parser.add_argument('--memory', type=float, default=10, help='GB a process may allocate')
    parser.add_argument('--redo', action='store_true', help='measure again what has a row')
    parser.add_argument('--redo-failed', action='store_true', help='measure again what failed')
    parser.add_argument('--markdown', action='store_true', help='only write the table')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parser.parse_args()


def fill(table: Table, names: List[str], args: argparse.Namespace) -> None:
    """Cut all models by ours, then by theirs: some hang there."""
    for measure, status in ((ours, 'status'), (theirs, 'rival')):
        found = {name: table.rows.get(name, {}).get(status) for name in names}
        failed = [name for name in names if args.redo_failed and status == 'status' and found[name] != 'ok']
        todo = [name for name in names if args.redo or not found[name] or name in failed]
        try:
            with tqdm(total=len(todo), unit='model') as bar:
                for name, row in run(measure, todo, args.jobs, args.limit, args.memory):
                    row = row if status in row else {status: row['status']}  # where the worker was lost
                    table.put({**table.rows.get(name, {}), 'name': name, **row})
                    if row[status] != 'ok':
                        bar.write(f'{name}: {status} {row[status]}: {row.get("message", "")}')
                    bar.update()
        finally:
            table.save()


def ours(name: str) -> Dict[str, Any]:
    """Our columns of one model; ``status`` is the first stage that failed."""
    return _measure(name, _ours, 'status', 'message')


def theirs(name: str) -> Dict[str, Any]:
    """torch-pruning's columns of one model; ``rival`` is the first stage that failed."""
    return _measure(name, _theirs, 'rival', 'rival_message')


def _measure(name: str, check: Callable, status: str, message: str) -> Dict[str, Any]:
    torch.manual_seed(0)
    row: Dict[str, Any] = {status: 'build', message: ''}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model, (args, kwargs) = MODELS[name]()
            check(randomise(model).eval(), args, kwargs, row)
        row[status] = 'ok'
    except Exception as e:
        row[message] = one_line(e)
    return row


def _ours(model: nn.Module, args: Tuple, kwargs: Dict[str, Any], row: Dict[str, Any]) -> None:
    row['macs'] = round(count_macs(model, args, kwargs))
    row['status'], start = 'trace', time.perf_counter()
    pruner = timm_epfs.Pruner(model, example_input=kwargs or args)
    traced = pruner.trace
    exact = sum(structure.exact for structure in traced.structures)
    row.update(
        status='cut', exact=exact, inexact=len(traced.structures) - exact, on_numbers=one_line(traced.on_numbers),
        skipped=len(traced.skipped))
    slim = pruner(macs=TARGET, criterion='random').eval()
    row['seconds'] = time.perf_counter() - start
    dense, left = slim.pruning_plan.cost['macs']
    row['macs_ratio'] = left / dense
    row['status'] = 'forward'
    if _kinds(slim, args, kwargs) != _kinds(model, args, kwargs):
        raise ValueError('it returns something else than the dense model')
    row['status'] = 'exactness'
    row['error'] = _error(pruner, args, kwargs)
    if row['error'] > TOLERANCE:  # float32's rounding may be what differs: in float64, picks by score are the same
        args, kwargs = tree_map(_double, (args, kwargs))
        row['error'] = _error(timm_epfs.Pruner(model.double(), example_input=kwargs or args), args, kwargs)
    if row['error'] > TOLERANCE:
        raise ValueError('masked and cut model differ')
    row['status'] = 'cut'
    if abs(row['macs_ratio'] - TARGET) > NEAR:
        raise ValueError(f'{row["macs_ratio"]:.3f} of the MACs are left')


def _plan(pruner: timm_epfs.Pruner, macs: float) -> timm_epfs.Plan:
    """A cut to this share of the MACs, or half-way to it, and so on, where what may be cut doesn't reach that."""
    while True:
        try:
            return pruner.plan(macs=macs, criterion='random')
        except OutOfReach:
            macs = (1 + macs) / 2


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _error(pruner: timm_epfs.Pruner, args: Tuple, kwargs: Dict[str, Any]) -> float:
    """How far the cut model is from the masked one, over all that modules give and that isn't cut itself."""
    only_exact = [s.name for s in pruner.structures if not s.exact]
    exact = timm_epfs.Pruner(
        pruner.model, example_input=kwargs or args, exclude=only_exact) if only_exact else pruner
    if not exact.structures:
        return 0.0
    plan = _plan(exact, 0.7 if only_exact else TARGET)
    keep = {cut.structure.name: cut.keep for cut in plan.cuts}
    cut = timm_epfs.surgery.cut_copy(exact.model, plan)
    given = [_outputs(model, args, kwargs) for model in (masked(exact.model, exact.trace.structures, keep), cut.eval())]
    pairs = [(given[0][name], given[1][name]) for name in given[0] if name in given[1]]
    alike = [(a, b) for a, b in pairs if a.shape == b.shape and a.numel() and a.abs().max() > 0]
    return max((distance(a, b) for a, b in alike), default=0.0)


@torch.no_grad()
def _outputs(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """What each module gave in the first of its runs."""
    found: Dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                found.setdefault(name, out.detach().clone())
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _kinds(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> List[Tuple]:
    """Shapes of what a model returns, without the first dim: that may be the number of boxes."""
    out = model(*args, **kwargs)
    out = dict(out) if hasattr(out, 'items') else out
    return [tuple(x.shape[1:]) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def _theirs(model: nn.Module, args: Tuple, kwargs: Dict[str, Any], row: Dict[str, Any]) -> None:
    dense, before = copy.deepcopy(model), count_macs(model, args, kwargs)
    row['rival'] = 'trace'
    example = kwargs or (args if len(args) > 1 else args[0])
    slim = one_shot(
        model, example, DrawnMagnitude(), lambda stage: row.update(rival=stage),
        ignored=_output_layers(model, args, kwargs))
    row['rival'] = 'forward'
    if _kinds(slim, args, kwargs) != _kinds(dense, args, kwargs):
        raise ValueError('it returns something else than the dense model')
    row['rival_macs_ratio'] = count_macs(slim, args, kwargs) / before
    row['rival'] = 'cut'
    if row['rival_macs_ratio'] > RIVAL_NEAR:
        raise ValueError(f'{row["rival_macs_ratio"]:.3f} of the MACs are left')


def _output_layers(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> List[nn.Module]:
    """The layers that compute what a model returns, which users of torch-pruning name by hand."""
    layers: Dict[Any, nn.Module] = {}
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [
        module.register_forward_hook(lambda module, inputs, out: layers.__setitem__(out.grad_fn, module))
        for module in model.modules() if isinstance(module, kinds)]
    out = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    out = dict(out) if hasattr(out, 'items') else out
    nodes = [x.grad_fn for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.grad_fn is not None]
    found, seen = [], set(nodes)
    while nodes:
        node = nodes.pop()
        if node in layers:
            found.append(layers[node])
            continue
        earlier = {next_node for next_node, _ in node.next_functions if next_node is not None} - seen
        seen |= earlier
        nodes += earlier
    return list(dict.fromkeys(found))


def is_ok(row: Dict[str, str]) -> bool:
    return row['status'] == 'ok'


def summary(table: Table) -> Dict[str, Any]:
    rows = list(table.rows.values())
    return {
        'models': len(rows),
        'ok': sum(map(is_ok, rows)),
        'rival_ok': sum(row['rival'] == 'ok' for row in rows),
        'on_numbers': sum(bool(row['on_numbers']) for row in rows),
        'not_ok': {row['name']: f'{row["status"]}: {row["message"]}' for row in rows if not is_ok(row)},
    }


def markdown(table: Table, result: Dict[str, Any]) -> str:
    lines = [
        '# Beyond the classification zoo',
        '',
        f'Cut to half their MACs, run on real numbers and compared with the masked model: {result["ok"]} of '
        f'{result["models"]} models. torch-pruning, asked for half of the channels, gives {result["rival_ok"]} that '
        f'run, return what they did and have at most {100 * RIVAL_NEAR:.0f} % of the MACs.',
        header_line(header()),
        '',
        '| library | models | timm_epfs | torch-pruning | not cut to half by timm_epfs |',
        '|---|---|---|---|---|',
    ]
    for library in dict.fromkeys(LIBRARIES.values()):
        rows = [row for name, row in table.rows.items() if LIBRARIES.get(name) == library]
        bad = [f'`{row["name"].partition("/")[2]}` ({row["message"]})' for row in rows if not is_ok(row)]
        ok, rival = sum(map(is_ok, rows)), sum(row['rival'] == 'ok' for row in rows)
        if rows:
            lines.append(f'| {library} | {len(rows)} | {ok} | {rival} | {", ".join(bad)} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
