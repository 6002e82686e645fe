"""The HTML page: well formed, self-contained, escaped, the same each time, and its numbers those of the plan."""
import doctest
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import timm_epfs
from timm_epfs.cli import main
from timm_epfs.core import PruningError, format_count
from timm_epfs.importance import Curve, Sensitivity
from timm_epfs.report import charts, html_report, sensitivity_section, top1, write_page
from timm_epfs.training.run_page import _MOST_COLUMNS, write_run_page
from timm_epfs.training.run_pictures import mask_histogram

VOID = {'meta', 'wbr', 'br', 'img', 'link', 'input', 'hr'}
LOADS = {'href', 'src', 'srcset', 'action', 'data', 'poster', 'xlink:href', 'background'}


class Page(HTMLParser):
    """A page taken apart. It raises where tags don't match.

    Attributes:
        tags: Name and attributes of every tag.
        cells: Texts of the cells of each row of each table; ``|`` comes before what is in small print.
        figures: Texts of each of the large numbers, by label.
        text: All text but that of the style.
    """

    def __init__(self, path):
        super().__init__()
        self.tags, self.cells, self.figures, self.text, self._open = [], [], {}, '', []
        self.feed(path.read_text(encoding='utf-8'))
        self.close()
        assert self._open == []

    def handle_startendtag(self, tag, attrs):
        assert 'svg' in self._open  # elsewhere HTML has no such tags
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self._open.append(tag)
        if tag == 'tr':
            self.cells.append([])
        if tag in ('td', 'th'):
            self.cells[-1].append('')
        if tag == 'dt':
            self._label = ''

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == 'dt':
            self.figures[self._label] = []

    def handle_data(self, data):
        if 'style' in self._open:
            return
        self.text += data
        if 'td' in self._open or 'th' in self._open:
            self.cells[-1][-1] += ('|' if {'small', 'details'} & {*self._open} else '') + data.strip()
        if 'dt' in self._open:
            self._label += data
        if 'dd' in self._open:
            self.figures[self._label].append(data)


@pytest.fixture(scope='module')
def pruner():
    torch.manual_seed(0)
    return timm_epfs.Pruner('resnet20_cifar', kinds=['channels', 'blocks'])


@pytest.fixture(scope='module')
def cuts(pruner):
    return [pruner(macs=share, criterion='l1') for share in (0.7, 0.5)]


@pytest.fixture(scope='module')
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8))]


