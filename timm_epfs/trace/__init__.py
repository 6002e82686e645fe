"""What can be cut.

In: a model and its inputs. Out: structures, a cost model and attributes that follow, verified on a cut copy.
"""
from .calls import Call, Calls, tensors_in
from .copies import meta_copy, meta_tensor, quiet
from .forwards import Forward
from .hooks import watching_hooks
from .isolation import isolated
from .rules import rule
from .tracing import OUTPUT_WIDTH, Skipped, Trace, trace

__all__ = [
    'Call', 'Calls', 'Forward', 'OUTPUT_WIDTH', 'Skipped', 'Trace', 'isolated', 'meta_copy', 'meta_tensor', 'quiet',
    'rule', 'tensors_in', 'trace', 'watching_hooks',
]
