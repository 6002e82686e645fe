"""``timm-epfs export``: a model as ONNX or as an archive of torch.export, compared with the model before it's there."""
import argparse
import io
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

from ..cli.arguments import model_args, positive
from ..core import PruningError, check_place, eval_mode, format_count, one_line, step, write_whole
from ..report import random_images
from ..zoo import create_model

__all__ = ['Run', 'add_export_arguments', 'export_model', 'load_model', 'onnx_forward', 'trace_program', 'write_onnx']

# Largest difference that is put down to another order of sums, relative to the largest output.
TOLERANCE = 1e-3
MOST_ONNX = 2 << 30  # bytes that protobuf puts into one file

Write = Callable[[ExportedProgram, Path], None]
Run = Callable[[Tensor], List[Tensor]]


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of the command."""
    parser.add_argument('model', metavar='NAME|DIR', help='timm name, or the folder of a saved model')
    parser.add_argument('--format', required=True, choices=FORMATS, help='onnx, or pt2: an archive of torch.export')
    parser.add_argument('-o', '--output', type=Path, metavar='FILE', help='(name and format, in this folder)')
    parser.add_argument('--overwrite', action='store_true', help='replace a file that is there')
    parser.add_argument('-b', '--batch-size', type=positive, default=1, metavar='N', help='images a batch (1)')
    parser.add_argument('--dynamic-batch', action='store_true', help='take batches of any size')
    parser.add_argument('--img-size', type=positive, metavar='N', help="image size in pixels (the model's own)")
    parser.add_argument('--pretrained', action='store_true', help="a name's published weights; a folder has its own")
    parser.add_argument('--reparam', action='store_true', help='merge the branches that are only there for training')
    parser.set_defaults(run=_export)


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


def load_model(name: str, pretrained: bool = False, img_size: Optional[int] = None) -> nn.Module:
    """A model by its name, or with its weights from the folder that it was saved in.

    Args:
        name: As ``create_base`` takes it, or a folder.
        pretrained: Load a name's published weights.
        img_size: Pixels, None for the model's own.

    Raises:
        PruningError: There is no such model.
    """
    if Path(name).is_dir() and not timm.is_model(name):
        name, pretrained = f'local-dir:{name}', True
    return create_model(name, pretrained, **model_args(name, img_size, {}))


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


def _export(args: argparse.Namespace) -> None:
    path = args.output or Path(f'{Path(args.model).resolve().name}.{args.format}')
    check_place(path, 'export')
    if path.exists() and not args.overwrite:
        raise PruningError(f'export: {path} exists; name another file or give --overwrite')
    with step(f'building {args.model}'):
        model = load_model(args.model, args.pretrained, args.img_size)
        model = reparameterize_model(model, inplace=True) if args.reparam else model
    with step(f'exporting {args.model}'):
        images = random_images(model, args.img_size, args.batch_size)
        difference, largest = export_model(model, path, args.format, images, args.dynamic_batch)
    weights = 'saved' if Path(args.model).is_dir() else 'pretrained' if args.pretrained else 'random'
    batch = 'any batch' if args.dynamic_batch else f'batch {args.batch_size}'
    print(f'{path}: {format_count(path.stat().st_size)} bytes, {batch} of {tuple(images.shape[1:])}, {weights} weights')
    print(f'largest difference from the model: {difference:.2g}, of outputs up to {largest:.2g}')
