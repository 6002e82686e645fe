"""``export_int8``: write a model in int8, and measure what that changes."""
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from ..activations import are_logits, has_classes, image_batches
from ..core import PruningError, eval_mode, one_line, unlogged, warn, write_whole
from ..latency import Forward, time_interleaved
from .benchmark import LEAST
from .export import FORMATS, Run, export_model, onnx_forward, read_pt2
from .quantization import QUANTIZERS

__all__ = ['Int8Report', 'export_int8']

# The largest relative error of a file: half of the outputs' mean square is lost.
WORST_ERROR = 0.5 ** 0.5


@dataclass(frozen=True)
class Int8Report:
    """What int8 changes. Pairs are of the same model in float32 and in int8.

    Attributes:
        calibration_images: Number of images that the ranges of the activations come from.
        images: Number of images on which outputs were compared.
        error: Root mean square of the outputs' difference, divided by that of the outputs in float32.
        agreement: Share of the images for which the largest logit is of the same class. None: the model returns no
            logits.
        top1: Top-1 in percent. None: the images have no classes, or the model returns no logits.
        latency_ms: Median milliseconds of a forward of the example batch. None: not measured.
        size: Bytes of the files.
    """
    calibration_images: int
    images: int
    error: float
    agreement: Optional[float]
    top1: Optional[Tuple[float, float]]
    latency_ms: Optional[Tuple[float, float]]
    size: Tuple[int, int]


def export_int8(
        model: nn.Module,
        path: Path,
        format: str,
        images: Tensor,
        calibration: Any,
        test: Optional[Iterable[Any]] = None,
        dynamic_batch: bool = False,
        num_images: Optional[int] = None,
        seconds: float = 2.0,
) -> Int8Report:
    """Write a model with weights and activations in int8 to a file, and compare it with the model in float32.

    ONNX files are quantised by ONNX Runtime, torch.export archives by torchao (``deploy/quantization.py``). Outputs in
    int8 are near those in float32, not equal to them. The file appears only if they are finite, and if their relative
    error (``Int8Report.error``) is at most 0.71: then half of the outputs' mean square is lost. Whether the top-1 that
    is left is enough is for you to judge.

    Args:
        model: A model on the CPU, in float32.
        path: The file to write.
        format: One of ``FORMATS``.
        images: An example batch. Latency is measured on it.
        calibration: Images that the ranges of the activations come from, as the model gets them: in one tensor, a list
            of batches, or a loader. A batch is a tensor of images, or a tuple that starts with one.
        test: Batches to compare outputs on, as those of ``calibration``; a list or a loader. Where the second entry of
            a batch has the classes of its images, top-1 is measured. None: the calibration images.
        dynamic_batch: Whether the file takes batches of any size. False: only of the size of ``images``.
        num_images: Largest number of calibration images. None: as in ``compensate``.
        seconds: How long to measure latency, both programs together and turn by turn. A torch.export archive is
            compiled by inductor for it. 0: it isn't measured.

    Raises:
        PruningError: The model can't be exported or quantised, a package is missing, there are no images or they have
            another size, the outputs in int8 aren't finite or too far off, or the file can't be written.
    """
    batch_size = None if dynamic_batch else len(images)
    calibration = _calibration_batches(calibration, model, images, num_images)
    reports: List[Int8Report] = []

    def write_and_compare(part: Path) -> None:
        float32 = Path(folder) / f'float32.{format}'
        export_model(model, float32, format, images, dynamic_batch)
        with one_line(f'export: this model can\'t be quantised in {format}'):
            QUANTIZERS[format](float32, part, _of_size(calibration, batch_size))
        runs = [_in_batches(FORMATS[format][1](file), batch_size) for file in (float32, part)]
        compared = _Comparison(has_classes(model))
        with one_line('export: images to compare outputs on can\'t be read'):
            for batch in calibration if test is None else test:
                compared.add(runs, *_split(batch))
        compared.check()
        reports.append(Int8Report(
            sum(map(len, calibration)), compared.images, compared.error, compared.agreement, compared.top1,
            _latencies(format, (float32, part), images, seconds), (float32.stat().st_size, part.stat().st_size)))

    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), eval_mode(model):
            write_whole(path, write_and_compare)
    except OSError as e:
        raise PruningError(f'export: {path} can\'t be written: {e.strerror or e}') from e
    return reports[0]


def _calibration_batches(data: Any, model: nn.Module, images: Tensor, most: Optional[int]) -> List[Tensor]:
    batches = image_batches(data, model, most)
    odd = next((batch for batch in batches if batch.shape[1:] != images.shape[1:]), None)
    if odd is not None:
        raise PruningError(
            f'export: calibration images have the shape {tuple(odd.shape[1:])}, the file takes '
            f'{tuple(images.shape[1:])}; resize them')
    return batches


