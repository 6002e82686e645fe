"""Every method at equal MACs and equal epochs, from the same dense checkpoint.

``python benchmarks/comparison/run.py cifar10 --all --data-dir DIR --weights-dir DIR`` runs what has no result yet on
CIFAR-10, one after the other, and goes on where it was interrupted; ``imagenette`` instead of ``cifar10`` does so on
photographs. An experiment is a file of options of ``timm-epfs train`` in <images>/experiments/<model>/; its results are
<images>/results/<model>/<experiment>-<seed>.json. ``table.py`` makes the tables of them.

Short runs that a method is tuned by stand apart, in <model>.trials, longer ones of what ships in <model>.long, and in
<model>.papers those with the budgets of the papers, which wait for a GPU.
"""
import argparse
import fnmatch
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
from safetensors.torch import load_file
from timm.utils import init_distributed_device

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from baselines import RUNNERS  # noqa: E402
from common import header, write_json  # noqa: E402
from image_sets import SETS  # noqa: E402
from records import halved, plan_record  # noqa: E402

from timm_epfs.cli import parse_args  # noqa: E402
from timm_epfs.cli.arguments import given_model_args  # noqa: E402
from timm_epfs.training.checkpoints import write_tensors  # noqa: E402
from timm_epfs.training.data import Batches  # noqa: E402
from timm_epfs.training.options import check_options  # noqa: E402

DENSE = 'dense'


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    images = SETS[args.images](args.data_dir, args.runs)
    chosen = list(_experiments(args))
    if not chosen:
        sys.exit(f'no experiment is named {" or ".join(args.patterns)}; see {args.images}/experiments')
    _check_images(args, chosen, images.name)
    for path in chosen:
        experiment = json.loads(path.read_text())
        asked = [0] if path.stem == DENSE else args.seeds or experiment['seeds']
        seeds = [seed for seed in asked if not _result(args, path, seed).exists()]
        wanted = experiment.get('device', args.device)
        if seeds and torch.device(wanted).type != torch.device(args.device).type:
            print(f'{path.parent.name}/{path.stem} is too long for {args.device}: give --device {wanted}', flush=True)
            continue
        start = _folder(args) / 'experiments' / _model(path.parent.name) / f'{DENSE}.json'
        for seed in seeds:
            if path != start and not _dense_weights(args, start.parent.name).exists():
                _make(args, start, 0, images)
            _make(args, path, seed, images)


def _folder(args: argparse.Namespace) -> Path:
    """What is committed of a set of images: experiments and results."""
    return HERE.parent / args.images


def _check_images(args: argparse.Namespace, chosen: List[Path], images: str) -> None:
    """What is there of the experiments' models, weights to start from too, has to be from the same images."""
    for folder in sorted({group for path in chosen for group in (path.parent.name, _model(path.parent.name))}):
        for path in sorted((args.results / folder).glob('*.json')):
            found = json.loads(path.read_text())['images']
            if found != images:
                sys.exit(
                    f'--data-dir {args.data_dir} has {images}, and {folder}/{path.name} was made on {found}: '
                    f'give these images a folder of their own by --results')


def _result(args: argparse.Namespace, path: Path, seed: int) -> Path:
    return args.results / path.parent.name / f'{path.stem}-{seed}.json'


def _dense_weights(args: argparse.Namespace, model: str) -> Path:
    """What all experiments of a model start from, in half precision: small models' are committed with the result."""
    return args.results / model / f'{DENSE}-0.safetensors'


def _make(args: argparse.Namespace, path: Path, seed: int, images: Any) -> None:
    """Run an experiment and write down its result, for a dense baseline with the weights."""
    name = f'{path.parent.name}/{path.stem}-{seed}'
    print(f'== {name}', flush=True)
    experiment = json.loads(path.read_text())
    if args.float32:
        experiment['options'].pop('amp', None)
    write_json(_result(args, path, seed), _run(args, experiment, name, seed, images))
    if path.stem == DENSE:
        weights = load_file(args.runs / name / 'dense.safetensors')
        write_tensors(_dense_weights(args, path.parent.name), halved(weights))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', choices=SETS)
    parser.add_argument('patterns', nargs='*', help='experiments, as in resnet20_cifar/epfs*')
    parser.add_argument('--all', action='store_true', help='every experiment')
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of the images')
    parser.add_argument('--weights-dir', type=Path, help='folder of the weights that dense baselines start from')
    parser.add_argument('--seeds', type=int, nargs='+', help='in place of the experiments\' own')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--float32', action='store_true', help='without mixed precision, where the processor has no bfloat16')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--runs', type=Path, help='checkpoints, models and reports (default: <images>/runs)')
    parser.add_argument('--results', type=Path, help='default: <images>/results')
    args = parser.parse_args()
    args.runs, args.results = args.runs or _folder(args) / 'runs', args.results or _folder(args) / 'results'
    if bool(args.patterns) == args.all:
        parser.error('name experiments, or give --all')
    return args