def test_a_page_loads_nothing_and_runs_nothing(pruner, cuts, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_epfs.report.html_page._SECONDS', 0.02)
    page = Page(html_report(tmp_path / 'page.html', pruner, cuts))
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert text.startswith('<!DOCTYPE html>\n') and not re.search('https?:|//|url\\(|@import', text)
    assert not [(tag, attrs) for tag, attrs in page.tags if tag == 'script' or LOADS & attrs.keys()]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith('on')]
    metas = [attrs for tag, attrs in page.tags if tag == 'meta']
    assert {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'} in metas
    assert any("default-src 'none'" in attrs['content'] for attrs in metas if 'http-equiv' in attrs)
    assert 'prefers-color-scheme: dark' in text and 'latency, ms' in page.text


def test_its_numbers_are_those_of_the_plans(pruner, cuts, batches, tmp_path):
    page = Page(html_report(tmp_path / 'page.html', pruner, cuts, data=batches, latency=False))
    rows = {row[0].split('|')[0]: row[1:] for row in page.cells}
    costs = [cut.pruning_plan.cost['macs'] for cut in cuts]
    changes = [f'{format_count(after)}|{100 * (after / before - 1):+.1f} %' for before, after in costs]
    assert rows['MACs'] == [format_count(pruner.cost('macs')), *changes]
    accuracy = top1([pruner.model, *cuts], batches)
    assert [float(cell.split('|')[0]) for cell in rows['top-1, %']] == pytest.approx(accuracy, abs=0.005)
    for column, slim in enumerate(cuts):
        gone = slim.pruning_plan.removed_blocks()
        for cut in slim.pruning_plan.cuts:
            name, is_block = cut.structure.name, cut.structure.kind == 'blocks'
            left = 'gone' if any(f'{name}.'.startswith(f'{block}.') for block in gone) else str(len(cut.keep))
            assert (is_block and name not in rows) or rows[name][column] == left
        assert gone and all(name in rows for name in gone)
    assert 'latency' not in page.text


def test_coupled_layers_share_a_row(pruner, cuts, tmp_path):
    page = Page(html_report(tmp_path / 'page.html', pruner, cuts[0], latency=False))
    stem, = (row[0] for row in page.cells if row[0].startswith('conv1|'))
    assert all(name in stem for name in ('layer1.0.conv2', 'layer3.2.conv2'))
    assert not any(row[0].startswith('layer1.0.conv2|') for row in page.cells)
    assert page.figures['MACs'][0].startswith('-') and '→' in page.figures['MACs'][1]


def test_accuracy_is_drawn_over_the_budgets(pruner, cuts, batches, tmp_path):
    page = Page(html_report(tmp_path / 'page.html', pruner, cuts, data=batches, latency=False))
    dots = sorted(float(attrs['cx']) for tag, attrs in page.tags if tag == 'circle')
    shares = sorted([1.0, *(cut.pruning_plan.cost['macs'][1] / pruner.cost('macs') for cut in cuts)])
    zero, whole = 46, 350  # the ends of the axis
    assert dots == pytest.approx([zero + share * (whole - zero) for share in shares], abs=0.06)


def test_names_are_escaped_and_the_same_content_gives_the_same_bytes(tmp_path):
    evil = '<img src=x onerror="alert(1)">&amp;'
    curve = Curve(torch.arange(4).numpy(), (1, 2, 3), (0.1, 0.2, 0.4), (0.1,) * 3, (1.0,) * 3, (float('nan'),) * 3)
    section = sensitivity_section(Sensitivity({evil: curve}, 8, float('nan')))
    files = [tmp_path / name for name in ('a.html', 'b.html')]
    for file in files:
        write_page(file, evil, evil, [section])
    page = Page(files[0])
    assert page.text.count(evil) == 4 and 'img' not in dict(page.tags)
    assert files[0].read_bytes() == files[1].read_bytes()
    name, _, *numbers = page.cells[-1]
    assert name.endswith('|4 units') and numbers == ['0.2', '100.0 %']


def test_a_run_shows_its_epochs_and_its_masks(cuts, tmp_path):
    epochs = 2 * _MOST_COLUMNS
    history = [{'epoch': 1, 'phase': 'dense', 'train_top1': 10.0, 'eval_top1': 20.0, 'alive': 1.0}]
    history += [
        {**history[0], 'epoch': i + 2, 'phase': 'sparse', 'alive': 1 - 0.5 * i / epochs, 'lambda': 0.1 / (i + 1)}
        for i in range(epochs)]
    history.append({'epoch': epochs + 1, 'phase': 'cut', 'eval_top1': 15.0, 'alive': 0.5})
    masks = [mask_histogram([[0.0, 0.5, 1.5 * (i + 1)]]) for i in range(epochs)]
    rows = {'MACs': ((4.0, 2.0), str), 'top-1, %': ((90.0, 91.5), '{:.2f}'.format)}
    options = {'model': 'net', 'method': 'epfs'}
    write_run_page(tmp_path / 'a.html', options, rows, 'on digits', history, masks, cuts[0].pruning_plan)
    page = Page(tmp_path / 'a.html')
    assert page.figures['top-1, %'] == ['+1.50', '90.00 → 91.50'] and 'On digits.' in page.text
    cells = [attrs for tag, attrs in page.tags if tag == 'rect' and attrs['class'] == 'cell']
    assert len(cells) == 2 * _MOST_COLUMNS  # two of the three masks aren't zero
    assert 'Masks over time' in page.text and 'sparse phase' in page.text
    write_run_page(tmp_path / 'b.html', {**options, 'method': 'none'}, rows, '', history[:1], [], cuts[0].pruning_plan)
    text = Page(tmp_path / 'b.html').text
    assert 'Masks over time' not in text and 'in one shot' in text


@pytest.mark.parametrize('path, pruned, message', [
    ('page.htm', None, 'only .html is written'),
    ('none/page.html', None, 'there is no folder'),
    ('page.html', nn.Linear(1, 1), 'Linear has no pruning_plan'),
    ('page.html', [], 'no pruned model was given'),
    ('page.html', timm_epfs.rebuild(timm_epfs.Plan('resnet18', {}, ())), "doesn't say what its cut costs"),
])
def test_what_can_not_be_written_gets_one_line(pruner, cuts, tmp_path, path, pruned, message):
    with pytest.raises(PruningError, match=message) as e:
        html_report(tmp_path / path, pruner, cuts if pruned is None else pruned)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_the_commands_write_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_epfs.cli.prune_command.latencies', lambda models, images: [4.0, 3.0])
    page, out = tmp_path / 'page.html', tmp_path / 'out'
    assert main(['prune', 'test_resnet', '--macs', '0.5', '-o', str(out), '--report', str(page)]) == 0
    figures = Page(page).figures
    printed = dict(re.findall(r'^(\S.*?)  +(.*)$', capsys.readouterr().out, flags=re.M))
    assert 'Weights: random' in Page(page).text and figures['latency, ms'] == ['-25.0 %', '4.00 → 3.00']
    assert printed['MACs'].startswith('  '.join(figures['MACs'][1].split(' → ')))
    assert main(['prune', 'test_resnet', '--macs', '0.5', '-o', str(tmp_path / 'b'), '--report', 'page.pdf']) == 2
    assert '--report page.pdf was given, only .html is written' in capsys.readouterr().err
    run = ['train', 'resnet20_cifar', '--dataset', 'digits', '--method', 'none', '--macs', '0.5', '--epochs', '0']
    assert main([*run, '-o', str(tmp_path / 'run'), '--report', str(tmp_path / 'run' / 'page.html')]) == 2
    assert 'is in the folder of the run; call it report.html' in capsys.readouterr().err


def test_ticks_are_round_and_inside():
    assert doctest.testmod(charts).failed == 0
    for low, high in ((0, 1), (0.1, 0.12), (-3, 1e6), (5, 5.001)):
        axis = charts.Axis('', low, high)
        values = [value for value, _ in axis.ticks]
        assert 3 <= len(values) <= 8 and low <= min(values) and max(values) <= high
    flat = charts.axis_of('', [7.0])
    assert flat.low < 7 < flat.high and charts.axis_of('', [], is_log=True).low > 0
