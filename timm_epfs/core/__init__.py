"""What every other package uses: structures and their costs as plain data, errors, files, text.

In: nothing of this library. Out: ``Structure``, ``CostModel``, ``Budget``, ``PruningError``, and small helpers.
"""
from .cost import LABELS, QUANTITIES, Budget, CostModel, is_number
from .errors import OutOfReach, PruningError, first_few, one_line
from .files import check_place, whole_folder, write_whole
from .indices import complement, distinct
from .modules import device_of, eval_mode
from .progress_bar import progress, step
from .structure import KINDS, Member, Size, Structure
from .text import aligned_table, format_count, markdown_table, nearest, percent, shorten

__all__ = [
    'KINDS', 'LABELS', 'QUANTITIES', 'Budget', 'CostModel', 'Member', 'OutOfReach', 'PruningError', 'Size', 'Structure',
    'aligned_table', 'check_place', 'complement', 'device_of', 'distinct', 'eval_mode', 'first_few', 'format_count',
    'is_number', 'markdown_table', 'nearest', 'one_line', 'percent', 'progress', 'shorten', 'step', 'whole_folder',
    'write_whole',
]
