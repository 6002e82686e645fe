"""Options of ``timm-epfs train``. Names and meanings are those of timm's train script, as far as it has them."""
import argparse
import os
import warnings
from pathlib import Path
from typing import Any, Dict

import torch

from ..cli.arguments import KeyValues, add_latency_arguments, positive
from ..core import PruningError
from ..latency import Asked
from ..learn import METHODS
from ..zoo import check_readable

__all__ = ['PHASES', 'add_train_arguments', 'budget', 'check_options', 'phase_epochs', 'run_options']

PHASES = ('dense', 'sparse', 'finetune')

# A run may be resumed with others of these: how it runs, and what helps where the loss was no number any more.
_FREE = (
    'output', 'resume', 'overwrite', 'checkpoint_hist', 'workers', 'device', 'data_dir', 'checkpoint', 'run',
    'lr', 'sparse_lr', 'finetune_lr', 'clip_grad', 'clip_mode', 'rank', 'local_rank', 'world_size', 'distributed',
)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything but the model."""
    _add_method_arguments(parser.add_argument_group('what to cut'))
    _add_phase_arguments(parser.add_argument_group('phases'))
    _add_data_arguments(parser.add_argument_group('data'))
    _add_augmentation_arguments(parser.add_argument_group('augmentation'))
    _add_optimizer_arguments(parser.add_argument_group('optimizer and schedule'))
    _add_machine_arguments(parser.add_argument_group('machine'))
    _add_output_arguments(parser.add_argument_group('weights and output'))


def _add_method_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--method', default='epfs', choices=(*METHODS, 'none'), help='what learns the cut; none: rank once (epfs)')
    budgets = group.add_mutually_exclusive_group(required=True)
    budgets.add_argument('--macs', type=float, metavar='BUDGET', help='MACs to keep: a share or a count')
    add_latency_arguments(budgets, group)
    group.add_argument('--criterion', metavar='NAME', help='ranks the units for --method none (l2)')
    group.add_argument(
        '--method-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
        help='further arguments of the method, or of timm_epfs.prune for none')


def _add_phase_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--epochs', type=_whole, default=30, metavar='N', help='epochs of all phases together (30)')
    group.add_argument(
        '--dense-epochs', type=_whole, metavar='N',
        help='of these, before anything is cut (0.3 of them; 0 with --pretrained or --checkpoint)')
    group.add_argument(
        '--sparse-epochs', type=_whole, metavar='N',
        help='of these, while the cut is learned (0.4 of the rest, none for --method none); then fine-tuning')
    group.add_argument('--distill', action='store_true', help='fine-tune with the dense model as a teacher')
    group.add_argument('--distill-loss-weight', type=float, default=1.0, metavar='X', help='weight of its loss (1)')
    group.add_argument('--task-loss-weight', type=float, default=1.0, metavar='X', help="of the labels' loss (1)")
    group.add_argument('--kd-temperature', type=float, default=4.0, metavar='X', help='softmax temperature (4)')


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--data-dir', type=Path, metavar='DIR', help='folder of the images, as in timm')
    group.add_argument(
        '--dataset', default='', metavar='NAME',
        help="type, as in timm (folder or tar); 'digits': 1,797 handwritten digits that need no folder")
    group.add_argument('--dataset-download', action='store_true', help='let torchvision and others download it')
    group.add_argument('--train-split', default='train', metavar='NAME', help='(train)')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='(validation)')
    group.add_argument('-b', '--batch-size', type=positive, default=64, metavar='N', help='images a process (64)')
    group.add_argument('-vb', '--validation-batch-size', type=positive, metavar='N', help='(as --batch-size)')
    group.add_argument(
        '-j', '--workers', type=_whole, metavar='N', help='processes that read images (up to 4; 0 for digits)')


def _add_augmentation_arguments(group: argparse._ArgumentGroup) -> None:
    """Left at None, they are timm's own defaults, or those of the digits."""
    group.add_argument('--no-aug', action='store_true', help='none at all')
    group.add_argument('--train-crop-mode', metavar='NAME', help='rrc, rkrc or rkrr')
    group.add_argument('--scale', type=float, nargs=2, metavar='X', help='area of random crops')
    group.add_argument('--ratio', type=float, nargs=2, metavar='X', help='aspect ratio of random crops')
    group.add_argument('--hflip', type=float, metavar='P', help='probability of horizontal flips')
    group.add_argument('--vflip', type=float, metavar='P', help='probability of vertical flips')
    group.add_argument('--color-jitter', type=float, metavar='X', help='colour jitter')
    group.add_argument('--aa', metavar='POLICY', help='AutoAugment policy')
    group.add_argument('--reprob', type=float, metavar='P', help='probability of random erasing')
    group.add_argument('--smoothing', type=float, default=0.0, metavar='X', help='label smoothing (0)')
    group.add_argument(
        '--mixup', type=float, default=0.0, metavar='ALPHA', help='mixup (0: off); Center Loss takes the larger label')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='ALPHA', help='cutmix (0: off)')


