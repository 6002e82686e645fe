"""Every snippet of docs/ and of the README runs, shows what it prints, and names what exists.

The blocks of a page run in order, in one folder and one namespace. What a ``console`` block shows, and a ``text`` block
right after a ``python`` block, is compared with what was printed. A block with ``<!-- not run: why -->`` above it is
parsed, and its names of timm_epfs are looked up.
"""
import ast
import importlib
import inspect
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import timm_epfs
from timm_epfs.cli import shell as cli

ROOT = Path(__file__).parents[1]
INDEX = ROOT / 'docs' / 'README.md'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
RESULTS = ROOT / 'benchmarks' / 'results'
FENCE = re.compile(r'(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$', re.M | re.S)
NUMBER = r'\d+(?:\.\d+)?'
TOLERANCE = 0.05  # of a number that is shown: which units go may change, how many hardly does


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    runs: bool


def blocks(page):
    text = page.read_text(encoding='utf-8')
    return [
        Block(found['language'], found['text'], text.count('\n', 0, found.start('text')) + 1, found['why'] is None)
        for found in FENCE.finditer(text)
    ]


def commands(block):
    """Command lines of a console block, each with what is shown below it."""
    for part in re.split(r'^\$ ', block.text, flags=re.M)[1:]:
        line, _, shown = part.replace('\\\n', ' ').partition('\n')
        yield line, shown


def arguments(line):
    """Arguments of a ``timm-epfs`` command; None for other programs."""
    words = shlex.split(line, comments=True)
    return words[words.index('timm-epfs') + 1:] if 'timm-epfs' in words else None


def check_shown(shown, printed, where):
    """Compare text but for white space; numbers may differ a little, ``...`` stands for anything."""
    parts = re.split(rf'({NUMBER})', ' '.join(shown.split()))
    text = [re.escape(part).replace(r'\.\.\.', '.*?').replace(r'\ ', ' ') for part in parts[::2]]
    found = re.fullmatch(f'({NUMBER})'.join(text), ' '.join(printed.split()))
    close = found and all(
        abs(float(a) - float(b)) <= TOLERANCE * abs(float(a)) for a, b in zip(parts[1::2], found.groups()))
    assert close, f'{where} prints\n{printed}\nand shows\n{shown}'


def check_names(tree, where):
    """Look up what is imported from timm_epfs or reached through it, and the keywords that it is called with."""
    known = {'timm_epfs': timm_epfs}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').partition('.')[0] == 'timm_epfs':
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f'{where}: {node.module} has no {alias.name}'
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            look_up(node, known, where)
        elif isinstance(node, ast.Call) and is_ours(called := look_up(node.func, known, where)):
            parameters = inspect.signature(called).parameters
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
                unknown = {word.arg for word in node.keywords} - {None, *parameters}
                assert not unknown, f'{where}: {ast.unparse(node.func)} takes no {unknown}'


def is_ours(called):
    return callable(called) and (getattr(called, '__module__', None) or '').partition('.')[0] == 'timm_epfs'


def look_up(node, known, where):
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute) or (owner := look_up(node.value, known, where)) is None:
        return None
    assert hasattr(owner, node.attr), f'{where}: {ast.unparse(node)} does not exist'
    return getattr(owner, node.attr)


def run_console(block, where, capsys):
    for line, shown in commands(block):
        words = arguments(line)
        assert words is not None, f'{where}: only timm-epfs commands are run; mark what isn\'t'
        cli.main(words)
        out, err = capsys.readouterr()
        check_shown(shown, out + ''.join(re.findall(r'^timm-epfs: error:.*\n', err, flags=re.M)), f'{where}: {line}')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('page', [page for page in PAGES if page != INDEX], ids=lambda page: page.stem)
def test_snippets_run(page, registry, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found, space, printed = blocks(page), {'__name__': '__main__'}, ''
    assert any(block.runs and block.language in ('python', 'console') for block in found)
    for before, block in zip([None, *found], found):
        where = f'{page.name}, line {block.line}'
        if block.language == 'python':
            code = '\n' * (block.line - 1) + block.text
            check_names(ast.parse(code), where)
            printed = ''
            if block.runs:
                exec(compile(code, str(page), 'exec'), space)
                printed = capsys.readouterr().out
        elif block.language == 'text' and before is not None and before.language == 'python' and before.runs:
            check_shown(block.text, printed, where)
        elif block.language == 'console' and block.runs:
            run_console(block, where, capsys)
        elif block.language in ('console', 'bash'):
            lines = [line for line, _ in commands(block)] or block.text.replace('\\\n', ' ').splitlines()
            for words in filter(None, map(arguments, lines)):
                cli.parse_args(words)


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'benchmarks').glob('*.md'))],
                         ids=lambda page: f'{page.parent.name}-{page.stem}')
