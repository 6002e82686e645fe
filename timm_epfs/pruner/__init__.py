"""The main job.

In: a model or its name, and a budget. Out: a smaller model of the same class, or what could be cut of it.
"""
from .allocator import Allocator
from .inputs import Example, example_for, trace_model
from .inspection import Report, Row
from .pruner import Choice, Pruner
from .shortcuts import inspect, prune

__all__ = [
    'Allocator', 'Choice', 'Example', 'Pruner', 'Report', 'Row', 'example_for', 'inspect', 'prune',
    'trace_model',
]
