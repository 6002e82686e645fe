"""``timm-epfs train``. Names and meanings of options are those of timm's train script, as far as it has them."""
import argparse
from pathlib import Path

from ..core import aligned_table
from ..learn import METHODS
from ..report import table
from .arguments import (
    KeyValues,
    add_budget_arguments,
    add_choice_arguments,
    given_model_args,
    positive,
    positive_or_zero,
)

__all__ = ['add_train_arguments']


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything but the model."""
    _add_method_arguments(parser.add_argument_group('what to cut'))
    _add_phase_arguments(parser.add_argument_group('phases'))
    _add_data_arguments(parser.add_argument_group('data'))
    _add_augmentation_arguments(parser.add_argument_group('augmentation'))
    _add_optimizer_arguments(parser.add_argument_group('optimizer and schedule'))
    _add_machine_arguments(parser.add_argument_group('machine'))
    _add_output_arguments(parser.add_argument_group('weights and output'))
    parser.set_defaults(run=_train)


def _add_method_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--method', default='epfs', choices=(*METHODS, 'none'), help='what learns the cut; none: rank once (epfs)')
    add_budget_arguments(group)
    add_choice_arguments(group)
    group.add_argument('--criterion', metavar='NAME', help='ranks the units for --method none (l2)')
    group.add_argument(
        '--method-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the method, or of timm_epfs.prune for --method none (none)')


def _add_phase_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--epochs', type=positive_or_zero, default=30, metavar='N', help='epochs of all phases together (30)')
    group.add_argument(
        '--dense-epochs', type=positive_or_zero, metavar='N',
        help='of these, before anything is cut (0.3 of them; 0 with --pretrained or --checkpoint)')
    group.add_argument(
        '--sparse-epochs', type=positive_or_zero, metavar='N',
        help='of these, while the cut is learned (0.4 of the rest, none for --method none); then fine-tuning')
    group.add_argument('--distill', action='store_true', help='fine-tune with the dense model as a teacher (off)')
    group.add_argument('--distill-loss-weight', type=float, default=1.0, metavar='X', help='weight of its loss (1)')
    group.add_argument('--task-loss-weight', type=float, default=1.0, metavar='X', help="of the labels' loss (1)")
    group.add_argument('--kd-temperature', type=float, default=4.0, metavar='X', help='softmax temperature (4)')


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR', help='folder of the images, as in timm; needed by all but digits')
    group.add_argument(
        '--dataset', default='', metavar='NAME',
        help="type, as in timm; 'digits': 1,797 handwritten digits that need no folder (folder or tar)")
    group.add_argument('--dataset-download', action='store_true', help='let torchvision and others download it (off)')
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split (train)')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='validation split (validation)')
    group.add_argument(
        '-b', '--batch-size', type=positive, default=64, metavar='N', help='images in a batch of each process (64)')
    group.add_argument(
        '-vb', '--validation-batch-size', type=positive, metavar='N',
        help='images in a batch, where top-1 is measured (as --batch-size)')
    group.add_argument(
        '-j', '--workers', type=positive_or_zero, metavar='N',
        help='processes that read images (up to 4; 0 for digits)')


def _add_augmentation_arguments(group: argparse._ArgumentGroup) -> None:
    """Left at None, they are timm's own defaults, or those of the digits."""
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all (off)')
    group.add_argument('--train-crop-mode', metavar='NAME', help='random crops: rrc, rkrc or rkrr (rrc)')
    group.add_argument(
        '--scale', type=float, nargs=2, metavar='X', help='area of random crops (0.08 1; digits: 0.75 1)')
    group.add_argument(
        '--ratio', type=float, nargs=2, metavar='X', help='aspect ratio of random crops (0.75 1.33; digits: 0.85 1.18)')
    group.add_argument('--hflip', type=float, metavar='P', help='probability of horizontal flips (0.5; digits: 0)')
    group.add_argument('--vflip', type=float, metavar='P', help='probability of vertical flips (0)')
    group.add_argument('--color-jitter', type=float, metavar='X', help='colour jitter (0.4; digits: 0)')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment policy (none)')
    group.add_argument('--reprob', type=float, metavar='P', help='probability of random erasing (0)')
    group.add_argument('--smoothing', type=float, default=0.0, metavar='X', help='label smoothing (0)')
    group.add_argument(
        '--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup (0: off); Center Loss takes the larger label')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix (0: off)')


def _add_optimizer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--opt', default='sgd', metavar='NAME', help="optimizer by timm's name (sgd)")
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='of the optimizer (0.9)')
    group.add_argument('--weight-decay', type=float, default=5e-4, metavar='X', help='of the optimizer (5e-4)')
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the optimizer (none)')
    group.add_argument('--lr', type=float, default=0.1, metavar='X', help='learning rate of the dense phase (0.1)')
    group.add_argument('--sparse-lr', type=float, metavar='X', help='learning rate of the sparse phase (half of --lr)')
    group.add_argument('--finetune-lr', type=float, metavar='X', help='learning rate of fine-tuning (half of --lr)')
    group.add_argument(
        '--sched', default='cosine', metavar='NAME', help="schedule by timm's name, stepped each update (cosine)")
    group.add_argument(
        '--sparse-sched', default='constant', metavar='NAME', help='schedule of the sparse phase (constant)')
    group.add_argument(
        '--warmup-epochs', type=float, metavar='X', help="at each phase's start (a tenth of it, up to 5)")
    group.add_argument(
        '--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate that warm-up starts from (1e-5)')
    group.add_argument(
        '--min-lr', type=float, default=0.0, metavar='X', help='learning rate that the schedule ends at (0)')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients at this (off)')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='what is clipped (norm)')
    group.add_argument('--grad-accum-steps', type=positive, default=1, metavar='N', help='batches in an update (1)')
    group.add_argument('--model-ema', action='store_true', help='go on with averaged weights (off)')
    group.add_argument(
        '--model-ema-decay', type=float, default=0.9998, metavar='X', help='of the averaged weights (0.9998)')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm the decay up (off)')


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--device', default='cpu', help='device to run on (cpu); one a process under torchrun')
    group.add_argument('--amp', action='store_true', help='mixed precision (off)')
    group.add_argument(
        '--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='its number format (bfloat16)')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout (off)')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the model, by this backend (off; inductor where none is named)')
    group.add_argument('--seed', type=positive_or_zero, default=42, metavar='N', help='of all random numbers (42)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--pretrained', action='store_true', help="start from the model's published weights (off)")
    group.add_argument('--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint (none)')
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='folder for all results; no default')
    group.add_argument('--resume', action='store_true', help='go on from the last good checkpoint in that folder (off)')
    group.add_argument('--overwrite', action='store_true', help='replace the results of a run in that folder (off)')
    group.add_argument('--checkpoint-hist', type=_several, default=2, metavar='N', help='checkpoints to keep (2)')


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 2 on (one may be found damaged)')
    return int(text)


def _train(args: argparse.Namespace) -> None:
    from ..training.run import train  # what it needs is slow to import
    result = train(args, given_model_args(args))
    if result is None:  # the first process speaks for all
        return
    print(aligned_table(table(result.rows)))
    print(result.notes)
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{result.folder}"!r}, pretrained=True)')
