"""Seconds that calls take on one device, measured once and remembered on disk."""
import json
import math
import os
import platform
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

import torch

from ..core import PruningError, is_number
from .clock import timer
from .kernels import Kernel

__all__ = ['Table', 'cache_folder', 'stopwatch']

FORMAT = 2
_SHORTEST = 0.004   # seconds that a call is repeated for, at least
_REPEATS = 2        # and how often, at least, each time that it's measured
_PORTION = 25       # calls between two looks at the pace
_PASSES = 2         # every call is measured so often, some time apart
_MOST_PASSES = 4    # and those that were disturbed
_CALM = 1.2         # of the device's best pace: a clock that is turned down for heat is slower by less

Call = Tuple[Kernel, Mapping[str, int]]


class Table:
    """Seconds by call, and how fast the device was when they were measured.

    Its pace is what one and the same computation takes, timed between every few calls. A call whose pace is slower than
    the best that was ever seen was disturbed, by another program or by a clock turned down: it's measured again, at
    once and by every process that needs it later, until it has been measured well.

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
            **_numerics(self.device),
        }
        name = re.sub(r'[^\w.+-]+', '-', '-'.join(str(value) for value in self.machine.values()))
        self.path = (folder or cache_folder()) / f'{name}.json' if folder or clock is None else None
        self._known = self._read()  # seconds and pace
        self._best = min((pace for _, pace in self._known.values()), default=math.inf)

    def __call__(self, kernel: Kernel, left: Mapping[str, int]) -> float:
        """Seconds of a call at these numbers of units left. It has been learned before."""
        return self._known[kernel.signature(left)][0]

    def learn(self, calls: Iterable[Call]) -> None:
        """Measure the calls that aren't known well, and keep them for other processes.

        Raises:
            PruningError: A call can't run with these lengths.

        Warns:
            UserWarning: The device was disturbed all along, or nothing can be kept.
        """
        calls = {kernel.signature(left): (kernel, left) for kernel, left in calls}
        pace = self._pace()
        todo = self._doubtful(calls)
        for turn in range(_MOST_PASSES if todo else 0):
            for i in range(0, len(todo), _PORTION):
                pace = self._measure({name: calls[name] for name in todo[i:i + _PORTION]}, pace)
            if turn + 1 >= _PASSES:
                todo = self._doubtful(todo)
        if todo:
            warnings.warn(
                f'latency: something else kept the machine busy while {len(todo)} of {len(calls)} calls were timed; '
                f'they are timed again next time', UserWarning, stacklevel=4)

    def _doubtful(self, names: Iterable[str]) -> List[str]:
        """Calls that aren't known, or were measured at a slower pace than the device can go."""
        return [name for name in names if name not in self._known or self._known[name][1] > _CALM * self._best]

    def _measure(self, calls: Mapping[str, Call], before: float) -> float:
        """Measure, given the pace before; the pace after it. What else runs makes a call slower, never faster."""
        taken = {name: self._time(name, *call) for name, call in calls.items()}
        after = self._pace()
        for name, seconds in taken.items():
            known, then = self._known.get(name, (math.inf, math.inf))
            self._known[name] = min(seconds, known), min(max(before, after), then)
        self._save(calls)
        return after

    @torch.inference_mode()
    def _time(self, name: str, kernel: Kernel, left: Mapping[str, int]) -> float:
        try:
            call = kernel.bind(left, self.device)
        except Exception as e:
            raise PruningError(
                f'latency: {name} can\'t be timed by itself, {type(e).__name__}; ask for macs= or params=') from e
        return self.clock(call, self.device)

    @torch.inference_mode()
    def _pace(self) -> float:
        """Seconds of some arithmetic and some traffic to memory."""
        weight = torch.ones(512, 512, device=self.device)
        large = torch.ones(1 << 22, device=self.device)
        pace = self.clock(lambda: (weight @ weight, large.neg_()), self.device)
        self._best = min(self._best, pace)
        return pace

    def _save(self, names: Iterable[str]) -> None:
        """Add these to the file, beside what others added to it since. It is always whole."""
        if self.path is None:
            return
        data = {'format': FORMAT, **self.machine, 'calls': {**self._read(), **{n: self._known[n] for n in names}}}
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

    def _read(self) -> Dict[str, Tuple[float, float]]:
        """What the file says. One that is damaged, or of another format, says nothing."""
        try:
            data = json.loads(self.path.read_text(encoding='utf-8')) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get('format') != FORMAT or not isinstance(data.get('calls'), dict):
            return {}
        return {
            name: (float(values[0]), float(values[1])) for name, values in data['calls'].items()
            if isinstance(values, list) and len(values) == 2 and all(is_number(v) and v > 0 for v in values)
        }


def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the least of some.

    By ``torch.utils.benchmark``, which repeats short calls.
    """
    clock = timer(call, device)
    once = clock.timeit(1).mean
    return min(clock.blocked_autorange(min_run_time=max(_SHORTEST, _REPEATS * once)).times)


def _numerics(device: torch.device) -> Dict[str, str]:
    """What else decides how fast one and the same call is."""
    found = {}
    if torch.is_autocast_enabled(device.type):
        found['autocast'] = str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')
    if device.type == 'cuda':
        found['float32'] = f'{torch.backends.cuda.matmul.fp32_precision}-{torch.backends.cudnn.conv.fp32_precision}'
        found['cudnn'] = 'benchmark' if torch.backends.cudnn.benchmark else 'heuristics'
    return found


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
