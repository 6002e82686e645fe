"""Which units stay.

In: scores, a cost model and a budget. Out: the units that each structure keeps.
"""
from .allocation import ALIGN, SCOPES, allocate, budget_from, top

__all__ = ['ALIGN', 'SCOPES', 'allocate', 'budget_from', 'top']