def _experiments(args: argparse.Namespace) -> Iterator[Path]:
    for path in sorted((_folder(args) / 'experiments').glob('*/*.json')):
        name = f'{path.parent.name}/{path.stem}'
        if args.all or any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns):
            yield path


def _run(args: argparse.Namespace, experiment: Dict[str, Any], name: str, seed: int, images: Any) -> Dict[str, Any]:
    group, model = name.partition('/')[0], _model(name)
    folder, commit = args.runs / name, _commit()
    start = _start(args, experiment, model, images)
    options = parse_args([
        'train', model, '--output', str(folder), '--data-dir', str(args.data_dir), '--seed', str(seed),
        '--device', args.device, *(['--checkpoint', str(start)] if start else []),
        *(['--resume'] if folder.exists() else []), *images.flags,
        *_flags(experiment['options']),
    ])
    check_options(options)
    init_distributed_device(options)
    runner = _on_images(RUNNERS[experiment.get('runner', 'train')], images)
    run = runner(
        options, given_model_args(options), experiment=experiment, seed=seed, results=args.results / group)
    result = run()
    plan, rows = run.model.pruning_plan, {label: pair for label, (pair, _) in result.rows.items()}
    return {
        'name': name, 'seed': seed, 'experiment': experiment, 'images': images.name,
        'top1': {
            'dense': rows['top-1, %'][0],
            'cut': next((row['eval_top1'] for row in result.history if row['phase'] == 'cut'), None),
            'finetuned': rows['top-1, %'][1],
        },
        'macs': plan.cost['macs'], 'params': plan.cost['params'], 'latency_ms': rows['latency, ms'],
        'latency': {'batch_size': 1, 'threads': torch.get_num_threads(), 'dtype': 'float32', 'device': args.device},
        'epochs': run.epochs, 'seconds': _seconds(result.history), 'history': result.history,
        'machine': header(), 'commit': commit, 'plan': plan_record(plan),
    }


def _model(name: str) -> str:
    """The model of a folder of experiments, or of one of them."""
    return name.partition('/')[0].partition('.')[0]


def _start(args: argparse.Namespace, experiment: Dict[str, Any], model: str, images: Any) -> Optional[Path]:
    """The weights that a run starts from: the dense baseline's, or for that itself what its file names."""
    if 'weights' not in experiment:
        return _dense_weights(args, model)
    if experiment['weights'] is None:
        return None
    if args.weights_dir is None:
        sys.exit(f'{model}/{DENSE} starts from {experiment["weights"]}: give --weights-dir')
    return images.start(model, args.weights_dir / experiment['weights'], args.runs / model)


def _flags(options: Dict[str, Any]) -> List[str]:
    flags = []
    for name, value in options.items():
        if isinstance(value, dict):
            value = [f'{key}={item!r}' for key, item in value.items()]
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f'--{name}', *map(str, values)]
    return flags


def _on_images(runner: type, images: Any) -> type:
    class OnImages(runner):
        """A run on a set of images, whose history says how long each epoch took."""

        def _open_batches(self) -> Batches:
            self._since = time.perf_counter()
            return images.batches(self)

        def _record(self, *args: Any, **values: float) -> None:
            now = time.perf_counter()
            super()._record(*args, seconds=now - self._since, **values)
            self._since = time.perf_counter()

    return OnImages


def _seconds(history: List[Dict[str, Any]]) -> Dict[str, float]:
    phases = dict.fromkeys(row['phase'] for row in history)
    return {phase: sum(row['seconds'] for row in history if row['phase'] == phase) for phase in phases}


def _commit() -> str:
    git = ['git', '-C', str(HERE)]
    try:
        found = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return found + ('-dirty' if dirty else '')


if __name__ == '__main__':
    main()
