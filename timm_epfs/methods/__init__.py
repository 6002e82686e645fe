"""The methods that learn what to cut, by name. A new one is a file here and a line in this list."""
from typing import Dict, Type

from .base import Learner
from .epfs import EPFS
from .sfp import BNSFP, SFP
from .sss import SSS

__all__ = ['METHODS', 'BNSFP', 'EPFS', 'Learner', 'SFP', 'SSS']

METHODS: Dict[str, Type[Learner]] = {cls.method: cls for cls in (EPFS, SSS, SFP, BNSFP)}
