"""Latency as a cost: how long a model takes on its device, and how long cuts of it would take.

In: a model on its device, and its trace. Out: the seconds of any cut, predicted from a table of measured layers; and
the measured seconds and memory of whole models.
"""
from .clock import Forward, latencies, latency_note, peak_memory, time_interleaved, time_models
from .device_latency import DeviceLatency, Match, least_seconds
from .interpolation import LatencyModel
from .kernels import kernels
from .timings import Table

__all__ = [
    'DeviceLatency', 'Forward', 'LatencyModel', 'Match', 'Table', 'kernels', 'latencies', 'latency_note',
    'least_seconds', 'peak_memory', 'time_interleaved', 'time_models',
]
