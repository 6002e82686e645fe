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
from .validation import ANYTHING, DICT, FLAG, INTEGER, LIST, TEXT, Rule, check, invalid

__all__ = [
    'ANYTHING', 'DICT', 'FLAG', 'INTEGER', 'KINDS', 'LABELS', 'LIST', 'QUANTITIES', 'TEXT', 'Budget', 'CostModel',
    'Member', 'OutOfReach', 'PruningError', 'Rule', 'Size', 'Structure', 'aligned_table', 'check', 'check_place',
    'complement', 'device_of', 'distinct', 'eval_mode', 'first_few', 'format_count', 'invalid', 'is_number',
    'markdown_table', 'nearest', 'one_line', 'percent', 'progress', 'shorten', 'step', 'whole_folder', 'write_whole',
]
