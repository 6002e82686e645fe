"""Scores how much each unit matters.

In: structures, weights and, for some criteria, images. Out: one score per unit, higher = keep.
"""
from .criteria import CRITERIA, WITHOUT_DATA, Criterion, check_criterion, score

__all__ = ['CRITERIA', 'WITHOUT_DATA', 'Criterion', 'check_criterion', 'score']
