"""Files and folders that are there whole or not at all."""
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from .errors import PruningError

__all__ = ['check_place', 'whole_folder', 'write_whole']


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, and give it its own once it is on the disk.

    Args:
        path: The file.
        write: Writes the file at the path that it is given.
    """
    part = _hidden(path, 'tmp')
    try:
        write(part)
        with open(part, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under another name, and give it its own after the block. An old one is replaced.

    A folder can't replace another in one step: killed between the two renamings, the old one is left as
    ``.<name>.<random>.old``.

    Yields:
        The empty folder to fill.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = _hidden(folder, 'tmp'), _hidden(folder, 'old')
    try:
        part.mkdir()
        yield part
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_place(path: Path, what: str) -> None:
    """Raise ``PruningError`` where a file can't be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise PruningError(f'{what}: {path} is a folder; name a file')
    if not path.absolute().parent.is_dir():
        raise PruningError(f'{what}: there is no folder {path.parent} to write {path.name} in; make it first')


def _hidden(path: Path, suffix: str) -> Path:
    """A name beside a path that nothing has yet."""
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.{suffix}')
