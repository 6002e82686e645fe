"""Keeps quiet what other libraries log about themselves."""
import logging
from contextlib import contextmanager
from typing import Iterator

__all__ = ['unlogged']


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Drop what is logged under a name inside the block."""
    logger = logging.getLogger(name)

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
