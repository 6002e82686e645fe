"""What a card says, taken apart: its sections, its table, and the numbers in it."""
import json
import re
from typing import Any, Dict, List

UNITS = {'': 1, 'k': 1e3, 'M': 1e6, 'G': 1e9, '%': 1}


def table(card: str) -> Dict[str, List[str]]:
    """Cells of each row but the first, by the first."""
    rows = re.findall(r'^\| (.*) \|$', card, re.MULTILINE)
    return {name: cells for name, *cells in (row.split(' | ') for row in rows)}


def numbers(cells: List[str]) -> List[float]:
    """Cells such as ``'40.55 M'`` or ``'-50.2 %'``."""
    parts = (cell.partition(' ') for cell in cells)
    return [float(value) * UNITS[unit] for value, _, unit in parts]


def section(card: str, title: str) -> str:
    return re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', card, re.MULTILINE | re.DOTALL)[1]


def recipe(card: str) -> Any:
    return json.loads(re.search(r'^```json\n(.*?)^```', card, re.DOTALL | re.MULTILINE)[1])
