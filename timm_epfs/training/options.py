"""Checks the options of ``timm-epfs train``, and derives epochs, budget and arguments from them."""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Tuple

import torch

from ..core import Budget, PruningError, warn
from ..zoo import check_readable

__all__ = ['PHASES', 'budget', 'check_options', 'check_unchanged', 'cut_options', 'phase_epochs', 'run_options']

PHASES = ('dense', 'sparse', 'finetune')

_PRUNER_OPTIONS = ('exclude', 'only', 'kinds', 'streams')  # what may be cut
_METHOD_OPTIONS = ('scope', 'widths', 'round_to', 'floor')  # how units are chosen

# Options that may change when a run is resumed: where and how it runs, and what helps against a loss of NaN.
_MAY_CHANGE = (
    'output', 'report', 'resume', 'overwrite', 'checkpoint_hist', 'workers', 'device', 'data_dir', 'checkpoint', 'run',
    'lr', 'sparse_lr', 'finetune_lr', 'clip_grad', 'clip_mode', 'rank', 'local_rank', 'world_size', 'distributed',
)


def check_options(args: argparse.Namespace) -> None:
    """Check combinations of options, and fill in defaults that depend on other options.

    Raises:
        PruningError: Options contradict each other, or one is missing.

    Warns:
        UserWarning: ``--amp`` is slow on this processor.
    """
    if args.dataset == 'digits':
        if args.data_dir:
            raise PruningError(f'--dataset digits needs no folder, --data-dir {args.data_dir} was given; drop it')
    elif not args.data_dir:
        raise PruningError('train needs images, no --data-dir was given; give it, or --dataset digits for a first try')
    if args.pretrained and args.checkpoint:
        raise PruningError('--pretrained and --checkpoint were both given; drop one: they name different weights')
    if args.checkpoint:
        check_readable(args.checkpoint)
    if args.resume and args.overwrite:
        raise PruningError('--resume and --overwrite were both given; drop one: continue the run, or replace it')
    budget(args)
    if args.method != 'none' and args.criterion:
        raise PruningError(f'--criterion needs --method none, --method is {args.method}; drop one of them')
    if args.method != 'none' and args.compensate:
        raise PruningError(
            f'--compensate is for cuts that nothing was learned for, --method is {args.method}; drop one of them')
    _check_cut_steps(args)
    if args.amp and args.amp_dtype == 'float16' and args.device == 'cpu':
        raise PruningError('--amp-dtype float16 has no fast kernels on cpu; use bfloat16, or another --device')
    if args.amp and args.device == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2':
        warn('--amp on a processor without AVX-512 is many times slower than float32; drop it')
    if args.workers is None:
        args.workers = 0 if args.dataset == 'digits' else min(4, os.cpu_count() or 1)
    phase_epochs(args)


def _check_cut_steps(args: argparse.Namespace) -> None:
    steps = args.cut_steps or 1
    if steps == 1:
        return
    if args.method != 'none':
        raise PruningError(f'--cut-steps {steps} needs --method none, --method is {args.method}; drop one of them')
    if args.latency is not None:
        raise PruningError(f'--cut-steps {steps} needs a budget of --macs or --params, --latency was given; give those')
    finetune = phase_epochs(args)['finetune']
    if finetune < steps:
        raise PruningError(
            f'--cut-steps {steps} needs as many epochs of fine-tuning, there are {finetune}; give more --epochs or '
            'fewer steps')


def phase_epochs(args: argparse.Namespace) -> Dict[str, int]:
    """Epochs of each phase by name. They add up to ``--epochs``.

    Raises:
        PruningError: The phases need more epochs than there are, or a method that learns has no sparse epochs.
    """
    learns = args.method != 'none'
    if args.sparse_epochs and not learns:
        raise PruningError(
            f'--method none has no sparse phase, --sparse-epochs {args.sparse_epochs} was given; drop it')
    dense = args.dense_epochs
    if dense is None:
        dense = 0 if args.pretrained or args.checkpoint else round(0.3 * (args.epochs - (args.sparse_epochs or 0)))
    sparse = args.sparse_epochs
    if sparse is None:
        sparse = round(0.4 * (args.epochs - dense)) if learns else 0
    if learns and sparse < 1:
        raise PruningError(
            f'--method {args.method} learns in the sparse phase, which has {sparse} epochs; give --sparse-epochs or '
            'more --epochs')
    finetune = args.epochs - dense - sparse
    if finetune < 0:
        raise PruningError(
            f'{dense} dense and {sparse} sparse epochs were asked for, --epochs is {args.epochs} for all phases; give '
            'more --epochs')
    return dict(zip(PHASES, (dense, sparse, finetune)))


def budget(args: argparse.Namespace) -> Budget:
    """The budget that the options name.

    Raises:
        PruningError: The value can't be a budget.
    """
    return Budget(args.macs, args.params, args.latency, args.latency_batch_size)


def cut_options(args: argparse.Namespace) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """The options that were given, as keyword arguments.

    ``--method-kwargs`` may hold any of them, and overrides an option of the same name.

    Returns:
        Arguments of ``Pruner``: what may be cut. And arguments of the method: how units are chosen.
    """
    names = (*_PRUNER_OPTIONS, *_METHOD_OPTIONS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {**given, **args.method_kwargs}
    return (
        {name: value for name, value in options.items() if name in _PRUNER_OPTIONS},
        {name: value for name, value in options.items() if name not in _PRUNER_OPTIONS},
    )


def run_options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options that must be the same when a run is resumed, as JSON values."""
    return {name: _to_json(value) for name, value in sorted(vars(args).items()) if name not in _MAY_CHANGE}


def check_unchanged(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ``PruningError`` if a run is resumed with other options than it was started with.

    Args:
        then: The options at the start, from ``run_options``.
        now: The options that the run is resumed with.
        folder: Folder of the run.
    """
    for name, value in now.items():
        if then.get(name) != value:
            raise PruningError(
                f'--resume: the run in {folder} was started with {name} {then.get(name)}, now it is {value}; give the '
                'same, or start again with --overwrite')


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
