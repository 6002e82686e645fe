"""What int8 costs and gains, dense and pruned: top-1 and time by ONNX Runtime, against float32.

``python benchmarks/int8.py resnet56_cifar --data-dir cifar10-jpeg`` and ``tf_efficientnet_lite0 --checkpoint
FILE.safetensors --data-dir FOLDER.tar`` take weights and images as training_free.py does. The images to fit on choose
the widths, compensate the cut and give the ranges of int8. ``--pruned`` adds models that are pruned and trained
already, by name or folder. Writes results/int8_<model>.json and .md, and goes on where it was interrupted.
"""
import argparse
import tempfile
import time
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from common import RESULTS, header_line, measure_missing, write_results
from torch import nn
from training_free import Job, add_job_arguments, parse_job

from timm_epfs.deploy import export_int8, export_model, onnx_forward
from timm_epfs.report import count_macs
from timm_epfs.zoo import load_model

PACKAGES = ('onnx', 'onnxruntime')
DENSE = 'dense'
LEAST = 20  # turns


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    budgets = {f'compensated at {macs:g}': macs for macs in args.macs}
    path = args.results / f'int8_{args.model}.json'
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Job(args, args.seed), budgets, Path(folder), args.seconds)
        results = measure_missing(
            path, 'rows', [DENSE, *budgets, *args.pruned], bench.measure, model=args.model, images=args.data_dir.name,
            packages={name: version(name) for name in PACKAGES})
    write_results(path, results, markdown(results))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_job_arguments(parser)
    parser.add_argument('--macs', type=float, nargs='*', default=[0.7], help='shares of the MACs to keep')
    parser.add_argument('--pruned', nargs='*', default=[], metavar='NAME|DIR', help='pruned models with their weights')
    parser.add_argument('--seed', type=int, default=0, help='of the choice of images')
    parser.add_argument('--seconds', type=float, default=10, help='how long the models of a row take turns')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    return parse_job(parser)


class Bench:
    """Measures one model after the other.

    Args:
        job: The dense model with its images.
        budgets: Share of the MACs to keep, by the name of the row.
        folder: Where ONNX files are kept.
        seconds: How long the models of a row take turns.
    """

    def __init__(self, job: Job, budgets: Dict[str, float], folder: Path, seconds: float):
        self._job, self._budgets, self._folder, self._seconds = job, budgets, folder, seconds

    def measure(self, name: str) -> Dict[str, Any]:
        """Top-1 in percent, bytes and milliseconds of a model in float32 and in int8."""
        fit, test = self._job.batches
        model, example = self._model(name), test[0][0][:1]
        files = {kind: self._folder / f'{kind}.onnx' for kind in ('float32', 'int8')}
        for file in files.values():
            file.unlink(missing_ok=True)
        export_model(model, files['float32'], 'onnx', example, dynamic_batch=True)
        report = export_int8(
            model, files['int8'], 'onnx', example, fit, test, dynamic_batch=True,
            num_images=sum(len(images) for images, _ in fit), seconds=0)
        files = {DENSE: self._dense_file, **files}
        forwards = {kind: partial(onnx_forward(file), example) for kind, file in files.items()}
        return {
            'macs': count_macs(model, (example,), {}),
            'calibration_images': report.calibration_images, 'test_images': report.images,
            'agreement': report.agreement, 'error': report.error,
            **{what: dict(zip(('float32', 'int8'), getattr(report, what))) for what in ('top1', 'size')},
            'least_ms': least_ms(forwards, self._seconds),
        }

    def _model(self, name: str) -> nn.Module:
        if name == DENSE:
            return self._job.model
        if name in self._budgets:
            return self._job.pruner(macs=self._budgets[name])
        return load_model(name, pretrained=True)

    @cached_property
    def _dense_file(self) -> Path:
        """What every model takes turns with: the dense one in float32."""
        path = self._folder / 'dense.onnx'
        export_model(self._job.model, path, 'onnx', self._job.batches[1][0][0][:1], dynamic_batch=True)
        return path


def least_ms(forwards: Dict[str, Callable[[], Any]], seconds: float) -> Dict[str, float]:
    """Milliseconds of processor time of the fastest forward of each, which take turns on one thread.

    On a machine that does other work too, the time on the wall would also count the forward's waiting.
    """
    taken: Dict[str, List[float]] = {kind: [] for kind in forwards}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[DENSE]) < LEAST:
        for kind, forward in forwards.items():
            forward()  # its weights are in the cache again
            start = time.thread_time()
            forward()
            taken[kind].append(1000 * (time.thread_time() - start))
    return {kind: min(each) for kind, each in taken.items()}


def markdown(results: Dict[str, Any]) -> str:
    rows = results['rows']
    dense = rows[DENSE]
    packages = ', '.join(f'{name} {number}' for name, number in results['packages'].items())
    lines: List[str] = [
        f'# {results["model"]} in int8',
        '',
        'Weights (one scale per channel) and activations in int8, by ONNX Runtime\'s static quantisation, with ranges '
        f'from {dense["calibration_images"]:,} training images, which also chose the widths of compensated cuts. Top-1 '
        f'on {dense["test_images"]:,} other images of `{results["images"]}`. *Times as fast*: as the dense model in '
        'float32, by ONNX Runtime at batch 1 on one thread; they took turns, and the processor time of the fastest '
        'forward of each counts.',
        f'{header_line(results["machine"])[:-1]}; {packages}.',
        '',
        '| model | MACs | float32, % | int8, % | change | float32, kB | int8, kB | times as fast: float32 | int8 |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for name, row in rows.items():
        top1, size, ms = (row[what] for what in ('top1', 'size', 'least_ms'))
        lines.append(
            f'| {name} | {row["macs"] / dense["macs"]:.3f} | {top1["float32"]:.2f} | {top1["int8"]:.2f} '
            f'| {top1["int8"] - top1["float32"]:+.2f} | {size["float32"] / 1e3:.0f} | {size["int8"] / 1e3:.0f} '
            f'| {ms["dense"] / ms["float32"]:.2f} | {ms["dense"] / ms["int8"]:.2f} |')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
