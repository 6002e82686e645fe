"""The one exception that users have to know, and what makes its messages."""
from contextlib import contextmanager
from typing import Iterator, Sequence


class PruningError(ValueError):
    """What was asked can't be done. The message is one line: what was asked, what was found, what to do."""


class OutOfReach(PruningError):
    """A budget is less than any allowed cut leaves."""


def first_few(problems: Sequence[str]) -> str:
    """Problems as part of a line: three of them, and how many more there are."""
    more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
    return '; '.join(problems[:3]) + more


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn whatever a library raises inside the block into a ``PruningError`` that starts with ``what``."""
    try:
        yield
    except PruningError:
        raise
    except Exception as e:
        reason = ' '.join(str(e).split())
        raise PruningError(f'{what}: {type(e).__name__} {reason[:300]}') from e
