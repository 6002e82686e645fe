"""What all other packages use: structures and their costs as plain data, attention, errors, files, text.

In: nothing of this library. Out: ``Structure``, ``CostModel``, ``Budget``, ``PruningError``, and small helpers.
"""
from .attention import PrunedMultiheadAttention, plain_attention, refresh_attention, without_fused_attention
from .budget import BUDGETS, Budget
from .configs import changed_settings, settings_of
from .cost import QUANTITIES, CostModel, is_number
from .deep_copies import clone_tensor, deep_copy
from .errors import OutOfReach, PruningError, first_few, one_line
from .files import check_place, locked, whole_folder, write_whole
from .indices import complement, distinct
from .keywords import nearest_keyword, refuse_unknown
from .log_filter import unlogged
from .modules import device_of, eval_mode, named_tensors, set_modes
from .processes import from_first, measured_by_first, summed, world_size
from .progress_bar import progress, step
from .repeatable import Repeatable
from .returned import returned_tensors
from .structure import DEFAULT_KINDS, KINDS, Member, Size, Structure, check_patterns, kinds_named, pattern_list
from .text import aligned_table, format_count, kind_of, markdown_table, nearest, percent, shorten
from .user_warning import warn
from .validation import ANYTHING, DICT, FLAG, INTEGER, LIST, TEXT, Rule, check, invalid

__all__ = [
    'ANYTHING', 'BUDGETS', 'Budget', 'CostModel', 'DEFAULT_KINDS', 'DICT', 'FLAG', 'INTEGER', 'KINDS', 'LIST',
    'Member', 'OutOfReach', 'PrunedMultiheadAttention', 'PruningError', 'QUANTITIES', 'Repeatable', 'Rule', 'Size',
    'Structure', 'TEXT', 'aligned_table', 'changed_settings', 'check', 'check_patterns', 'check_place',
    'clone_tensor', 'complement', 'deep_copy', 'device_of', 'distinct', 'eval_mode', 'first_few', 'format_count',
    'from_first', 'invalid', 'is_number', 'kind_of', 'kinds_named', 'locked', 'markdown_table', 'measured_by_first',
    'named_tensors', 'nearest', 'nearest_keyword', 'one_line', 'pattern_list', 'percent', 'plain_attention',
    'progress', 'refresh_attention', 'refuse_unknown', 'returned_tensors', 'set_modes', 'settings_of', 'shorten',
    'step', 'summed', 'unlogged', 'warn', 'whole_folder', 'without_fused_attention', 'world_size', 'write_whole',
]
