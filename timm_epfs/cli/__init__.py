"""The shell command ``timm-epfs``.

In: a command line. Out: the result on stdout; every error as one line on stderr.
"""
from .shell import main, parse_args

__all__ = ['main', 'parse_args']
