"""The package's road: what its folders say, what its imports say, and what the map says are the same."""
import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import timm_epfs

PACKAGE = Path(timm_epfs.__file__).parent
ROOT = Path(__file__).parent.parent  # the package may be installed elsewhere
FILES = sorted(PACKAGE.rglob('*.py'))
# In the order in which data flows: each may import those before it.
ROAD = re.findall(r'``(\w+)``', timm_epfs.__doc__.partition('The packages')[2])


def package_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ''


def imported(path):
    """Packages of timm_epfs that a file imports from, at its top or inside functions, and the line."""
    own = ['timm_epfs', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition('.')[0] == 'timm_epfs':
                    yield alias.name.split('.')[1:2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = own[:len(own) - node.level + 1] if node.level else []
            parts = [*base, *(node.module or '').split('.')] if node.module else base
            if parts[:1] == ['timm_epfs']:
                for alias in node.names:
                    yield (parts[1:] or [alias.name])[:1], node.lineno


def test_the_folders_are_the_road():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert folders == set(ROAD) and len(ROAD) == len(set(ROAD)) <= 17


def test_the_map_in_contributing_is_the_road():
    table = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8').partition('## The map')[2].partition('\n## ')[0]
    rows = re.findall(r'^\| `(\w+)` \| .+ \| (.+) \|$', table, flags=re.M)
    assert [name for name, _ in rows] == ROAD
    for package, files in rows:
        named = re.findall(r'`([^`]+)`', files)
        assert named and all((PACKAGE / package / name).exists() for name in named), package


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_goes_up_the_road(path):
    own = package_of(path)
    allowed = {'version', own, *(ROAD[:ROAD.index(own)] if own else [])}
    if path.parent == PACKAGE:
        allowed = {'version', *ROAD}  # the names that users import, and the command
    for package, line in imported(path):
        assert set(package) <= allowed, f'{path.relative_to(PACKAGE)}:{line} imports from {package[0]}'


def test_the_layer_test_sees_lazy_imports(tmp_path):
    """It would be worth nothing if it read the top of a file only."""
    lines = {name: line for (name,), line in imported(PACKAGE / 'cli' / 'train_command.py')}
    assert 'training' in lines and lines['training'] > 30


def test_packages_say_what_goes_in_and_what_comes_out():
    for package in ROAD:
        doc = ast.get_docstring(ast.parse((PACKAGE / package / '__init__.py').read_text(encoding='utf-8')))
        assert re.search(r'^In: .+ Out: ', doc.replace('\n', ' ').partition('  ')[2]), package


def test_names_stand_for_one_thing():
    names = Counter(path.name for path in FILES if path.name not in ('__init__.py', '__main__.py'))
    assert not [name for name, count in names.items() if count > 1]
    assert not set(ROAD) & set(timm_epfs.__all__)  # a package would hide the function


def test_every_public_name_is_there():
    for name in timm_epfs.__all__:
        assert getattr(timm_epfs, name) is not None


def test_importing_loads_no_tracer():
    """What costs time, or isn't installed everywhere, is loaded when it's first used."""
    program = (
        'import sys, timm_epfs\n'
        'heavy = ("timm_epfs.trace", "timm_epfs.pruner", "timm_epfs.integrations", "torch_pruning", "matplotlib", '
        '"sklearn", "onnx", "transformers", "accelerate")\n'
        'print([name for name in heavy if name in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ('[]\n', '')
