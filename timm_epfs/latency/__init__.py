"""Latency as a budget: what each call takes on this device, looked up in a search, and the cut measured whole."""
from .bench import Asked, Bench, race
from .kernels import kernels
from .model import LatencyModel
from .table import Table

__all__ = ['Asked', 'Bench', 'LatencyModel', 'Table', 'kernels', 'race']
