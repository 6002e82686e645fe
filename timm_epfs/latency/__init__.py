"""The clock as a cost model.

In: a model on its device, and its trace. Out: seconds of any cut, looked up in a search, and cuts measured whole.
"""
from .clock import latencies, latency_note, time_models
from .device_latency import DeviceLatency, Match, least_seconds
from .interpolation import LatencyModel
from .kernels import kernels
from .timings import Table

__all__ = [
    'DeviceLatency', 'LatencyModel', 'Match', 'Table', 'kernels', 'latencies', 'latency_note', 'least_seconds',
    'time_models',
]
