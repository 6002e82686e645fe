"""Seconds that calls take on one device, measured once and remembered on disk."""
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..core import PruningError, is_number, locked, measured_by_first, progress, warn, write_whole
from .clock import Forward, time_call
from .kernels import Kernel

__all__ = ['Table', 'cache_folder']

FORMAT = 2
_PORTION = 25           # calls between two runs of the reference workload
_PASSES = 2             # every call is measured so often, some time apart
_MOST_PASSES = 4        # and those that were disturbed up to so often
_UNDISTURBED = 1.2      # times the best reference time: a processor that is throttled for heat is slower by less

Call = Tuple[Kernel, Mapping[str, int]]


class Timing(NamedTuple):
    """What is remembered of a call: the least of its measurements, and how undisturbed the device was at best.

    Attributes:
        seconds: What the call takes.
        reference: What the reference workload took before and after it, the longer of the two.
    """
    seconds: float
    reference: float

    def best(self, other: Optional['Timing']) -> 'Timing':
        """What two timings say together: other programs make a call slower, so the least is nearest to the truth."""
        return self if other is None else Timing(*map(min, self, other))


class Table:
    """Seconds by call, remembered on disk for the processes that come after this one.

    A *reference workload*, always the same arithmetic and traffic to memory, is timed between every few calls. Where it
    takes clearly longer than the best that was ever seen on this device, another program was running or the processor
    was throttled, and the calls around it were disturbed. They are measured again, at once and by every process that
    needs them later, until they were measured undisturbed.

    Args:
        device: Where calls run.
        clock: ``clock(call, device)`` gives the seconds that a call takes; ``time_call`` by default.
        folder: Folder of the file. None: ``cache_folder()`` for the default clock; another clock's times are not kept.
        together: Whether all processes that train together ask for the same calls: then the first one measures for all.
    """

    def __init__(
            self,
            device: torch.device,
            clock: Optional[Callable[[Forward, torch.device], float]] = None,
            folder: Optional[Path] = None,
            together: bool = False,
    ):
        self._together = together
        self.device, self.clock = torch.device(device), clock or time_call
        self.machine = {
            'device': device_name(self.device), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
            **_numerics(self.device),
        }
        name = re.sub(r'[^\w.+-]+', '-', '-'.join(str(value) for value in self.machine.values()))
        self.path = (folder or cache_folder()) / f'{name}.json' if folder or clock is None else None
        self._timings = self._read()
        self._best_reference = min((timing.reference for timing in self._timings.values()), default=math.inf)

    def __call__(self, kernel: Kernel, left: Mapping[str, int]) -> float:
        """Seconds of a call at these numbers of units left, which ``learn`` was given before."""
        return self._timings[kernel.signature(left)].seconds

    def learn(self, calls: Iterable[Call]) -> None:
        """Measure the calls that were not yet measured undisturbed, and keep their times for other processes.

        Raises:
            PruningError: A call can't run with these lengths.

        Warns:
            UserWarning: The device was disturbed all along, or nothing can be kept.
        """
        by_signature = {kernel.signature(left): (kernel, left) for kernel, left in calls}
        if not self._together:
            self._learn(by_signature)
            return

        def measure() -> np.ndarray:
            self._learn(by_signature)
            return np.array([self._timings[name] for name in by_signature]).reshape(-1, 2)

        measured = measured_by_first(measure, (len(by_signature), 2), self.device)
        self._timings.update({name: Timing(*timing) for name, timing in zip(by_signature, measured.tolist())})

    def _learn(self, by_signature: Mapping[str, Call]) -> None:
        reference = self._time_reference()
        todo = self._doubtful(by_signature)
        with progress(None, 'timing layers', _PASSES * len(todo)) as bar:
            for turn in range(_MOST_PASSES if todo else 0):
                for i in range(0, len(todo), _PORTION):
                    portion = {name: by_signature[name] for name in todo[i:i + _PORTION]}
                    reference = self._measure(portion, reference)
                    bar.update(len(portion))
                if turn + 1 >= _PASSES:
                    todo = self._doubtful(todo)
                    bar.total += len(todo)
        if todo:
            warn(
                f'latency: other programs kept the machine busy while {len(todo)} of {len(by_signature)} calls were '
                f'timed; they are timed again next time')

    def _doubtful(self, names: Iterable[str]) -> List[str]:
        """Calls that were never measured, or only while the device was disturbed."""
        longest = _UNDISTURBED * self._best_reference
        return [name for name in names if name not in self._timings or self._timings[name].reference > longest]

    def _measure(self, calls: Mapping[str, Call], before: float) -> float:
        """Measure each call once, and the reference workload after them, whose seconds are returned.

        Args:
            calls: Calls by signature.
            before: Seconds that the reference workload took just before.
        """
        seconds = {name: self._time(name, *call) for name, call in calls.items()}
        after = self._time_reference()
        for name, new in seconds.items():
            self._timings[name] = Timing(new, max(before, after)).best(self._timings.get(name))
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
    def _time_reference(self) -> float:
        """Seconds of the reference workload: a matrix product, and a large tensor that is read and written."""
        weight = torch.ones(512, 512, device=self.device)
        large = torch.ones(1 << 22, device=self.device)
        seconds = self.clock(lambda: (weight @ weight, large.neg_()), self.device)
        self._best_reference = min(self._best_reference, seconds)
        return seconds

    def _save(self, names: Iterable[str]) -> None:
        """Add these calls to the file, beside those that other processes have added since it was read."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                calls = self._read()
                calls.update({name: self._timings[name].best(calls.get(name)) for name in names})
                text = json.dumps({'format': FORMAT, **self.machine, 'calls': calls}, indent=0)
                write_whole(self.path, lambda part: part.write_text(text, encoding='utf-8'))
        except OSError as e:
            warn(
                f'latencies can\'t be kept in {self.path.parent} ({e.strerror or e}), so they will be measured again '
                f'next time; set TIMM_EPFS_CACHE to a folder that can be written')

    def _read(self) -> Dict[str, Timing]:
        """What the file says. One that is damaged, or of another format, says nothing."""
        try:
            data = json.loads(self.path.read_text(encoding='utf-8')) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get('format') != FORMAT or not isinstance(data.get('calls'), dict):
            return {}
        return {
            name: Timing(*map(float, values)) for name, values in data['calls'].items()
            if isinstance(values, list) and len(values) == 2 and all(is_number(v) and v > 0 for v in values)
        }


def cache_folder() -> Path:
    """Where tables are kept: ``latency`` in ``TIMM_EPFS_CACHE`` or in the user's cache folder of this package."""
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


def _numerics(device: torch.device) -> Dict[str, str]:
    """Settings of torch that decide how fast a call is, beside the device and the number of threads."""
    found = {}
    if torch.is_autocast_enabled(device.type):
        found['autocast'] = str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')
    if device.type == 'cuda':
        found['float32'] = f'{torch.backends.cuda.matmul.fp32_precision}-{torch.backends.cudnn.conv.fp32_precision}'
        found['cudnn'] = 'benchmark' if torch.backends.cudnn.benchmark else 'heuristics'
    return found
