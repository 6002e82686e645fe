"""What stays of one structure."""
from dataclasses import dataclass

import numpy as np

from ..core import Structure

__all__ = ['Cut']


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays of a structure.

    Attributes:
        structure: The structure.
        keep: Units that stay, sorted, int64, shape (left,). All of them where the structure is untouched.
    """
    structure: Structure
    keep: np.ndarray
