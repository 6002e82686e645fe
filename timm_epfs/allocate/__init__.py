"""Chooses the units that stay.

In: scores, a cost model and a budget. Out: the units that each structure keeps, and how near they come to the budget.
"""
from .allocation import SCOPES, Allocation, allocate, top
from .grids import ALIGN
from .widths import cost_aware_width_weights

__all__ = ['ALIGN', 'SCOPES', 'Allocation', 'allocate', 'cost_aware_width_weights', 'top']
