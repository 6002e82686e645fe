"""Measured latency and memory of a pruned model and its dense base, beside the speed-up that their MACs suggest."""
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..core import one_line
from ..latency import Forward, peak_memory, time_interleaved
from ..report import count_macs, random_images, size_on_disk
from ..surgery import build_base
from ..zoo import model_args
from .export import onnx_forward, trace_program, write_onnx

__all__ = ['Conditions', 'Timed', 'time_together', 'with_base']

LEAST = 5  # smallest number of timed forwards, however slow a model is


@dataclass(frozen=True)
class Conditions:
    """How models are run.

    Attributes:
        device: Device to run on.
        seconds: How long to measure a model and its base together, at each batch size.
        img_size: Image size in pixels. None: the model's own.
        amp_dtype: Data type of automatic mixed precision. None: float32 throughout.
        channels_last: Whether weights and images have the channels-last memory layout.
        compile_backend: Backend of ``torch.compile``. None: the models are not compiled.
        onnx: Whether ONNX Runtime runs the models, on the CPU.
    """
    device: str = 'cpu'
    seconds: float = 10.0
    img_size: Optional[int] = None
    amp_dtype: Optional[torch.dtype] = None
    channels_last: bool = False
    compile_backend: Optional[str] = None
    onnx: bool = False


@dataclass(frozen=True)
class Timed:
    """Measurements of one model at one batch size.

    Attributes:
        model: The model's name or folder.
        dense: Name of the dense base, which took turns with this model. None for a base, and for a model that was timed
            alone.
        batch_size: Images per forward.
        forwards: Number of forwards that were timed.
        median_ms, p10_ms, p90_ms: Median, 10th and 90th percentile of a forward's milliseconds.
        images_per_second: Throughput at the median.
        peak_bytes: Peak memory: weights, images and what torch allocates during a forward. None with ONNX Runtime,
            which has its own allocator.
        weight_bytes: Size of the weights.
        macs: Multiply-accumulates of one image.
        speedup: The base's median latency divided by this model's.
        theoretical_speedup: The base's MACs divided by this model's: the speed-up if latency were proportional to MACs.
        realised_share: ``speedup / theoretical_speedup``.
    """
    model: str
    dense: Optional[str]
    batch_size: int
    forwards: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    images_per_second: float
    peak_bytes: Optional[int]
    weight_bytes: int
    macs: float
    speedup: Optional[float] = None
    theoretical_speedup: Optional[float] = None
    realised_share: Optional[float] = None


def with_base(name: str, model: nn.Module, conditions: Conditions) -> Dict[str, nn.Module]:
    """A model, preceded by its dense base if it was pruned, both ready to run.

    Args:
        name: The model's name in the returned dict.
        model: The model, in evaluation mode. It is moved to the device.
        conditions: How the model will be run.

    Returns:
        The models by name: the base first, then the model.

    Raises:
        PruningError: The base can't be built, or the device can't be used.
    """
    models, plan = {name: model}, getattr(model, 'pruning_plan', None)
    if plan is not None:
        size_args = model_args(plan.base, conditions.img_size, {})
        dense = build_base(plan.base, {**plan.base_args, **size_args}).eval()
        if getattr(dense, 'num_classes', None) != getattr(model, 'num_classes', None):  # the classifier was replaced
            dense.reset_classifier(model.num_classes)
        models = {plan.base: dense, **models}
    with one_line(f"device {conditions.device!r} can't be used"):
        for each in models.values():
            each.requires_grad_(False).to(conditions.device)
            if conditions.channels_last:
                each.to(memory_format=torch.channels_last)
    return models


def time_together(models: Dict[str, nn.Module], batch_size: int, conditions: Conditions) -> List[Timed]:
    """Time models that take turns.

    Args:
        models: The models that ``with_base`` returned.
        batch_size: Images per batch.
        conditions: How the models are run.

    Returns:
        One row per model. The first model is the one that all others are compared with.

    Raises:
        PruningError: A model can't be run under these conditions.
    """
    images = random_images(next(iter(models.values())), conditions.img_size, batch_size).to(conditions.device)
    if conditions.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()  # otherwise, after a few models of one class, it runs the next ones without compiling them
    forwards = [_forward(each, images, conditions) for each in models.values()]
    autocast = torch.autocast(
        images.device.type, conditions.amp_dtype or torch.bfloat16, enabled=conditions.amp_dtype is not None)
    with torch.inference_mode(), autocast:
        for name, forward in zip(models, forwards):  # run once before timing: this compiles and selects kernels
            with one_line(f'{name} can\'t be run on images of {tuple(images.shape)}'):
                forward()
        measured = time_interleaved(forwards, images.device, conditions.seconds, LEAST)
        peaks = [None if conditions.onnx else peak_memory(forward, images.device) for forward in forwards]

    rows = [
        _row(name, models[name], images, measurement.times, peak)
        for name, measurement, peak in zip(models, measured, peaks)
    ]
    return [rows[0], *(_compared(rows[0], row) for row in rows[1:])]


def _row(name: str, model: nn.Module, images: Tensor, seconds: Sequence[float], allocated: Optional[int]) -> Timed:
    """Measurements of one model, not yet compared with another one.

    Args:
        name: The model's name.
        model: The model.
        images: The batch that it was run on.
        seconds: Seconds of each forward.
        allocated: Peak bytes that a forward allocated, if they were measured.
    """
    p10, median, p90 = (1000 * np.quantile(seconds, (0.1, 0.5, 0.9))).tolist()
    weight_bytes = size_on_disk(model)
    return Timed(
        model=name, dense=None, batch_size=len(images), forwards=len(seconds), median_ms=median, p10_ms=p10,
        p90_ms=p90, images_per_second=1000 * len(images) / median,
        peak_bytes=None if allocated is None else allocated + weight_bytes + images.nbytes, weight_bytes=weight_bytes,
        macs=count_macs(model, (images[:1],), {}),
    )


def _forward(model: nn.Module, images: Tensor, conditions: Conditions) -> Forward:
    if conditions.onnx:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / 'model.onnx'
            write_onnx(trace_program(model, images), path)
            return partial(onnx_forward(path), images)
    if conditions.compile_backend:
        with one_line(f'torch.compile with backend {conditions.compile_backend!r} can\'t be used'):
            model = torch.compile(model, backend=conditions.compile_backend, dynamic=False)
    return partial(model, images)


def _compared(dense: Timed, pruned: Timed) -> Timed:
    speedup, theoretical = dense.median_ms / pruned.median_ms, dense.macs / pruned.macs
    return replace(
        pruned, dense=dense.model, speedup=speedup, theoretical_speedup=theoretical,
        realised_share=speedup / theoretical)
