"""Registers timm_epfs's models in every program that imports timm, without changing the program: on, off, status.

Python executes the lines that start with ``import`` of each ``.pth`` file in its site-packages at start-up. Ours holds
``import_hook.py``, which waits for timm.
"""
import sysconfig
from pathlib import Path
from typing import Optional

from ..core import PruningError, write_whole

__all__ = ['autoload_path', 'is_on', 'switch_off', 'switch_on']

HOOK = Path(__file__).with_name('import_hook.py')


def autoload_path(folder: Optional[Path] = None) -> Path:
    """Where the hook is, when it's on.

    Args:
        folder: The site-packages to change; None: those of the running environment.
    """
    return Path(folder or sysconfig.get_path('purelib')) / 'timm_epfs_autoload.pth'


def is_on(folder: Optional[Path] = None) -> bool:
    """Whether programs of the environment load timm_epfs with timm."""
    return autoload_path(folder).exists()


def switch_on(folder: Optional[Path] = None) -> Path:
    """Load timm_epfs wherever timm is imported, from the next program on. What an earlier version wrote is replaced.

    Returns:
        The file that was written.

    Raises:
        PruningError: The environment's site-packages can't be written to.
    """
    path = autoload_path(folder)
    line = f'import sys; exec({HOOK.read_text(encoding="ascii")!r}, {{}})\n'
    try:
        write_whole(path, lambda part: part.write_text(line, encoding='ascii'))
    except OSError as e:
        raise _refused(path, e) from e
    return path


def switch_off(folder: Optional[Path] = None) -> bool:
    """Undo ``switch_on``.

    Returns:
        Whether it was on.

    Raises:
        PruningError: The environment's site-packages can't be written to.
    """
    path = autoload_path(folder)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as e:
        raise _refused(path, e) from e
    return True


def _refused(path: Path, error: OSError) -> PruningError:
    why = error.strerror or error
    return PruningError(
        f'autoload: {path} can\'t be written ({why}); use an environment of your own, or import timm_epfs where you '
        'import timm'
    )
