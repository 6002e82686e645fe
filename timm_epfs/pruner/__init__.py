"""The main job.

In: a model or its name, and a budget. Out: a smaller model of the same class, or what could be cut of it.
"""
from .api import left_alone, prune
from .inputs import Example, example_for, trace_model
from .inspection import Report, Row, inspect

__all__ = ['Example', 'Report', 'Row', 'example_for', 'inspect', 'left_alone', 'prune', 'trace_model']
