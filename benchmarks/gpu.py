"""All that waits for a GPU, in one command: tests, latency in half precision, the overhead of a step, the long runs.

``python benchmarks/gpu.py --data-dir cifar10-jpeg --weights-dir DIR`` runs tests/test_gpu.py, times models cut to half
their MACs or half their time at batch 1 and 64, times training steps with mixed precision, and then runs the
experiments of the papers' lengths for as long as ``--hours`` allows (none without ``--data-dir``). Writes
results/gpu.json and .md, and goes on where it was interrupted. ``--device cpu`` is a rehearsal: small models, a minute
or so, results in a folder that goes.
"""
import argparse
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Dict, List, Tuple

import timm
import torch
from common import RESULTS, header_line, measure_missing, write_results
from overhead import stepper
from torch import nn

import timm_epfs
from timm_epfs.latency import time_models
from timm_epfs.report import count_macs

HERE = Path(__file__).parent
TESTS = 'tests'
CUTS: Dict[str, Dict[str, Any]] = {'macs=0.5': {'macs': 0.5}, 'latency=0.5': {'latency': 0.5}}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        models: Models whose latency is measured.
        batches: Images per forward.
        steps: Images per training step, by model.
        seconds: How long the models of a row take turns.
        repeats: Timed training steps.
        dtype: Half precision that the device has kernels for.
    """
    models: Tuple[str, ...]
    batches: Tuple[int, ...]
    steps: Dict[str, int]
    seconds: float
    repeats: int
    dtype: torch.dtype


FULL = Size(
    ('resnet18', 'resnet50', 'mobilenetv2_100', 'efficientnet_b0', 'vgg16_bn', 'convnext_tiny',
     'deit_small_patch16_224', 'swin_tiny_patch4_window7_224'),
    (1, 64), {'resnet18': 256, 'resnet20_cifar': 1024}, 10.0, 50, torch.float16)
REHEARSAL = Size(('resnet20_cifar',), (1,), {'resnet20_cifar': 16}, 0.5, 3, torch.bfloat16)


def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')
    on_cpu = torch.device(args.device).type == 'cpu'
    size = REHEARSAL if on_cpu else FULL
    rows = [TESTS, *(f'overhead {name}' for name in size.steps),
            *(f'latency {name}@{batch}' for name in size.models for batch in size.batches)]
    with tempfile.TemporaryDirectory() if on_cpu else nullcontext(args.results) as folder:
        path = Path(folder) / 'gpu.json'
        results = measure_missing(
            path, 'rows', rows, lambda row: measure(row, args.device, size), args.redo, device=describe(args.device),
            dtype=str(size.dtype).removeprefix('torch.'))
        write_results(path, results, markdown(results))
    if args.data_dir and not on_cpu:
        run_papers(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--data-dir', type=Path, help='CIFAR-10, for the experiments of the papers\' lengths')
    parser.add_argument('--weights-dir', type=Path, help='weights that dense baselines start from')
    parser.add_argument('--hours', type=float, default=24, help='most time for these experiments')
    parser.add_argument('--redo', action='store_true', help='measure everything again')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    args = parser.parse_args()
    if torch.device(args.device).type == 'cuda' and not torch.cuda.is_available():
        parser.error('there is no GPU; --device cpu is a rehearsal')
    return args


def describe(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}'
    return device


def measure(row: str, device: str, size: Size) -> Dict[str, Any]:
    kind, _, what = row.partition(' ')
    if kind == TESTS:
        return run_tests(device)
    if kind == 'overhead':
        return overhead(what, device, size)
    name, _, batch = what.partition('@')
    return latency(name, int(batch), device, size)


def run_tests(device: str) -> Dict[str, Any]:
    """How many tests of tests/test_gpu.py pass. One that fails ends the command."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        code = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-n', '0', str(HERE.parent / 'tests' / 'test_gpu.py'),
             '--device', device, f'--junitxml={report}'], cwd=HERE.parent).returncode
        if code:
            sys.exit('the tests fail: mend them first')
        suite = ElementTree.parse(report).getroot().find('testsuite')
    return {'passed': int(suite.get('tests')) - int(suite.get('skipped')), 'seconds': float(suite.get('time'))}


