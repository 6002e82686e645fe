"""The methods that learn what to cut, by name. A new one is a file here and a line in this list.

``OneShot`` and ``Scratch`` have the same calls and learn nothing: they are there to compare with.
"""
from typing import Dict, Type

from .epfs import EPFS
from .learner import Learner
from .ranking import OneShot, Scratch
from .sfp import BNSFP, SFP
from .sss import SSS

__all__ = ['METHODS', 'BNSFP', 'EPFS', 'Learner', 'OneShot', 'SFP', 'SSS', 'Scratch']

METHODS: Dict[str, Type[Learner]] = {cls.method: cls for cls in (EPFS, SSS, SFP, BNSFP)}
