"""The shell command ``timm-epfs``.

In: a command line. Out: what it asks for, on stdout; errors in one line on stderr.
"""
from .shell import main, parse_args

__all__ = ['main', 'parse_args']
