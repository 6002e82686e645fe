"""The methods that learn which units to cut, in one file each.

In: a model in its user's training loop, and a budget. Out: masks that are learned, and the cut that they choose.

To add a method, add its file here and its class to ``METHODS``. ``OneShot`` and ``Scratch`` have the same calls but
learn no masks: they are the baselines to compare with.
"""
from typing import Dict, Type, Union

from ..core import PruningError
from .epfs import EPFS
from .learner import Learner
from .ranking import OneShot, Scratch
from .sfp import BNSFP, SFP
from .sss import SSS

__all__ = ['METHODS', 'BNSFP', 'EPFS', 'Learner', 'OneShot', 'SFP', 'SSS', 'Scratch', 'method_of']

METHODS: Dict[str, Type[Learner]] = {cls.method: cls for cls in (EPFS, SSS, SFP, BNSFP)}


def method_of(method: Union[str, Type[Learner]]) -> Type[Learner]:
    """The class of a method that is given by name, or as a class already.

    Raises:
        PruningError: There is no such method.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise PruningError(f'method={method!r} is unknown; give one of {", ".join(METHODS)}')
    return METHODS[method]
