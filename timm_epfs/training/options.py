"""What the options of ``timm-epfs train`` amount to, and which of them go together."""
import argparse
import os
from typing import Any, Dict, Tuple

import torch

from ..core import Budget, PruningError, warn
from ..zoo import check_readable

__all__ = ['PHASES', 'budget', 'check_options', 'cut_options', 'phase_epochs', 'run_options']

PHASES = ('dense', 'sparse', 'finetune')

# Options that say what may be cut, and how units are chosen.
_WHAT = ('exclude', 'only', 'kinds', 'streams')
_HOW = ('scope', 'widths', 'round_to', 'floor')

# A run may be resumed with others of these: how it runs, and what helps where the loss was no number any more.
_FREE = (
    'output', 'resume', 'overwrite', 'checkpoint_hist', 'workers', 'device', 'data_dir', 'checkpoint', 'run',
    'lr', 'sparse_lr', 'finetune_lr', 'clip_grad', 'clip_mode', 'rank', 'local_rank', 'world_size', 'distributed',
)


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
    budget(args)
    if args.method != 'none' and args.criterion:
        raise PruningError(f'--criterion goes with --method none, found --method {args.method}: drop one of them')
    if args.amp and args.amp_dtype == 'float16' and args.device == 'cpu':
        raise PruningError('--amp-dtype float16 has no fast kernels on cpu: use bfloat16, or another --device')
    if args.amp and args.device == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        warn('--amp on a processor without AVX-512 takes many times as long as float32: drop it')
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


def budget(args: argparse.Namespace) -> Budget:
    """What may be left.

    Raises:
        PruningError: It can't be a budget.
    """
    return Budget(args.macs, args.params, args.latency, args.latency_batch_size)


def cut_options(args: argparse.Namespace) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What may be cut, as a ``Pruner`` takes it, and the method's own arguments: those that were given.

    ``--method-kwargs`` may hold any of them, and goes before an option of the same name.
    """
    given = {name: getattr(args, name) for name in (*_WHAT, *_HOW) if getattr(args, name) is not None}
    options = {**given, **args.method_kwargs}
    return (
        {name: value for name, value in options.items() if name in _WHAT},
        {name: value for name, value in options.items() if name not in _WHAT},
    )


def run_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options that a resumed run must share with its start, as JSON values."""
    return {name: _plain(value) for name, value in sorted(vars(args).items()) if name not in _FREE}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
