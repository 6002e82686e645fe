"""``PruningError``, the one exception that users need to know, and helpers for its messages."""
from contextlib import contextmanager
from typing import Iterator, Sequence


class PruningError(ValueError):
    """Something can't be done as asked. The message is one line: what is wrong, what was found, and what to do."""


class OutOfReach(PruningError):
    """No allowed cut is small enough to meet the budget."""


def first_few(problems: Sequence[str]) -> str:
    """The first three problems in one line, and how many more there are.

    >>> first_few(['a is missing', 'b is missing', 'c is missing', 'd is missing', 'e is missing'])
    'a is missing; b is missing; c is missing and 2 more'
    """
    more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
    return '; '.join(problems[:3]) + more


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn any exception inside the block into a ``PruningError`` of one line that starts with ``what``."""
    try:
        yield
    except PruningError:
        raise
    except Exception as e:
        reason = ' '.join(str(e).split())
        raise PruningError(f'{what}: {type(e).__name__} {reason[:300]}') from e
