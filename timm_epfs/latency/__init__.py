"""The clock as a cost model.

In: a model on its device, and its trace. Out: seconds of any cut, looked up in a search, and cuts measured whole.
"""
from .clock import latencies, latency_note, time_models
from .interpolation import LatencyModel
from .kernels import kernels
from .measured import Asked, Bench, race
from .timings import Table

__all__ = [
    'Asked', 'Bench', 'LatencyModel', 'Table', 'kernels', 'latencies', 'latency_note', 'race',
    'time_models',
]
