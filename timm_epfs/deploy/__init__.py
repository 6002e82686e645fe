"""Running models outside of training: export and benchmarks.

In: a model. Out: ONNX and torch.export files whose outputs were compared with the model's; its latency and memory.
"""
from .benchmark import Conditions, Timed, time_together, with_base
from .export import FORMATS, Run, export_model, onnx_forward, trace_program, write_onnx

__all__ = [
    'FORMATS', 'Conditions', 'Run', 'Timed', 'export_model', 'onnx_forward', 'time_together', 'trace_program',
    'with_base', 'write_onnx',
]
