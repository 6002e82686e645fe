"""What can be cut.

In: a model and its inputs. Out: structures, a cost model and attributes that follow, verified on a cut copy.
"""
from .calls import Call, Calls, tensors_in
from .copies import meta_copy, meta_tensor, quiet
from .forwards import Forward
from .hooks import changes_results
from .isolation import isolated
from .rules import rule
from .tracing import OUTPUT_WIDTH, Skipped, Trace, trace

__all__ = [
    'Call', 'Calls', 'Forward', 'OUTPUT_WIDTH', 'Skipped', 'Trace', 'changes_results', 'isolated', 'meta_copy',
    'meta_tensor', 'quiet', 'rule', 'tensors_in', 'trace',
]
