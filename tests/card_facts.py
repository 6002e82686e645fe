"""What a card says, taken apart: its sections, its table, the numbers in it, and its metadata."""
import json
import re
from typing import Any, Dict, List, Mapping

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# The licenses of timm's weights, as the Hub's documentation names them (docs/hub/repositories-licenses.md).
LICENSES = {
    'apache-2.0', 'apple-amlr', 'apple-ascl', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'gemma', 'mit', 'other',
    'unknown',
}
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


def violations(data: Mapping[str, Any]) -> List[str]:
    """Fields of a card's metadata that don't meet the Hub's specification (modelcard.md of huggingface/hub-docs)."""
    meets = {
        'license': lambda value: value in LICENSES and (value != 'other' or bool(data.get('license_name'))),
        'library_name': lambda value: value == 'timm',
        'pipeline_tag': lambda value: value == 'image-classification',
        'tags': lambda value: _is_list_of(value, lambda tag: isinstance(tag, str)),
        'datasets': lambda value: _is_list_of(value, _is_repo),
        'base_model': _is_repo,
        'model-index': lambda value: _is_list_of(value, _is_model_of_index),
        'widget': lambda value: _is_list_of(value, lambda one: one['src'].startswith(('https://', 'http://'))),
        'license_name': lambda value: isinstance(value, str),
        'license_link': lambda value: value.startswith('https://'),
    }
    missing = [name for name in ('library_name', 'pipeline_tag', 'tags') if name not in data]
    return [*missing, *(name for name, value in data.items() if name not in meets or not meets[name](value))]


def _is_list_of(value: Any, rule: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(rule, value))


def _is_repo(text: Any) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _is_model_of_index(model: Any) -> bool:
    """Every result has what modelcard.md calls required."""
    return bool(model.get('name')) and _is_list_of(model.get('results'), lambda result: (
        isinstance(result['task']['type'], str)
        and all(isinstance(result['dataset'][name], str) and result['dataset'][name] for name in ('type', 'name'))
        and _is_list_of(result['metrics'], lambda metric: {'type', 'value'} <= metric.keys())))
