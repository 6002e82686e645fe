"""``timm-epfs sensitivity``: measure what each structure's cut costs, as a table, JSON, a picture and a page."""
import argparse
import json
from pathlib import Path

from ..core import DEFAULT_KINDS, KINDS, check_place, one_line, step, write_whole
from ..importance import CRITERIA
from ..pruner import Pruner
from ..report import check_page, check_picture, draw_sensitivity, random_images, sensitivity_section, write_page
from .arguments import add_report_argument
from .data_arguments import (
    add_data_arguments,
    add_weight_arguments,
    build_dense,
    check_weights,
    fit_images,
    read_images,
)

__all__ = ['add_sensitivity_arguments']


def add_sensitivity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command but those of the model."""
    group = parser.add_argument_group('what to measure')
    group.add_argument(
        '--criterion', default='obs', metavar='NAME',
        help=f'criterion by which units go, one of {", ".join(CRITERIA)} (default: %(default)s)')
    group.add_argument(
        '--exclude', nargs='+', metavar='PATTERN', help='leave out the outputs of these layers (default: none)')
    group.add_argument(
        '--only', nargs='+', metavar='PATTERN', help='measure the outputs of these layers only (default: all)')
    group.add_argument(
        '--kinds', nargs='+', metavar='KIND',
        help=f'kinds of units: channels (or filters, neurons), {", ".join(KINDS[1:])} '
             f'(default: {", ".join(DEFAULT_KINDS)})')
    output = parser.add_argument_group('weights and output')
    add_weight_arguments(output)
    output.add_argument('--json', type=Path, metavar='FILE', help='write all that was measured as JSON (default: none)')
    output.add_argument('--plot', type=Path, metavar='FILE', help='draw it into a .png file (default: none)')
    add_report_argument(output)
    add_data_arguments(parser.add_argument_group('data'), required=True)
    parser.set_defaults(run=_sensitivity)


def _sensitivity(args: argparse.Namespace) -> None:
    if args.json:
        check_place(args.json, '--json')
    if args.plot:
        check_picture(args.plot, '--plot')
    if args.report:
        check_page(args.report)
    check_weights(args)
    dense = build_dense(args)
    images = random_images(dense, args.img_size, seed=args.seed)
    (train,), config = read_images(args, dense, images, (args.train_split,))
    pruner = Pruner(
        dense, data=fit_images(train, config, args), exclude=args.exclude, only=args.only,
        kinds=args.kinds or DEFAULT_KINDS, example_input=images)
    with step(f'measuring the sensitivity of {args.model}'):
        sensitivity = pruner.sensitivity(args.criterion, args.seed)
    if args.json:
        text = json.dumps({'model': args.model, **sensitivity.to_dict()}, indent=1) + '\n'
        with one_line(f'--json: {args.json} not written'):
            write_whole(args.json, lambda part: part.write_text(text, encoding='utf-8'))
    if args.plot:
        with one_line(f'--plot: {args.plot} not written'):
            draw_sensitivity(args.plot, sensitivity, args.model)
    if args.report:
        write_page(args.report, args.model, 'What cutting each layer costs.', [sensitivity_section(sensitivity)])
    print(sensitivity)
