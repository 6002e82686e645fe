"""What each ATen operation does to labels.

In: labels of the tensors that an operation is given. Out: labels of those that it gives, and what must hold of all.

There is one function for each kind of operation, found by the operation's name in ``RULES``. Elementwise operations
need none: ATen tags them. Any other operation without a rule is opaque: what goes in is pinned, and what comes out
can't be cut. So an unknown operation costs what could have been cut around it, never a correct result.
"""
from . import images, lookups, norms, products, shapes  # noqa: F401, each fills RULES
from .base import RULES, elementwise, opaque, rule

__all__ = ['RULES', 'elementwise', 'opaque', 'rule']
