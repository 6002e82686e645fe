"""A model as ONNX or as an archive of torch.export, compared with the model before the file is there."""
import io
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from ..core import PruningError, eval_mode, format_count, one_line, write_whole

__all__ = ['FORMATS', 'Run', 'export_model', 'onnx_forward', 'trace_program', 'write_onnx']

# Largest difference that is put down to another order of sums, relative to the largest output.
TOLERANCE = 1e-3
MOST_ONNX = 2 << 30  # bytes that protobuf puts into one file

Write = Callable[[ExportedProgram, Path], None]
Run = Callable[[Tensor], List[Tensor]]


def export_model(
        model: nn.Module,
        path: Path,
        format: str,
        images: Tensor,
        dynamic_batch: bool = False,
) -> Tuple[float, float]:
    """Write a model in evaluation mode to a file that is there only once its outputs are the model's.

    Args:
        model: A model on the CPU.
        path: The file.
        format: One of ``FORMATS``.
        images: A batch that the model takes.
        dynamic_batch: Whether the file takes batches of any size, or of this one alone.

    Returns:
        Largest difference between the file's outputs and the model's on random images, and the largest output.

    Raises:
        PruningError: The model can't be exported, the file's outputs are others, or it can't be written.
    """
    write, read = FORMATS[format]
    batch = len(images) + 1 if dynamic_batch else len(images)  # not the one that was traced
    others = torch.randn(batch, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    compared: List[Tuple[float, float]] = []

    def write_and_compare(part: Path) -> None:
        write(trace_program(model, images, dynamic_batch), part)
        with one_line(f'the {format} file can\'t be run'):
            compared.append(_compare(model, read(part), others))

    try:
        with torch.no_grad(), eval_mode(model):
            write_whole(path, write_and_compare)
    except OSError as e:
        raise PruningError(f'export: {path} not written: {e.strerror or e}') from e
    return compared[0]


def write_onnx(exported: ExportedProgram, path: Path) -> None:
    """Write an exported program as one ONNX file.

    Raises:
        PruningError: A package is missing, the program has an operator that ONNX lacks, or is too large for one file.
    """
    size = sum(tensor.nbytes for tensor in exported.state_dict.values())
    if size >= MOST_ONNX:
        raise PruningError(f'export: {format_count(size)} bytes of weights, one ONNX file has less than 2 GB; use pt2')
    with one_line('export: no ONNX of this model'), _packages_for_onnx():
        torch.onnx.export(
            exported, f=str(path), dynamo=True, external_data=False, verbose=False,
            input_names=['images'], output_names=['output'],
        )


def onnx_forward(path: Path) -> Run:
    """What runs an ONNX file by ONNX Runtime on the CPU, in as many threads as torch."""
    with _packages_for_onnx():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _write_pt2(exported: ExportedProgram, path: Path) -> None:
    exported.example_inputs = None  # torch would write them too, as a pickle
    archive = io.BytesIO()  # torch warns of files that don't end in .pt2
    torch.export.save(exported, archive)
    path.write_bytes(archive.getbuffer())


def _pt2_forward(path: Path) -> Run:
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda images: tree_leaves(module(images))


FORMATS: Dict[str, Tuple[Write, Callable[[Path], Run]]] = {
    'onnx': (write_onnx, onnx_forward),
    'pt2': (_write_pt2, _pt2_forward),
}


def trace_program(model: nn.Module, images: Tensor, dynamic_batch: bool = False) -> ExportedProgram:
    """The program of a model on the CPU, by ``torch.export``. Arguments are those of ``export_model``."""
    if not dynamic_batch:
        with one_line('export: torch.export can\'t trace this model'):
            return torch.export.export(model, (images,))
    if len(images) == 1:  # torch.export takes sizes of one for constants
        images = images.expand(2, *images.shape[1:]).contiguous()
    with one_line('export: this model can\'t be traced for batches of any size; leave --dynamic-batch out'):
        return torch.export.export(model, (images,), dynamic_shapes=(({0: Dim('batch')}),))


def _compare(model: nn.Module, run: Run, images: Tensor) -> Tuple[float, float]:
    pairs = list(zip(tree_leaves(model(images)), run(images), strict=True))
    difference = max((mine.float() - its.float()).abs().max().item() for mine, its in pairs)
    largest = max(mine.abs().max().item() for mine, _ in pairs)
    if not difference <= TOLERANCE * largest:  # nor is what is no number
        raise PruningError(f'outputs are up to {difference:.2g} off, at {largest:.2g} at the most; nothing was written')
    return difference, largest


@contextmanager
def _packages_for_onnx() -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise PruningError(f'ONNX needs {e.name or "packages"} that is not installed; pip install timm-epfs[export]') \
            from e