def _add_optimizer_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--opt', default='sgd', metavar='NAME', help="timm's name (sgd)")
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='(0.9)')
    group.add_argument('--weight-decay', type=float, default=5e-4, metavar='X', help='(5e-4)')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE')
    group.add_argument('--lr', type=float, default=0.1, metavar='X', help='of the dense phase (0.1)')
    group.add_argument('--sparse-lr', type=float, metavar='X', help='(half of --lr)')
    group.add_argument('--finetune-lr', type=float, metavar='X', help='(half of --lr)')
    group.add_argument('--sched', default='cosine', metavar='NAME', help="timm's name, stepped each update (cosine)")
    group.add_argument('--sparse-sched', default='constant', metavar='NAME', help='of the sparse phase (constant)')
    group.add_argument(
        '--warmup-epochs', type=float, metavar='X', help="at each phase's start (a tenth of it, up to 5)")
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='(1e-5)')
    group.add_argument('--min-lr', type=float, default=0.0, metavar='X', help='(0)')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients (off)')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='(norm)')
    group.add_argument('--grad-accum-steps', type=positive, default=1, metavar='N', help='batches an update (1)')
    group.add_argument('--model-ema', action='store_true', help='go on with averaged weights')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='(0.9998)')
    group.add_argument('--model-ema-warmup', action='store_true', help='warm the decay up')


def _add_machine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--device', default='cpu', help='device to run on (cpu); one a process under torchrun')
    group.add_argument('--amp', action='store_true', help='mixed precision')
    group.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'), help='(bfloat16)')
    group.add_argument('--channels-last', action='store_true', help='channels-last memory layout')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile (inductor)')
    group.add_argument('--seed', type=_whole, default=42, metavar='N', help='(42)')


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--pretrained', action='store_true', help="start from the model's published weights")
    group.add_argument('--checkpoint', type=Path, metavar='FILE', help='start from a .safetensors checkpoint')
    group.add_argument('-o', '--output', type=Path, required=True, metavar='DIR', help='folder for all results')
    group.add_argument('--resume', action='store_true', help='go on from the last good checkpoint in that folder')
    group.add_argument('--overwrite', action='store_true', help='replace the results of a run in that folder')
    group.add_argument('--checkpoint-hist', type=_several, default=2, metavar='N', help='checkpoints to keep (2)')


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number')
    return int(text)


def _several(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from 2 on (one may be found damaged)')
    return int(text)


def check_options(args: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, and fill in defaults that depend on other options.

    Raises:
        PruningError: What was combined, and what to do.
    """
    if args.dataset == 'digits':
        if args.data_dir:
            raise PruningError(f'--dataset digits has no folder, --data-dir {args.data_dir} was given: drop it')
    elif not args.data_dir:
        raise PruningError('train needs images, found no --data-dir: give it, or --dataset digits for a first try')
    if args.pretrained and args.checkpoint:
        raise PruningError('--pretrained and --checkpoint were both given: the model starts from one of them')
    if args.checkpoint:
        check_readable(args.checkpoint)
    if args.resume and args.overwrite:
        raise PruningError('--resume and --overwrite were both given: go on with the run or replace it')
    if args.macs is not None and not args.macs > 0:
        raise PruningError(f'--macs {args.macs:g} was asked: give a share such as 0.5, or a count')
    if args.latency is not None:
        Asked(args.latency)
    if args.method != 'none' and args.criterion:
        raise PruningError(f'--criterion goes with --method none, found --method {args.method}: drop one of them')
    if args.amp and args.amp_dtype == 'float16' and args.device == 'cpu':
        raise PruningError('--amp-dtype float16 has no fast kernels on cpu: use bfloat16, or another --device')
    if args.amp and args.device == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        warnings.warn('--amp on a processor without AVX-512 takes many times as long as float32: drop it', stacklevel=2)
    if args.workers is None:
        args.workers = 0 if args.dataset == 'digits' else min(4, os.cpu_count() or 1)
    phase_epochs(args)


def phase_epochs(args: argparse.Namespace) -> Dict[str, int]:
    """Epochs of each phase; they add up to ``--epochs``."""
    learned = args.method != 'none'
    if args.sparse_epochs and not learned:
        raise PruningError(f'--method none has no sparse phase, found --sparse-epochs {args.sparse_epochs}: drop it')
    dense = args.dense_epochs
    if dense is None:
        dense = 0 if args.pretrained or args.checkpoint else round(0.3 * (args.epochs - (args.sparse_epochs or 0)))
    sparse = args.sparse_epochs
    if sparse is None:
        sparse = round(0.4 * (args.epochs - dense)) if learned else 0
    if learned and sparse < 1:
        raise PruningError(f'--method {args.method} learns while sparse, found {sparse} epochs for that: '
                           'give --sparse-epochs or more --epochs')
    finetune = args.epochs - dense - sparse
    if finetune < 0:
        raise PruningError(f'{dense} dense and {sparse} sparse epochs were asked, --epochs has {args.epochs} for all '
                           'phases: give more')
    return dict(zip(PHASES, (dense, sparse, finetune)))


def budget(args: argparse.Namespace) -> Dict[str, Any]:
    """What may be left, as ``prune()`` and the methods are told."""
    if args.latency is None:
        return {'macs': args.macs}
    return {'latency': args.latency, 'latency_batch_size': args.latency_batch_size or 1}


def run_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options that a resumed run must share with its start, as JSON values."""
    return {name: _plain(value) for name, value in sorted(vars(args).items()) if name not in _FREE}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
