"""Which units stay.

In: scores, a cost model and a budget. Out: the units that each structure keeps, and how near that is to the budget.
"""
from .allocation import SCOPES, Allocation, allocate, top
from .grids import ALIGN
from .widths import cost_aware_widths

__all__ = ['ALIGN', 'SCOPES', 'Allocation', 'allocate', 'cost_aware_widths', 'top']
