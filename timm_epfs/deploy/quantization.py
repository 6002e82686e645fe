"""Static quantisation: an exported file in float32 → one with weights and activations in int8.

A value r is stored as a whole number q of 8 bits, r = S (q − Z) (Jacob et al., *Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference*, 2018, equation 1). A weight has a scale S for each output
channel and Z = 0. An activation has one S and one Z, from the smallest and the largest value that images give it.
"""
import tempfile
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core import unlogged
from .export import export_packages, read_pt2, trace_program, write_pt2

__all__ = ['QUANTIZERS']

Quantize = Callable[[Path, Path, Sequence[Tensor]], None]


class _Reader:
    """Images in the form in which ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[Tensor]):
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        batch = next(self._batches, None)
        return None if batch is None else {'images': batch.numpy()}


def _quantize_onnx(source: Path, target: Path, batches: Sequence[Tensor]) -> None:
    """By ONNX Runtime, in QDQ form. Activations are unsigned: x86 multiplies unsigned with signed bytes only."""
    with export_packages('int8 in ONNX'):
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / 'prepared.onnx'
        quant_pre_process(source, prepared, skip_symbolic_shape=True)  # norms go into convolutions
        quantize_static(prepared, target, _Reader(batches), per_channel=True, activation_type=QuantType.QUInt8)


def _quantize_pt2(source: Path, target: Path, batches: Sequence[Tensor]) -> None:
    """By torchao, for the int8 kernels that inductor has on x86."""
    with export_packages('int8 in pt2'), unlogged('torch.utils._pytree'):  # its import warns of what it does itself
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = read_pt2(source)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of erased nodes
        observed = prepare_pt2e(program.module(), quantizer)
        for batch in batches:
            observed(batch)
        quantized = convert_pt2e(observed)
    _drop_unused(quantized)
    write_pt2(trace_program(quantized, batches[0], bool(program.range_constraints)), target)


def _drop_unused(module: torch.fx.GraphModule) -> None:
    """Remove the tensors that no node reads: the weights in float32."""
    read = {node.target for node in module.graph.nodes if node.op == 'get_attr'}
    for name in {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - read:
        owner, _, own_name = name.rpartition('.')
        delattr(module.get_submodule(owner), own_name)


QUANTIZERS: Dict[str, Quantize] = {'onnx': _quantize_onnx, 'pt2': _quantize_pt2}
