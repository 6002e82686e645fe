"""``timm-epfs train``. Options that timm's train script has, too, have the same names and meanings here."""
import argparse
from pathlib import Path

from ..core import aligned_table
from ..importance import CRITERIA
from ..learn import METHODS
from ..report import table
from .arguments import (
    KeyValues,
    add_budget_arguments,
    add_choice_arguments,
    add_report_argument,
    given_model_args,
    positive,
    positive_or_zero,
)

__all__ = ['add_train_arguments']


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command but those of the model."""
    _add_method_arguments(parser.add_argument_group('what to cut'))
    _add_phase_arguments(parser.add_argument_group('phases'))
    _add_data_arguments(parser.add_argument_group('data'))
    _add_augmentation_arguments(parser.add_argument_group('augmentation'))
    _add_optimizer_arguments(parser.add_argument_group('optimizer'))
    _add_schedule_arguments(parser.add_argument_group('learning rate schedule'))
    _add_machine_arguments(parser.add_argument_group('machine'))
    _add_output_arguments(parser.add_argument_group('weights and output'))
    parser.set_defaults(run=_train)


def _add_method_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--method', default='epfs', choices=(*METHODS, 'none'),
        help='method that learns what to cut; none: rank the units once, by a criterion (default: %(default)s)')
    add_budget_arguments(group)
    add_choice_arguments(group)
    group.add_argument(
        '--criterion', metavar='NAME',
        help=f'criterion that ranks the units for --method none: {", ".join(CRITERIA)} (default: l2)')
    group.add_argument(
        '--method-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the method, or of timm_epfs.prune for --method none (default: none)')


def _add_phase_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--epochs', type=positive_or_zero, default=30, metavar='N',
        help='epochs of all phases together: dense, sparse and fine-tuning (default: %(default)s)')
    group.add_argument(
        '--dense-epochs', type=positive_or_zero, metavar='N',
        help='epochs of the dense phase, before anything is cut '
             '(default: 0.3 of the epochs that --sparse-epochs leaves; 0 with --pretrained or --checkpoint)')
    group.add_argument(
        '--sparse-epochs', type=positive_or_zero, metavar='N',
        help='epochs of the sparse phase, in which the method learns what to cut; the rest are for fine-tuning '
             '(default: 0.4 of the epochs after the dense phase; 0 for --method none)')
    group.add_argument(
        '--cut-steps', type=positive, metavar='N',
        help='with --method none: cut in N steps, the first before fine-tuning and one after each of its first N - 1 '
             'epochs, to budgets on the cubic schedule of Zhu and Gupta (default: 1)')
    group.add_argument(
        '--compensate', action='store_true',
        help='with --method none: before fine-tuning, let the weights that stay make up for those that went, as far as '
             'training images show it (default: off)')
    group.add_argument(
        '--distill', action='store_true', help='fine-tune with the dense model as the teacher (default: off)')
    group.add_argument(
        '--distill-loss-weight', type=float, default=1.0, metavar='X',
        help='weight of the distillation loss (default: %(default)s)')
    group.add_argument(
        '--task-loss-weight', type=float, default=1.0, metavar='X',
        help='weight of the loss on the labels, with --distill (default: %(default)s)')
    group.add_argument(
        '--kd-temperature', type=float, default=4.0, metavar='X',
        help='softmax temperature of distillation (default: %(default)s)')


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='folder of the images, as in timm (required, except with --dataset digits)')
    group.add_argument(
        '--dataset', default='', metavar='NAME',
        help='dataset type, as in timm; digits: 1,797 handwritten digits that need no folder '
             '(default: a folder or .tar of images)')
    group.add_argument(
        '--dataset-download', action='store_true',
        help='allow the download of the dataset, by torchvision for example (default: off)')
    group.add_argument('--train-split', default='train', metavar='NAME', help='training split (default: %(default)s)')
    group.add_argument(
        '--val-split', default='validation', metavar='NAME', help='validation split (default: %(default)s)')
    group.add_argument(
        '-b', '--batch-size', type=positive, default=64, metavar='N',
        help='images per batch in each process (default: %(default)s)')
    group.add_argument(
        '-vb', '--validation-batch-size', type=positive, metavar='N',
        help='images per batch when top-1 is measured (default: that of --batch-size)')
    group.add_argument(
        '-j', '--workers', type=positive_or_zero, metavar='N',
        help='processes that load images (default: the number of CPU cores, at most 4; digits: 0)')


def _add_augmentation_arguments(group: argparse._ArgumentGroup) -> None:
    """Add options that, if they are not given, have timm's own defaults, or those of the digits."""
    group.add_argument('--no-aug', action='store_true', help='turn all augmentation off (default: off)')
    group.add_argument(
        '--train-crop-mode', metavar='NAME', help='mode of random crops: rrc, rkrc or rkrr (default: rrc)')
    group.add_argument(
        '--scale', type=float, nargs=2, metavar='X',
        help='range of the area of random crops (default: 0.08 1; digits: 0.75 1)')
    group.add_argument(
        '--ratio', type=float, nargs=2, metavar='X',
        help='range of the aspect ratio of random crops (default: 0.75 1.33; digits: 0.85 1.18)')
    group.add_argument(
        '--hflip', type=float, metavar='P', help='probability of a horizontal flip (default: 0.5; digits: 0)')
    group.add_argument('--vflip', type=float, metavar='P', help='probability of a vertical flip (default: 0)')
    group.add_argument(
        '--color-jitter', type=float, metavar='X', help='strength of colour jitter (default: 0.4; digits: 0)')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment policy (default: none)')
    group.add_argument('--reprob', type=float, metavar='P', help='probability of random erasing (default: 0)')
    group.add_argument(
        '--smoothing', type=float, default=0.0, metavar='X', help='label smoothing (default: %(default)s)')
    group.add_argument(
        '--mixup', type=float, default=0.0, metavar='ALPHA',
        help="alpha of mixup, 0 for none; Center Loss uses the class of the larger share (default: %(default)s)")
    group.add_argument(
        '--cutmix', type=float, default=0.0, metavar='ALPHA', help='alpha of cutmix, 0 for none (default: %(default)s)')


