"""Scores how much each unit matters.

In: structures, weights and, for some criteria, images. Out: one score per unit, higher = keep; or what the network's
output loses as each structure gets narrower.
"""
from .criteria import CRITERIA, WITHOUT_DATA, Criterion, check_criterion, score
from .curves import SHARES, Curve, Sensitivity
from .sensitivity import measure_sensitivity
from .statistics import Statistics, gather_statistics

__all__ = [
    'CRITERIA', 'Criterion', 'Curve', 'SHARES', 'Sensitivity', 'Statistics', 'WITHOUT_DATA', 'check_criterion',
    'gather_statistics', 'measure_sensitivity', 'score',
]
