"""What every other package uses: structures and their costs as plain data, errors, files, text.

In: nothing of this library. Out: ``Structure``, ``CostModel``, ``Budget``, ``PruningError``, and small helpers.
"""
from .budget import BUDGETS, Budget
from .cost import QUANTITIES, CostModel, is_number
from .errors import OutOfReach, PruningError, first_few, one_line
from .files import check_place, write_whole
from .keywords import nearest_keyword, refuse_unknown
from .modules import device_of, eval_mode
from .progress_bar import progress, step
from .structure import DEFAULT_KINDS, KINDS, Member, Size, Structure, kinds_named
from .text import aligned_table, format_count, markdown_table, nearest, percent, shorten
from .user_warning import warn

__all__ = [
    'BUDGETS', 'Budget', 'CostModel', 'DEFAULT_KINDS', 'KINDS', 'Member', 'OutOfReach', 'PruningError', 'QUANTITIES',
    'Size', 'Structure', 'aligned_table', 'check_place', 'device_of', 'eval_mode', 'first_few', 'format_count',
    'is_number', 'kinds_named', 'markdown_table', 'nearest', 'nearest_keyword', 'one_line', 'percent', 'progress',
    'refuse_unknown', 'shorten', 'step', 'warn', 'write_whole',
]
