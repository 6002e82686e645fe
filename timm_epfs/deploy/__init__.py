"""Running models outside of training: export and benchmarks.

In: a model. Out: ONNX and torch.export files, in float32 or int8, whose outputs were compared with the model's; its
latency and memory.
"""
from .benchmark import Conditions, Timed, time_together, with_base
from .export import FORMATS, Run, export_model, onnx_forward, trace_program, write_onnx
from .int8 import Int8Report, export_int8

__all__ = [
    'FORMATS', 'Conditions', 'Int8Report', 'Run', 'Timed', 'export_int8', 'export_model', 'onnx_forward',
    'time_together', 'trace_program', 'with_base', 'write_onnx',
]