def _of_size(batches: Sequence[Tensor], batch_size: Optional[int]) -> List[Tensor]:
    """Batches of the size that a file takes. None: of any size."""
    if batch_size is None:
        return list(batches)
    return [_filled(part, batch_size) for part in torch.cat(list(batches)).split(batch_size)]


def _filled(images: Tensor, batch_size: int) -> Tensor:
    """A whole batch: the last image is repeated."""
    return torch.cat([images, images[-1:].expand(batch_size - len(images), *images.shape[1:])])


def _in_batches(run: Run, batch_size: Optional[int]) -> Run:
    """A function that runs any number of images through a program that takes batches of one size."""
    if batch_size is None:
        return run

    def run_all(images: Tensor) -> List[Tensor]:
        parts = images.split(batch_size)
        outputs = [[out[:len(part)] for out in run(_filled(part, batch_size))] for part in parts]
        return [torch.cat(each) for each in zip(*outputs)]

    return run_all


def _split(batch: Any) -> Tuple[Tensor, Optional[Tensor]]:
    """The images of a batch, and their classes if it has them."""
    if isinstance(batch, Tensor):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 else None


@dataclass
class _Comparison:
    """Sums over images, of the outputs in float32 and in int8."""
    may_be_logits: bool
    images: int = 0
    same: int = 0
    squares: float = 0.0
    squared_error: float = 0.0
    right: List[int] = field(default_factory=lambda: [0, 0])
    logits: bool = True
    labelled: bool = True

    def add(self, runs: Sequence[Run], images: Tensor, classes: Optional[Tensor]) -> None:
        """Run a batch of images through both programs."""
        with one_line(f'export: the file can\'t be run on images of {tuple(images.shape)}'):
            expected, found = (run(images) for run in runs)
        self.images += len(images)
        for a, b in zip(expected, found, strict=True):
            self.squares += a.double().square().sum().item()
            self.squared_error += (a.double() - b.double()).square().sum().item()
        self.logits &= are_logits(expected, self.may_be_logits)
        self.labelled &= classes is not None
        if self.logits:
            largest = [outputs[0].argmax(1) for outputs in (expected, found)]
            self.same += (largest[0] == largest[1]).sum().item()
            if self.labelled:
                self.right = [n + (each == classes).sum().item() for n, each in zip(self.right, largest)]

    def check(self) -> None:
        """Raise ``PruningError`` if the outputs in int8 are of no use."""
        if not self.images:
            raise PruningError('export: there are no images to compare outputs on; give at least one batch')
        if not self.error <= WORST_ERROR:  # written so that NaN fails, too
            raise PruningError(
                f'export: in int8, the relative error of the outputs is {self.error:.2g}, at most '
                f'{WORST_ERROR:.2g} is allowed; nothing was written; try other images or the other --format')

    @property
    def error(self) -> float:
        return (self.squared_error / max(self.squares, 1e-30)) ** 0.5

    @property
    def agreement(self) -> Optional[float]:
        return self.same / self.images if self.logits else None

    @property
    def top1(self) -> Optional[Tuple[float, float]]:
        if not (self.logits and self.labelled):
            return None
        float32, int8 = (100 * count / self.images for count in self.right)
        return float32, int8


def _latencies(format: str, files: Sequence[Path], images: Tensor, seconds: float) -> Optional[Tuple[float, float]]:
    """Median milliseconds of a forward of each file; None, with a warning, where it can't be measured."""
    if not seconds:
        return None
    try:
        with one_line('torch.compile can\'t be used'):
            forwards = [FASTEST[format](file, images) for file in files]
    except PruningError as e:
        warn(f'export: latency is not measured: {e}')
        return None
    float32, int8 = (1000 * taken.median for taken in time_interleaved(forwards, images.device, seconds, LEAST))
    return float32, int8


def _onnx_session(path: Path, images: Tensor) -> Forward:
    return partial(onnx_forward(path), images)


def _compiled_pt2(path: Path, images: Tensor) -> Forward:
    """The program of an archive, compiled by inductor, which has int8 kernels for frozen weights only."""
    from torch._inductor import config  # not at the top: slow, and only needed here
    forward = partial(torch.compile(read_pt2(path).module(), dynamic=False), images)
    with config.patch(freezing=True), unlogged('torch.utils.cpp_extension'), catch_warnings():
        simplefilter('ignore')
        forward()
    return forward


# By format: a forward as fast as it is where the file is deployed.
FASTEST: Dict[str, Callable[[Path, Tensor], Forward]] = {'onnx': _onnx_session, 'pt2': _compiled_pt2}
