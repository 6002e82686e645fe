"""What a run writes for people: ``summary.csv`` after each epoch, ``report.md`` with pictures at its end."""
import csv
import json
import shutil
from pathlib import Path
from typing import Any, List, Mapping, Sequence

import timm
import torch

from ..core import PruningError, markdown_table, write_whole
from ..plan import Plan
from ..report import Rows, check_page, table
from ..version import __version__
from .run_pictures import draw_all

__all__ = ['OPTIONS', 'check_page_place', 'claim_folder', 'write_report', 'write_summary']

OPTIONS = 'args.json'  # written before anything else: a folder without it holds no run
_PAGE = 'report.html'
# The files and folders of a run. A folder that holds anything else is never replaced.
_OWN_FILES = ('checkpoints', 'dense.safetensors', 'pictures', 'pruned', 'report.md', _PAGE, 'summary.csv', OPTIONS)


def claim_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Prepare the folder of a run: create it, and delete an earlier run with ``overwrite``.

    Args:
        folder: The folder.
        resume: Whether the run in the folder is to be continued.
        overwrite: Whether the run in the folder is to be replaced.

    Raises:
        PruningError: The folder holds other files, or a run that is neither continued nor replaced; or it can't be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith('.'))
        others = [name for name in present if name not in _OWN_FILES or not _holds_run(folder)]
        if others:
            raise PruningError(f'train: {folder} holds {others[0]!r}, which is not part of a run; name another folder')
        if present and not (resume or overwrite):
            raise PruningError(
                f'train: {folder} holds a run; continue it with --resume, replace it with --overwrite, or name another '
                'folder')
        _delete_partial(folder)
        for name in _OWN_FILES if overwrite else ():  # the options last: until then, what is left is seen to be a run
            _delete(folder / name)
    except OSError as e:
        raise PruningError(f'train: {folder} can\'t be used: {e.strerror or e}') from e


def check_page_place(page: Path, folder: Path) -> None:
    """Raise ``PruningError`` if a page can't be written, or would be a foreign file in the folder of a run."""
    check_page(page)
    if page.resolve().parent == folder.resolve() and page.name != _PAGE:
        raise PruningError(f'--report {page} is in the folder of the run; call it {_PAGE}, or name another folder')


def _holds_run(folder: Path) -> bool:
    """Whether the options in a folder are those of a run, and not of another program's."""
    try:
        options = json.loads((folder / OPTIONS).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return isinstance(options, dict) and 'epochs_by_phase' in options


def _delete_partial(folder: Path) -> None:
    """Delete what a run that was killed had begun to write."""
    for name in _OWN_FILES:
        for path in folder.glob(f'.{name}.*.tmp'):
            _delete(path)
    for path in folder.glob('checkpoints/.*.tmp'):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write the history as CSV, one row per epoch, the columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in history for name in row))

    def write(part: Path) -> None:
        with open(part, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in history)

    write_whole(path, write)


def write_report(
        folder: Path,
        options: Mapping[str, Any],
        rows: Rows,
        notes: str,
        history: Sequence[Mapping[str, Any]],
        masks: Sequence[Mapping[str, Any]],
        plan: Plan,
) -> None:
    """Write ``report.md``, with pictures if matplotlib is installed.

    Args:
        folder: Folder of the run.
        options: The options of the run.
        rows: The dense and the pruned model side by side.
        notes: How they were measured.
        history: One row per epoch.
        masks: A histogram of the masks for each sparse epoch, from ``mask_histogram``.
        plan: The plan of the pruned model.
    """
    address = f'local-dir:{folder / "pruned"}'
    pictures = draw_all(folder / 'pictures', history, masks, plan)
    lines = [
        f'# {options["model"]}, pruned by {options["method"]}',
        '',
        *markdown_table(table(rows)),
        '',
        f'Top-1 was measured on the saved model, loaded from its folder; {notes}.',
        f'timm_epfs {__version__}, timm {timm.__version__}, torch {torch.__version__}.',
        '',
        '```python',
        'import timm, timm_epfs',
        f'model = timm.create_model({address!r}, pretrained=True)',
        '```',
        '',
        *(line for title, name in pictures for line in (f'## {title}', '', f'![{title}](pictures/{name})', '')),
        *([] if pictures else [
            'Pictures need matplotlib: pip install timm-epfs[plot], then run again with --resume.', '']),
        '## Units that each layer keeps',
        '',
        *markdown_table([('structure', 'kind', 'dense', 'left'), *(
            (cut.structure.name, cut.structure.kind, str(cut.structure.units), str(len(cut.keep)))
            for cut in plan.cuts
        )]),
        '',
        '## Epochs',
        '',
        *_history_table(history),
        '',
        '## Options',
        '',
        '```json',
        json.dumps(options, indent=1),
        '```',
        '',
    ]
    write_whole(folder / 'report.md', lambda part: part.write_text('\n'.join(lines), encoding='utf-8'))


def _history_table(history: Sequence[Mapping[str, Any]]) -> List[str]:
    columns = list(dict.fromkeys(name for row in history for name in row))
    return markdown_table([columns, *([_cell(row.get(name)) for name in columns] for row in history)])


def _cell(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.6g}' if isinstance(value, float) else str(value)