def test_links_lead_somewhere(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', re.sub(FENCE, '', page.read_text(encoding='utf-8')))
    if not targets:
        pytest.skip('no links')
    for target in targets:
        path, _, anchor = target.partition('#')
        if path.startswith('http'):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f'{page.name} links to {target}'
        if anchor:
            headings = re.findall(r'^#+ (.+)$', linked.read_text(encoding='utf-8'), flags=re.M)
            slugs = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in slugs, f'{page.name} links to {target}'


def test_fences_are_of_kinds_that_are_looked_at():
    for page in PAGES:
        languages = re.findall(r'^```(\w*)$', page.read_text(encoding='utf-8'), flags=re.M)
        assert set(languages) <= {'python', 'console', 'text', 'bash', 'json', ''}
        assert languages[1::2] == [''] * (len(languages) // 2) and '' not in languages[::2], page.name


def measured():
    """Every number that a headline may give, from the committed results."""
    zoo, beyond, exact, speed, added, clock = (
        json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))
        for name in ('zoo', 'beyond', 'exactness', 'prune_speed', 'overhead', 'latency'))
    counts = [zoo[library][count] for library in ('timm', 'torchvision') for count in ('ok', 'names')]
    counts += [beyond[count] for count in ('ok', 'models', 'rival_ok')]
    errors = [exact['ok'], exact['names'], exact['median_error'], max(exact['worst'].values())]
    ranges = []
    for by in ('macs', 'torch-pruning'):
        ranges.append([row['dense']['least_ms'] / row[by]['least_ms'] for row in clock['rows'].values() if by in row])
    timed = [
        len({name.partition('@')[0] for name, row in clock['rows'].items() if by in row})
        for by in ('macs', 'torch-pruning')]
    ranges.append([row['ours_whole'] for row in speed['models'].values()])
    ranges.append([100 * (row['time'] - 1) for row in added['models'].values()])
    ends = [end for values in ranges for end in (min(values), max(values))]
    return [*counts, *errors, len(exact['float64_needed']), *ends, *timed, clock['threads'], speed['threads']]


def test_headlines_give_the_numbers_of_the_committed_results():
    told = re.search(r'<!-- headlines -->\n(.*)\n<!-- /headlines -->', PAGES[0].read_text(encoding='utf-8'), re.S)[1]
    shown = re.findall(r'(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?!\w)', re.sub('`.*?`', '', told))
    facts = measured()
    wrong = np.array([[not gives(number, fact) for fact in facts] for number in shown])
    numbers, places = linear_sum_assignment(wrong)  # each number gives a fact of its own
    assert [(shown[i], facts[j]) for i, j in zip(numbers, places) if wrong[i, j]] == [] and len(shown) == len(facts)


def gives(number, fact):
    """Whether a number is a fact rounded to the digits that it shows."""
    plain = number.replace(',', '')
    mantissa, _, exponent = plain.partition('e')
    last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition('.')[2]))
    return abs(float(plain) - fact) <= 0.501 * last_digit


@pytest.mark.parametrize('number, fact, right', [
    ('1,370', 1370, True), ('1.6', 1.649, True), ('1.6', 1.66, False), ('2.5e-07', 2.46e-7, True),
    ('2.5e-07', 2.6e-7, False), ('4', 4.4, True), ('4', 5, False),
])
def test_a_number_gives_a_fact_to_its_digits(number, fact, right):
    assert gives(number, fact) == right


@pytest.mark.parametrize('code, message', [
    ('import timm_epfs\ntimm_epfs.prone("resnet18")', 'timm_epfs.prone does not exist'),
    ('from timm_epfs.plan import Plane', 'has no Plane'),
    ('import timm_epfs\ntimm_epfs.save_pretrained(slim, "half", overwritten=True)', 'takes no'),
])
def test_wrong_names_are_found(code, message):
    with pytest.raises(AssertionError, match=message):
        check_names(ast.parse(code), 'page')


@pytest.mark.parametrize('shown', ['a  1.00 ... c\n', 'a 1\n2.6 c\n', '...'])
def test_what_is_shown_may_differ_a_little(shown):
    check_shown(shown, 'a 1.0 2.5 c\n', 'page')


@pytest.mark.parametrize('shown', ['a 2 2.5 c', 'b 1 2.5 c', 'a 1 2.5', 'a 1 2.5 c 3', ''])
def test_wrong_output_is_found(shown):
    with pytest.raises(AssertionError, match='page prints'):
        check_shown(shown, 'a 1.0 2.5 c\n', 'page')
