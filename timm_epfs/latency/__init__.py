"""Latency as a budget: what each call takes on this device, looked up while searching, and measured whole in the end."""
from .bench import Asked, Bench, race
from .kernels import kernels
from .model import LatencyModel
from .table import Table

__all__ = ['Asked', 'Bench', 'LatencyModel', 'Table', 'kernels', 'race']
