"""Prunes models: ``Pruner``, and ``prune`` and ``inspect`` on top of it.

In: a model or its name, and a budget. Out: a smaller model of the same class, or a report of what can be cut.
"""
from .allocator import Allocator
from .inputs import Example, example_for, trace_model
from .inspection import Report, Row
from .pruner import Pruner
from .request import Choice
from .shortcuts import inspect, prune

__all__ = [
    'Allocator', 'Choice', 'Example', 'Pruner', 'Report', 'Row', 'example_for', 'inspect', 'prune',
    'trace_model',
]
