"""What each ATen operation does to labels.

One function per kind of operation, found by the operation's name in ``RULES``; elementwise operations need none, their
tag says it all. An operation without a rule is opaque: whatever goes in is pinned and nothing comes out, so an unknown
operation costs coverage and never correctness.
"""
from . import images, lookups, norms, products, shapes  # noqa: F401, each fills RULES
from .base import RULES, elementwise, opaque, rule

__all__ = ['RULES', 'elementwise', 'opaque', 'rule']