def latency(name: str, batch: int, device: str, size: Size) -> Dict[str, Any]:
    """MACs, parameters and milliseconds of a dense model and of cuts of it, which take turns."""
    torch.manual_seed(0)
    dense = timm.create_model(name).eval().to(device, size.dtype)
    images = torch.randn(batch, *dense.pretrained_cfg['input_size'], device=device, dtype=size.dtype)
    models: Dict[str, nn.Module] = {'dense': dense}
    for cut, budget in CUTS.items():
        models[cut] = timm_epfs.prune(dense, **budget, latency_batch_size=batch, example_input=images[:1]).eval()
    measured = time_models(list(models.values()), (images,), {}, size.seconds, least=8)
    return {
        key: {
            'macs': count_macs(model, (images[:1],), {}), 'params': sum(p.numel() for p in model.parameters()),
            'median_ms': 1000 * taken.median, 'least_ms': 1000 * min(taken.times), 'forwards': len(taken.times),
        }
        for (key, model), taken in zip(models.items(), measured)
    }


def overhead(name: str, device: str, size: Size) -> Dict[str, float]:
    """Seconds of a plain step and of one with EPFS in mixed precision, turn by turn, and the memory of each."""
    steps = {kind: stepper(name, kind, size.steps[name], device, size.dtype) for kind in ('plain', 'epfs')}
    seconds: Dict[str, List[float]] = {kind: [] for kind in steps}
    peaks: Dict[str, float] = {}
    for repeat in range(size.repeats + 3):
        for kind, step in steps.items():
            taken, peak = timed(step, device)
            if repeat >= 3:  # the first ones select kernels and fill the allocator
                seconds[kind].append(taken)
                peaks[kind] = peak
    return {
        **{f'{kind}_s': median(taken) for kind, taken in seconds.items()},
        'time': median(b / a for a, b in zip(seconds['plain'], seconds['epfs'])),
        **{f'{kind}_mb': peak for kind, peak in peaks.items()},
    }


def timed(step: Any, device: str) -> Tuple[float, float]:
    """Seconds of a step, and the megabytes that it needs beside what both models hold; 0 where no allocator counts."""
    on_gpu = torch.device(device).type == 'cuda'
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if on_gpu else 0
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return time.perf_counter() - start, (peak - held) / 1e6


def run_papers(args: argparse.Namespace) -> None:
    """The experiments of the papers' lengths. What isn't done when the time is over goes on at the next call."""
    command = [sys.executable, str(HERE / 'comparison' / 'run.py'), 'cifar10', '*.papers/*', '--device', args.device,
               '--data-dir', str(args.data_dir)]
    if args.weights_dir:
        command += ['--weights-dir', str(args.weights_dir)]
    try:
        subprocess.run(command, timeout=3600 * args.hours, check=True)
    except subprocess.TimeoutExpired:
        print(f'{args.hours:g} hours are over; the same command goes on')


def markdown(results: Dict[str, Any]) -> str:
    rows = results['rows']
    tests = rows[TESTS]
    lines = [
        f'# On {results["device"]}',
        '',
        f'{tests["passed"]} tests passed in {tests["seconds"]:.0f} s. Latency is in {results["dtype"]}; the models of '
        'a row took turns, and *ms* is the fastest forward. Weights are random.',
        header_line(results['machine']),
        '',
        '| model | batch | cut by | MACs | parameters | dense ms | ms | speed-up | of promise |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for row, found in rows.items():
        kind, _, what = row.partition(' ')
        if kind == 'latency':
            name, _, batch = what.partition('@')
            dense = found['dense']
            for cut in CUTS:
                macs, params, left = (found[cut][q] / dense[q] for q in ('macs', 'params', 'least_ms'))
                lines.append(
                    f'| {name} | {batch} | {cut} | {macs:.3f} | {params:.3f} | {dense["least_ms"]:.2f} '
                    f'| {found[cut]["least_ms"]:.2f} | {1 / left:.2f} | {macs / left:.2f} |')
    lines += [
        '', f'A training step in {results["dtype"]} with a `GradScaler`, plain and with EPFS, turn by turn (medians):',
        '', '| model | plain, ms | EPFS, ms | ratio | plain, MB | EPFS, MB |', '|---|---|---|---|---|---|',
    ]
    for row, found in rows.items():
        if row.startswith('overhead'):
            lines.append(
                f'| {row.partition(" ")[2]} | {1e3 * found["plain_s"]:.1f} | {1e3 * found["epfs_s"]:.1f} '
                f'| {found["time"]:.3f} | {found["plain_mb"]:.0f} | {found["epfs_mb"]:.0f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
