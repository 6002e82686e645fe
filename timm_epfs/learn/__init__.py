"""Methods that learn what to cut while a model is trained.

In: a model in its user's training loop, and a budget. Out: masks that are learned, and the model that they leave.

A new method is a file here and a line in ``METHODS``. ``OneShot`` and ``Scratch`` have the same calls and learn
nothing: they are there to compare with.
"""
from typing import Dict, Type

from .epfs import EPFS
from .learner import Learner
from .ranking import OneShot, Scratch
from .sfp import BNSFP, SFP
from .sss import SSS

__all__ = ['METHODS', 'BNSFP', 'EPFS', 'Learner', 'OneShot', 'SFP', 'SSS', 'Scratch']

METHODS: Dict[str, Type[Learner]] = {cls.method: cls for cls in (EPFS, SSS, SFP, BNSFP)}
