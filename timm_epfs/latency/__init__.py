"""Latency as a budget: what each call takes on this device, looked up while searching, and measured whole in the end."""
from .kernels import kernels
from .model import LatencyModel
from .table import Table

__all__ = ['LatencyModel', 'Table', 'kernels']
