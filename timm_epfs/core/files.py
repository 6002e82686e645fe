"""Files and folders that are written completely or not at all."""
import ctypes
import os
import shutil
import uuid
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator

from filelock import FileLock

from .errors import PruningError

__all__ = ['check_place', 'locked', 'whole_folder', 'write_whole']

_LONGEST_WAIT = 10.0  # seconds; what is done under a lock takes milliseconds


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, and rename it once all of it is on the disk.

    Args:
        path: The file. An old one is replaced.
        write: Called with the temporary path, where it writes the file.
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
def locked(path: Path) -> Iterator[None]:
    """Inside the block, no other thread or process is in such a block for the same file.

    There is no lock where the file system has none, or where another process doesn't let go of it.

    Args:
        path: The file, which may not exist yet. The lock is a hidden file beside it.
    """
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            stack.enter_context(FileLock(path.with_name(f'.{path.name}.lock'), timeout=_LONGEST_WAIT))
        yield


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name, and rename it after the block. An old one is replaced.

    On Linux, the new and the old folder exchange their names in one step. Elsewhere, and on file systems that can't do
    that, replacing a folder takes two renamings; a process that is killed between them leaves the old folder as
    ``.<name>.<random>.old``.

    Args:
        folder: The folder.

    Yields:
        The empty temporary folder, to fill.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = _hidden(folder, 'tmp'), _hidden(folder, 'old')
    try:
        part.mkdir()
        yield part
        if not (folder.exists() and _exchange(part, folder)):
            _replace(part, folder, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths exchange their names in one step; False where the system can't."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not the C library of Linux
        return False
    at_working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    paths = os.fsencode(first), os.fsencode(second)
    return rename(at_working_folder, paths[0], at_working_folder, paths[1], exchange) == 0


def _replace(part: Path, folder: Path, old: Path) -> None:
    """Rename a folder to one that may exist, which is first renamed to ``old``, and deleted at last."""
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_place(path: Path, what: str) -> None:
    """Check before a long computation that its result can be written to a file.

    Args:
        path: The file.
        what: What the message starts with.

    Raises:
        PruningError: The path is a folder, or its folder doesn't exist.
    """
    if path.is_dir():
        raise PruningError(f'{what}: {path} is a folder; name a file')
    if not path.absolute().parent.is_dir():
        raise PruningError(f'{what}: there is no folder {path.parent} to write {path.name} to; make it first')


def _hidden(path: Path, suffix: str) -> Path:
    """An unused hidden name in the folder of a path."""
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.{suffix}')
