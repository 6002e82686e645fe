"""``timm-epfs prune``: prune a model, compare it with the dense one, and save it."""
import argparse
import copy
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import nn

from ..core import PruningError, aligned_table, percent, step
from ..importance import CRITERIA
from ..latency import latencies, latency_note
from ..plan import Plan, recipe_steps
from ..pruner import Pruner
from ..report import (
    Rows,
    Section,
    accuracy_section,
    check_page,
    compare,
    comparison_section,
    image_loader,
    layers_section,
    random_images,
    sensitivity_section,
    table,
    top1,
    write_page,
)
from ..surgery import compensate
from ..zoo import check_free, save_pretrained
from .arguments import KeyValues, add_budget_arguments, add_choice_arguments, add_report_argument
from .data_arguments import (
    add_data_arguments,
    add_weight_arguments,
    build_dense,
    check_weights,
    fit_images,
    read_images,
    with_progress,
)

__all__ = ['add_prune_arguments']

# Options that are passed on only if they were given: their defaults are those of the Python call.
_PRUNER_OPTIONS = ('exclude', 'only', 'kinds', 'streams')
_CUT_OPTIONS = ('criterion', 'scope', 'widths', 'round_to', 'floor', 'ratios')


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command but those of the model."""
    _add_cut_arguments(parser.add_argument_group('what to cut'))
    _add_output_arguments(parser.add_argument_group('weights and output'))
    data = parser.add_argument_group('data', 'Images for criteria and widths, for compensation and for top-1.')
    add_data_arguments(data)
    data.add_argument(
        '--val-split', default='validation', metavar='NAME', help='split for top-1 (default: %(default)s)')
    data.add_argument(
        '--no-compensate', action='store_true',
        help='with --data-dir, leave the weights that stay as they are; else they make up for those that went '
             '(default: off)')
    parser.set_defaults(run=_prune)


def _add_cut_arguments(group: argparse._ArgumentGroup) -> None:
    add_budget_arguments(group)
    group.add_argument(
        '--criterion', metavar='NAME', help=f'criterion that ranks the units: {", ".join(CRITERIA)} '
             '(default: l2; with --data-dir: obs)')
    add_choice_arguments(group)
    group.add_argument(
        '--ratios', nargs='+', action=KeyValues, metavar='PATTERN=SHARE',
        help='share of its units to remove from each layer that a pattern names (default: chosen within the budget)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    add_weight_arguments(group)
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='new or empty folder to save in (required)')
    group.add_argument(
        '--overwrite', action='store_true', help='replace the model that was saved in this folder (default: off)')
    add_report_argument(group)


def _prune(args: argparse.Namespace) -> None:
    _check(args)
    dense = build_dense(args)
    images = random_images(dense, args.img_size, seed=args.seed)
    fit_on, val = _loaders(args, dense, images) if args.data_dir else (None, None)

    pruner = Pruner(dense, data=fit_on, example_input=images, **_given(args, _PRUNER_OPTIONS))
    slim = pruner(
        args.macs, args.params, latency=args.latency, latency_batch_size=args.latency_batch_size, compensate=False,
        seed=args.seed, **_given(args, _CUT_OPTIONS))
    before_compensation = slim
    if fit_on and not args.no_compensate:
        before_compensation = copy.deepcopy(slim)
        compensate(slim, dense, fit_on)
    accuracy = _accuracy(dense, before_compensation, slim, val) if val else {}
    with step('measuring latency'):
        latency_ms = latencies([dense, slim], images.to(args.device))
    with step(f'saving to {args.output}'):
        folder = save_pretrained(slim, args.output, overwrite=args.overwrite)
    rows = compare(dense, slim, accuracy, latency_ms)
    weights = args.checkpoint or ('pretrained' if args.pretrained else 'random')
    notes = f'weights: {weights}; {latency_note(args.device)}'
    if args.report:
        sections = _measured(pruner, slim.pruning_plan, args.seed)
        _write_report(args, rows, notes, slim.pruning_plan, sections)
    print(aligned_table(table(rows)))
    print(notes)
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{folder}"!r}, pretrained=True)')


def _given(args: argparse.Namespace, names: Tuple[str, ...]) -> Dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _check(args: argparse.Namespace) -> None:
    """Raise ``PruningError`` before any work starts, for whatever would fail after it."""
    check_free(args.output.resolve(), args.overwrite)
    check_weights(args)
    if args.report:
        check_page(args.report)
    criterion = CRITERIA.get(args.criterion)
    if criterion and criterion.needs and not args.data_dir:
        raise PruningError(f'criterion {args.criterion!r} needs images, none were given; give --data-dir')
    if args.widths == 'sensitivity' and not args.data_dir:
        raise PruningError('--widths sensitivity needs images, none were given; give --data-dir')


def _loaders(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> Tuple[Any, Any]:
    """Batches for scoring and compensation, and batches for evaluation."""
    (train, val), config = read_images(args, model, images, (args.train_split, args.val_split))
    return fit_images(train, config, args), image_loader(val, config, args.batch_size, args.workers)


def _accuracy(
        dense: nn.Module,
        before_compensation: nn.Module,
        slim: nn.Module,
        val: Any,
) -> Dict[str, Tuple[float, float]]:
    """Top-1 in percent of the dense model and of the pruned one, before and, if it was done, after compensation."""
    pruned = {'top-1, %': before_compensation}
    if slim is not before_compensation:
        pruned['top-1 after compensation, %'] = slim
    dense_top1, *pruned_top1 = top1([dense, *pruned.values()], with_progress(val, 'measuring top-1', len(val)))
    return {label: (dense_top1, value) for label, value in zip(pruned, pruned_top1)}


def _measured(pruner: Pruner, plan: Plan, seed: int) -> List[Section]:
    """The sensitivity, where it decided how many units each layer keeps: then the pruner has it already."""
    recipe = recipe_steps(plan.recipe)[-1]
    if recipe.get('widths') != 'sensitivity':
        return []
    return [sensitivity_section(pruner.sensitivity(recipe['criterion'], seed))]


def _write_report(args: argparse.Namespace, rows: Rows, notes: str, plan: Plan, measured: List[Section]) -> None:
    dense, pruned = rows['MACs'][0]
    compared = {'pruned': rows}
    sections = [
        comparison_section(compared, notes), *accuracy_section(compared), layers_section({'pruned': plan}), *measured]
    write_page(args.report, args.model, f'Pruned by timm_epfs to {percent(pruned / dense)} of its MACs.', sections)