def _add_optimizer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--opt', default='sgd', metavar='NAME', help="timm's name of the optimizer (default: %(default)s)")
    group.add_argument(
        '--momentum', type=float, default=0.9, metavar='X', help='momentum of the optimizer (default: %(default)s)')
    group.add_argument(
        '--weight-decay', type=float, default=5e-4, metavar='X',
        help='weight decay of the optimizer (default: %(default)s)')
    group.add_argument(
        '--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the optimizer (default: none)')
    group.add_argument(
        '--clip-grad', type=float, metavar='X', help='clip gradients to this, as --clip-mode says (default: off)')
    group.add_argument(
        '--clip-mode', default='norm', choices=('norm', 'value', 'agc'),
        help='how gradients are clipped (default: %(default)s)')
    group.add_argument(
        '--grad-accum-steps', type=positive, default=1, metavar='N',
        help='batches whose gradients are accumulated for one update (default: %(default)s)')
    group.add_argument(
        '--model-ema', action='store_true',
        help='average the weights, and hand the averaged ones on to the next phase (default: off)')
    group.add_argument(
        '--model-ema-decay', type=float, default=0.9998, metavar='X',
        help='decay of the averaged weights (default: %(default)s)')
    group.add_argument(
        '--model-ema-warmup', action='store_true', help='raise that decay gradually at the start (default: off)')


def _add_schedule_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--lr', type=float, default=0.1, metavar='X', help='learning rate of the dense phase (default: %(default)s)')
    group.add_argument(
        '--sparse-lr', type=float, metavar='X', help='learning rate of the sparse phase (default: half of --lr)')
    group.add_argument(
        '--finetune-lr', type=float, metavar='X', help='learning rate of fine-tuning (default: half of --lr)')
    group.add_argument(
        '--sched', default='cosine', metavar='NAME',
        help="timm's name of the schedule of the dense phase and of fine-tuning; it advances with every update "
             '(default: %(default)s)')
    group.add_argument(
        '--sparse-sched', default='constant', metavar='NAME',
        help="timm's name of the schedule of the sparse phase (default: %(default)s)")
    group.add_argument(
        '--warmup-epochs', type=float, metavar='X',
        help='warm-up epochs at the start of each phase (default: a tenth of the phase, at most 5)')
    group.add_argument(
        '--warmup-lr', type=float, default=1e-5, metavar='X',
        help='learning rate at the start of the warm-up (default: %(default)s)')
    group.add_argument(
        '--min-lr', type=float, default=0.0, metavar='X',
        help='learning rate at the end of the schedule (default: %(default)s)')


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--device', default='cpu',
        help='device to run on; under torchrun, each process has its own (default: %(default)s)')
    group.add_argument('--amp', action='store_true', help='use automatic mixed precision (default: off)')
    group.add_argument(
        '--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'),
        help='data type of mixed precision (default: %(default)s)')
    group.add_argument(
        '--channels-last', action='store_true', help='use the channels-last memory layout (default: off)')
    group.add_argument(
        '--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the model with this backend, inductor if none is named (default: off)')
    group.add_argument(
        '--seed', type=positive_or_zero, default=42, metavar='N',
        help='seed of all random numbers (default: %(default)s)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--pretrained', action='store_true',
        help="start from the model's published weights (default: off; a saved model always has its own weights)")
    group.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint (default: none)')
    group.add_argument(
        '-o', '--output', type=Path, required=True, metavar='DIR', help='folder for all results (required)')
    group.add_argument(
        '--resume', action='store_true',
        help='continue the run in this folder from its last good checkpoint (default: off)')
    group.add_argument('--overwrite', action='store_true', help='replace the run in this folder (default: off)')
    group.add_argument(
        '--checkpoint-hist', type=_at_least_two, default=2, metavar='N',
        help='number of checkpoints to keep, at least 2 (default: %(default)s)')
    add_report_argument(group)


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a whole number of at least 2; the second checkpoint is needed if the first is damaged')
    return int(text)


def _train(args: argparse.Namespace) -> None:
    from ..training.run import train  # here, because its imports are slow
    result = train(args, given_model_args(args))
    if result is None:  # only the first process prints the result
        return
    print(aligned_table(table(result.rows)))
    print(result.notes)
    print(f'saved in {args.output}: timm.create_model({f"local-dir:{result.folder}"!r}, pretrained=True)')
