"""What every benchmark shares: who measured, tables that survive an interruption, one-line errors."""
import csv
import io
import json
import os
import platform
import re
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Union

from tqdm import tqdm

from timm_epfs import __version__
from timm_epfs.core import write_whole

RESULTS = Path(__file__).parent / 'results'
PACKAGES = ('torch', 'timm', 'torchvision', 'torch-pruning')


def header() -> Dict[str, Any]:
    """Machine, versions and date. Nothing that tells one owner's machine from another's."""
    return {
        'cpu': _cpu(),
        'cores': os.cpu_count(),
        'ram_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9),
        'os': _os(),
        'python': platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        'timm_epfs': __version__,
        'date': date.today().isoformat(),
    }


def header_line(head: Dict[str, Any]) -> str:
    """The header as one line of Markdown."""
    packages = ', '.join(f'{name} {head[name]}' for name in (*PACKAGES, 'timm_epfs'))
    machine = f'{head["cpu"]}, {head["cores"]} cores, {head["ram_gb"]} GB, {head["os"]}'
    return f'{machine}; Python {head["python"]}, {packages}; {head["date"]}.'


def _cpu() -> str:
    try:
        found = re.search(r'model name\s*: (.+)', Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _os() -> str:
    try:
        return platform.freedesktop_os_release()['PRETTY_NAME']
    except (OSError, AttributeError, KeyError):
        return f'{platform.system()} {platform.release()}'


def one_line(error: Union[BaseException, str], length: int = 300) -> str:
    """An error as one line without the folders of this machine."""
    text = error if isinstance(error, str) else f'{type(error).__name__}: {error}'
    return re.sub(r'(?<![\w.])(?:/[^\s/:]+)+/', '', ' '.join(text.split()))[:length]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(text, encoding='utf-8', newline=''))


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1) + '\n')


def write_results(path: Path, results: Any, table: str) -> None:
    """Results as JSON, their table as Markdown beside it, and the table on the screen.

    Args:
        path: The JSON file.
        results: What was measured.
        table: The same in Markdown.
    """
    write_json(path, results)
    write_text(path.with_suffix('.md'), table)
    print(table)


def measure_missing(
        path: Path,
        key: str,
        names: Iterable[str],
        measure: Callable[[str], Any],
        redo: bool = False,
        before: Callable[[], Any] = lambda: None,
        **conditions: Any,
) -> Dict[str, Any]:
    """Measure what a file doesn't have yet, writing it after each, so that an interrupted run goes on.

    Args:
        path: The JSON file.
        key: What holds the measurements in it, by name.
        names: What to measure.
        measure: Gives the measurement of one.
        redo: Begin anew.
        before: Run first, where anything is missing.
        **conditions: What else the file is to say, beside the header.

    Returns:
        What the file holds now.
    """
    results = json.loads(path.read_text()) if path.exists() and not redo else {key: {}}
    results.update(machine=header(), **conditions)
    missing = [name for name in names if name not in results[key]]
    if missing:
        before()
    for name in tqdm(missing, unit=key.removesuffix('s')):
        results[key][name] = measure(name)
        write_json(path, results)
    return results


class Table:
    """Rows by name in a CSV file that is always whole, so that an interrupted run goes on where it stopped.

    Args:
        path: The file; its rows are read where it exists.
        columns: Names of the columns, ``'name'`` first.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, tuple(columns)
        self.rows: Dict[str, Dict[str, str]] = {}
        self._saved = 0.0
        if path.exists():
            with open(path, encoding='utf-8', newline='') as file:
                self.rows = {row['name']: row for row in csv.DictReader(file)}

    def put(self, row: Dict[str, Any]) -> None:
        """Add or replace a row; the file follows within two seconds, or at ``save``."""
        self.rows[row['name']] = {column: _cell(row.get(column)) for column in self.columns}
        if time.monotonic() - self._saved > 2:
            self.save()

    def save(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator='\n', extrasaction='ignore')
        writer.writeheader()
        writer.writerows(self.rows[name] for name in sorted(self.rows))
        write_text(self.path, text.getvalue())
        self._saved = time.monotonic()

    def numbers(self, column: str, names: Iterable[str]) -> List[float]:
        return [float(self.rows[name][column]) for name in names if self.rows[name].get(column)]


def _cell(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.6g}' if isinstance(value, float) else str(value)
