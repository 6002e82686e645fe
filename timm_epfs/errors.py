"""The one exception a user of timm_epfs has to know, and the one of its kinds that the code itself acts on."""
from typing import Sequence


class PruningError(ValueError):
    """What was asked can't be done. The message is one line: what was asked, what was found, what to do."""


class OutOfReach(PruningError):
    """A budget is less than any allowed cut leaves."""


def first_few(problems: Sequence[str]) -> str:
    """Problems as part of a line: three of them, and how many more there are."""
    more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
    return '; '.join(problems[:3]) + more
