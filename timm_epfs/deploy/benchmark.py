"""Dense against pruned by the clock, beside what the MACs promise."""
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np
import torch
from torch import Tensor, nn

from ..core import one_line
from ..latency.clock import Forward, in_turns, peak_memory
from ..report import count_macs, random_images, size_on_disk
from ..surgery import build_base
from ..zoo import model_args
from .export import onnx_forward, trace_program, write_onnx

__all__ = ['Conditions', 'Timed', 'time_together', 'with_base']

LEAST = 5  # turns, however slow a model is


@dataclass(frozen=True)
class Conditions:
    """How models are run.

    Attributes:
        device: Device to run on.
        seconds: How long to measure, for each model and batch size.
        img_size: Image size in pixels; None: the model's own.
        amp_dtype: Number format of mixed precision; None: float32 throughout.
        channels_last: Whether weights and images are in that memory layout.
        compile_backend: Backend of ``torch.compile``; None: not compiled.
        onnx: Whether ONNX Runtime runs them, on the CPU.
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
    """What was measured of one model at one batch size.

    Attributes:
        model: Its name or folder.
        dense: Name of the model that it was cut from, timed in the same turns; None for one that is timed alone.
        batch_size: Images a forward.
        forwards: How many were timed.
        median_ms, p10_ms, p90_ms: Milliseconds of a forward: half, a tenth and nine tenths took less.
        images_per_second: At the median.
        peak_bytes: Weights, images and what a forward allocates beside them; None under ONNX Runtime, which has an
            allocator of its own.
        weight_bytes: Size of the weights.
        macs: Of one image.
        speedup: The dense model's median over this one's.
        promised: The dense model's MACs over this one's.
        kept: ``speedup`` over ``promised``.
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
    promised: Optional[float] = None
    kept: Optional[float] = None


def with_base(name: str, model: nn.Module, conditions: Conditions) -> Dict[str, nn.Module]:
    """A model and, where it was pruned, the dense one before it first, ready to run.

    Args:
        name: What to call the model.
        model: The model, in evaluation mode; it is moved to the device.
        conditions: How it is to be run.

    Raises:
        PruningError: The base can't be built, or the device can't be used.
    """
    models, plan = {name: model}, getattr(model, 'pruning_plan', None)
    if plan is not None:
        own = model_args(plan.base, conditions.img_size, {})
        dense = build_base(plan.base, {**plan.base_args, **own}).eval()
        if getattr(dense, 'num_classes', None) != getattr(model, 'num_classes', None):  # its head was changed
            dense.reset_classifier(model.num_classes)
        models = {plan.base: dense, **models}
    with one_line(f"device {conditions.device!r} can't be used"):
        for each in models.values():
            each.requires_grad_(False).to(conditions.device)
            if conditions.channels_last:
                each.to(memory_format=torch.channels_last)
    return models


def time_together(models: Dict[str, nn.Module], batch_size: int, conditions: Conditions) -> List[Timed]:
    """Time models in turns.

    Args:
        models: What ``with_base`` returned.
        batch_size: Images in a batch.
        conditions: How they are run.

    Returns:
        A row for each, the others compared with the first.

    Raises:
        PruningError: A model can't be run so.
    """
    images = random_images(next(iter(models.values())), conditions.img_size, batch_size).to(conditions.device)
    if conditions.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()  # after some models of one class, it would run the next ones eagerly
    forwards = [_forward(each, images, conditions) for each in models.values()]
    autocast = torch.autocast(
        images.device.type, conditions.amp_dtype or torch.bfloat16, enabled=conditions.amp_dtype is not None)
    with torch.inference_mode(), autocast:
        for each, forward in zip(models, forwards):  # what is compiled or chosen once isn't timed
            with one_line(f'{each} can\'t be run on images of {tuple(images.shape)}'):
                forward()
        measured = in_turns(forwards, images.device, conditions.seconds, LEAST)
        peaks = [None if conditions.onnx else peak_memory(forward, images.device) for forward in forwards]

    rows: List[Timed] = []
    for (each, module), taken, peak in zip(models.items(), measured, peaks):
        p10, median, p90 = (1000 * np.quantile(taken.times, (0.1, 0.5, 0.9))).tolist()
        weights = size_on_disk(module)
        row = Timed(
            each, None, batch_size, len(taken.times), median, p10, p90, 1000 * batch_size / median,
            None if peak is None else peak + weights + images.nbytes, weights, count_macs(module, (images[:1],), {}),
        )
        rows.append(_compared(rows[0], row) if rows else row)
    return rows


def _forward(model: nn.Module, images: Tensor, conditions: Conditions) -> Forward:
    if conditions.onnx:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / 'model.onnx'
            write_onnx(trace_program(model, images), path)
            return partial(onnx_forward(path), images)
    if conditions.compile_backend:
        with one_line(f'torch.compile by {conditions.compile_backend} can\'t be used'):
            model = torch.compile(model, backend=conditions.compile_backend, dynamic=False)
    return partial(model, images)


def _compared(dense: Timed, pruned: Timed) -> Timed:
    speedup, promised = dense.median_ms / pruned.median_ms, dense.macs / pruned.macs
    return replace(pruned, dense=dense.model, speedup=speedup, promised=promised, kept=speedup / promised)
