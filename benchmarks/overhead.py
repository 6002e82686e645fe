"""What EPFS adds to a training step: masks, Center Loss and FISTA against the plain step, as ratios.

Time: plain and learning steps turn by turn in one process, medians. Memory: the peak of a process that does nothing but
a few steps of one kind. ``python benchmarks/overhead.py`` writes results/overhead.json and .md.
"""
import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Optional

import timm
import torch
import torch.nn.functional as F
from common import RESULTS, header, header_line, write_results

import timm_epfs

CASES = {'resnet18': (32, 224), 'resnet20_cifar': (128, 32)}
PROCESSES = 5
GOALS = {'time': 1.05, 'memory': 1.02}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'of {", ".join(CASES)}; all by default')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    parser.add_argument('--peak', nargs=2, metavar=('MODEL', 'KIND'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [name for name in args.models if name not in CASES]
    if unknown:
        parser.error(f'{unknown[0]!r} is not measured here; one of {", ".join(CASES)}')
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(*args.peak))
        return
    rows = {name: measure(name, args.repeats, args.threads) for name in args.models or CASES}
    results = {'machine': header(), 'threads': args.threads, 'repeats': args.repeats, 'goals': GOALS, 'models': rows}
    write_results(args.results / 'overhead.json', results, markdown(rows, args.repeats, args.threads))


def measure(name: str, repeats: int, threads: int) -> Dict[str, float]:
    """Seconds of a plain step and of one with EPFS, turn by turn, and the peak memory of a process of each."""
    steps = {kind: stepper(name, kind) for kind in ('plain', 'epfs')}
    seconds: Dict[str, list] = {kind: [] for kind in steps}
    for repeat in range(repeats + 1):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first of each warms up
                seconds[kind].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds['plain'], seconds['epfs'])]
    command = [sys.executable, __file__, '--threads', str(threads), '--peak', name]
    memory = {  # the heap's layout differs from process to process
        kind: statistics.median(
            float(subprocess.run([*command, kind], check=True, capture_output=True, text=True).stdout)
            for _ in range(PROCESSES))
        for kind in steps
    }
    return {
        'plain_s': statistics.median(seconds['plain']), 'epfs_s': statistics.median(seconds['epfs']),
        'time': statistics.median(ratios), 'plain_mb': memory['plain'], 'epfs_mb': memory['epfs'],
        'memory': memory['epfs'] / memory['plain'],
    }


def stepper(
        name: str,
        kind: str,
        batch: Optional[int] = None,
        device: str = 'cpu',
        amp_dtype: Optional[torch.dtype] = None,
) -> Callable[[], None]:
    """One training step of a model of its own, with or without a learner.

    Args:
        name: One of ``CASES``.
        kind: ``'plain'`` or ``'epfs'``.
        batch: Images per step. None: those of ``CASES``.
        device: Where it trains.
        amp_dtype: Data type of mixed precision, with a ``GradScaler``. None: float32.
    """
    usual, size = CASES[name]
    torch.manual_seed(0)
    model = timm.create_model(name).train().to(device)
    images = torch.randn(batch or usual, 3, size, size, device=device)
    target = torch.randint(model.num_classes, (len(images),), device=device)
    autocast = torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=amp_dtype is not None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    learner = timm_epfs.EPFS(model, macs=0.5, steps=1000) if kind == 'epfs' else None

    def step() -> None:
        with autocast:
            loss = F.cross_entropy(model(images), target)
            if learner is not None:
                loss = loss + learner.penalty(target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if learner is not None:
            learner.step()

    return step


def peak(name: str, kind: str) -> float:
    """Peak resident memory of this process after three steps, in MB."""
    step = stepper(name, kind)
    for _ in range(3):
        step()
    # Not getrusage: its peak outlives exec, and would be that of the process that started this one.
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) / 1024


def markdown(rows: Dict[str, Dict[str, float]], repeats: int, threads: int) -> str:
    lines = [
        '# What EPFS adds to a training step',
        '',
        f'Medians of {repeats}, {threads} threads, plain and learning steps turn by turn; peak memory '
        f'of a process, median of {PROCESSES}. Goals: time ≤ {GOALS["time"]}, memory ≤ {GOALS["memory"]}.',
        header_line(header()),
        '',
        '| model | batch, size | plain step, s | EPFS, s | ratio | plain, MB | EPFS, MB | ratio |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name, row in rows.items():
        batch, size = CASES[name]
        lines.append(
            f'| {name} | {batch}, {size} | {row["plain_s"]:.3f} | {row["epfs_s"]:.3f} | {row["time"]:.3f} '
            f'| {row["plain_mb"]:.0f} | {row["epfs_mb"]:.0f} | {row["memory"]:.3f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
