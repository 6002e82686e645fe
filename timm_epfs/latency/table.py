"""Seconds that calls take on one device, measured once and remembered on disk."""
import json
import os
import platform
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch

from ..clock import timer
from ..cost import is_number
from ..errors import PruningError
from .kernels import Kernel

__all__ = ['Table', 'cache_folder', 'stopwatch']

FORMAT = 1
_SHORTEST = 0.004   # seconds that a call is repeated for, at least
_PORTION = 50       # calls after whose measurement the file is written
_REPEATS = 2        # and how often, at least, each of the two times that it's measured


class Table:
    """Seconds by call. What isn't known is measured; ``settle()`` keeps it for the next process.

    Args:
        device: Where calls run.
        clock: ``clock(call, device)`` gives the seconds that a call takes; ``stopwatch`` by default.
        folder: Folder of the file. None: ``cache_folder()``. What another clock says is not kept there.
    """

    def __init__(
            self,
            device: torch.device,
            clock: Optional[Callable[[Callable[[], Any], torch.device], float]] = None,
            folder: Optional[Path] = None,
    ):
        self.device, self.clock = torch.device(device), clock or stopwatch
        self.machine = {
            'device': device_name(self.device), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
        }
        name = re.sub(r'[^\w.+-]+', '-', '-'.join(str(value) for value in self.machine.values()))
        self.path = (folder or cache_folder()) / f'{name}.json' if folder or clock is None else None
        self._seconds = self._read()
        self._new: Dict[str, Tuple[Kernel, Dict[str, int]]] = {}

    def __call__(self, kernel: Kernel, left: Mapping[str, int]) -> float:
        """Seconds of a call at these numbers of units left.

        Raises:
            Exception: It can't run with these lengths.
        """
        signature = kernel.signature(left)
        if signature not in self._seconds:
            self._seconds[signature] = self._measure(kernel, left)
            self._new[signature] = (kernel, dict(left))
            if len(self._new) % _PORTION == 0:  # an interruption costs little
                self.save()
        return self._seconds[signature]

    def settle(self) -> None:
        """Measure what is new a second time, some time later, and keep the lesser: what disturbed one passes."""
        for signature, (kernel, left) in self._new.items():
            self._seconds[signature] = min(self._seconds[signature], self._measure(kernel, left))
        self.save()
        self._new = {}

    @torch.inference_mode()
    def _measure(self, kernel: Kernel, left: Mapping[str, int]) -> float:
        return self.clock(kernel.bind(left, self.device), self.device)

    def save(self) -> None:
        """Add what was measured to the file, beside what others added to it since. It is always whole."""
        if self.path is None or not self._new:
            return
        seconds = {**self._read(), **{signature: self._seconds[signature] for signature in self._new}}
        data = {'format': FORMAT, **self.machine, 'seconds': seconds}
        part = self.path.with_name(f'.{self.path.name}.{os.getpid()}.tmp')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(data, indent=0), encoding='utf-8')
            os.replace(part, self.path)
        except OSError as e:
            warnings.warn(
                f'latencies are not kept in {self.path.parent} ({e.strerror or e}), and measured again next time; set '
                f'TIMM_EPFS_CACHE to a folder that can be written', stacklevel=2)
        finally:
            with suppress(OSError):
                part.unlink()

    def _read(self) -> Dict[str, float]:
        """What the file says. One that is damaged, or of another format, says nothing."""
        try:
            data = json.loads(self.path.read_text(encoding='utf-8')) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get('format') != FORMAT or not isinstance(data.get('seconds'), dict):
            return {}
        return {
            key: float(value) for key, value in data['seconds'].items()
            if is_number(value) and value > 0
        }


def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the least of some: what else runs on the machine makes it slower, never faster.

    By ``torch.utils.benchmark``, which repeats short calls and waits for the device.
    """
    clock = timer(call)
    once = clock.timeit(1).mean
    return min(clock.blocked_autorange(min_run_time=max(_SHORTEST, _REPEATS * once)).times)


def cache_folder() -> Path:
    """Where tables are kept: ``TIMM_EPFS_CACHE``, or the user's cache folder."""
    own = os.environ.get('TIMM_EPFS_CACHE')
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(own) / 'latency' if own else Path(base) / 'timm_epfs' / 'latency'


def device_name(device: torch.device) -> str:
    """What the device calls itself.

    Raises:
        PruningError: There is no such device.
    """
    if device.type == 'cuda':
        try:
            return torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError) as e:
            raise PruningError(f'device {str(device)!r} can\'t be used: {str(e).splitlines()[0]}') from e
    if device.type != 'cpu':
        return f'{device.type} {platform.machine()}'
    try:
        found = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
