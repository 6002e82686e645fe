"""Export to ONNX or to a torch.export archive. A file gets its name only after its outputs were compared."""
import io
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from ..core import PruningError, eval_mode, format_count, one_line, write_whole

__all__ = [
    'FORMATS', 'Run', 'export_model', 'export_packages', 'onnx_forward', 'read_pt2', 'trace_program', 'write_onnx',
    'write_pt2',
]

# Largest difference between outputs, relative to the largest output. Sums in another order explain as much.
TOLERANCE = 1e-3
MOST_ONNX = 2 << 30  # protobuf's limit on the bytes of one file

Write = Callable[[ExportedProgram, Path], None]
Run = Callable[[Tensor], List[Tensor]]


def export_model(
        model: nn.Module,
        path: Path,
        format: str,
        images: Tensor,
        dynamic_batch: bool = False,
) -> Tuple[float, float]:
    """Write a model, in evaluation mode, to a file. The file appears only if its outputs equal the model's.

    Args:
        model: A model on the CPU.
        path: The file to write.
        format: One of ``FORMATS``.
        images: An example batch.
        dynamic_batch: Whether the file takes batches of any size. False: only of the size of ``images``.

    Returns:
        The largest difference between the file's outputs and the model's on random images, and the largest output.

    Raises:
        PruningError: The model can't be exported, the file's outputs differ from the model's, or the file can't be
            written.
    """
    write, read = FORMATS[format]
    batch_size = len(images) + 1 if dynamic_batch else len(images)  # if possible, another size than the traced one
    test_images = torch.randn(batch_size, *images.shape[1:], generator=torch.Generator().manual_seed(1))
    compared: List[Tuple[float, float]] = []

    def write_and_compare(part: Path) -> None:
        write(trace_program(model, images, dynamic_batch), part)
        with one_line(f'the {format} file can\'t be run'):
            compared.append(_compare(model, read(part), test_images))

    try:
        with torch.no_grad(), eval_mode(model):
            write_whole(path, write_and_compare)
    except OSError as e:
        raise PruningError(f'export: {path} can\'t be written: {e.strerror or e}') from e
    return compared[0]


def write_onnx(exported: ExportedProgram, path: Path) -> None:
    """Write an exported program as one ONNX file.

    Raises:
        PruningError: A package is missing, ONNX lacks one of the program's operators, or the program is too large for
            one file.
    """
    size = sum(tensor.nbytes for tensor in exported.state_dict.values())
    if size >= MOST_ONNX:
        raise PruningError(
            f'export: the weights are {format_count(size)} bytes, an ONNX file holds less than 2 GiB; use --format pt2')
    with one_line('export: this model can\'t be written as ONNX'), export_packages('ONNX'):
        torch.onnx.export(
            exported, f=str(path), dynamo=True, external_data=False, verbose=False,
            input_names=['images'], output_names=['output'],
        )


def onnx_forward(path: Path) -> Run:
    """A function that runs an ONNX file with ONNX Runtime on the CPU, on as many threads as torch uses."""
    with export_packages('ONNX'):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def write_pt2(exported: ExportedProgram, path: Path) -> None:
    """Write an exported program as an archive of ``torch.export``."""
    exported.example_inputs = None  # torch would save them as a pickle
    archive = io.BytesIO()  # given a path that doesn't end in .pt2, torch warns
    torch.export.save(exported, archive)
    path.write_bytes(archive.getbuffer())


def read_pt2(path: Path) -> ExportedProgram:
    """Read an archive of ``torch.export``."""
    return torch.export.load(io.BytesIO(path.read_bytes()))  # given a path that doesn't end in .pt2, torch warns


def _pt2_forward(path: Path) -> Run:
    module = read_pt2(path).module()
    return lambda images: tree_leaves(module(images))


FORMATS: Dict[str, Tuple[Write, Callable[[Path], Run]]] = {
    'onnx': (write_onnx, onnx_forward),
    'pt2': (write_pt2, _pt2_forward),
}


def trace_program(model: nn.Module, images: Tensor, dynamic_batch: bool = False) -> ExportedProgram:
    """Trace a model on the CPU with ``torch.export``. The arguments are those of ``export_model``."""
    if not dynamic_batch:
        with one_line('export: torch.export can\'t trace this model'):
            return torch.export.export(model, (images,))
    if len(images) == 1:  # torch.export treats a size of 1 as a constant
        images = images.expand(2, *images.shape[1:]).contiguous()
    with one_line('export: this model can\'t be traced for batches of any size; leave --dynamic-batch out'):
        return torch.export.export(model, (images,), dynamic_shapes=(({0: Dim('batch')}),))


def _compare(model: nn.Module, run: Run, images: Tensor) -> Tuple[float, float]:
    pairs = list(zip(tree_leaves(model(images)), run(images), strict=True))
    difference = max((expected.float() - found.float()).abs().max().item() for expected, found in pairs)
    largest = max(expected.abs().max().item() for expected, _ in pairs)
    if not difference <= TOLERANCE * largest:  # written so that NaN fails, too
        raise PruningError(
            f'export: outputs are up to {difference:.2g} off, the largest is {largest:.2g}; nothing was written; try '
            'the other --format')
    return difference, largest


@contextmanager
def export_packages(what: str) -> Iterator[None]:
    """Turn the failed import of a package inside the block into a ``PruningError`` that says what needs it."""
    try:
        yield
    except ImportError as e:
        raise PruningError(
            f'{what} needs {e.name or "a package"}, which is not installed; pip install timm-epfs[export]') from e
