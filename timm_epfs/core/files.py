"""Files that are there whole or not at all."""
import os
import uuid
from pathlib import Path
from typing import Any, Callable

from .errors import PruningError

__all__ = ['check_place', 'write_whole']


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a file beside ``path``, which takes its name once it's on the disk."""
    part = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        write(part)
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_place(path: Path, what: str) -> None:
    """Raise ``PruningError`` where a file can't be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise PruningError(f'{what}: {path} is a folder; name a file')
    if not path.absolute().parent.is_dir():
        raise PruningError(f'{what}: there is no folder {path.parent} to write {path.name} in; make it first')
