"""The table that opens benchmarks/README.md: what each method costs, in accuracy, in training and in speed.

Every number comes from a committed result of comparison/run.py or training_free.py. ``readme.py`` puts the table in its
place.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Dict, Iterator, List, Optional, Sequence

from common import RESULTS
from training_free_table import lost, rows_by_cut, usual_images

HERE = Path(__file__).parent
MODELS = ('resnet20_cifar', 'resnet56_cifar')
COLUMNS = ('method', 'what to call', 'epochs: select + fine-tune', 'top-1 lost', 'speed-up', 'results')
MISSING = '–'


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: What people call it.
        call: What a user calls, in Markdown.
        experiments: Names of its experiments on each of ``MODELS``, None where there is none; of ``'.long/fpgm-50'``
            the folder is the model's with ``.long``.
        when: Whose top-1 is shown: ``'finetuned'``, or ``'cut'`` for the model before any fine-tuning.
    """
    name: str
    call: str
    experiments: Sequence[Optional[str]]
    when: str = 'finetuned'


METHODS = (
    Method('cut by FPGM, nothing after', "`prune(m, macs=0.5, criterion='fpgm')`", ('fpgm-50', 'fpgm-50'), 'cut'),
    Method('one-shot, FPGM', "`prune(m, macs=0.5, criterion='fpgm')`, fine-tune", ('fpgm-50', 'fpgm-50')),
    Method('one-shot, FPGM, cost-aware widths', "the same, `widths='cost'`", ('fpgm_neyman-50', None)),
    Method('one-shot, Taylor', "the same, `criterion='taylor', data=d`", ('taylor-50', None)),
    Method('one-shot, units drawn at random', "the same, `criterion='random'`", ('random-50', None)),
    Method('EPFS', '`EPFS(m, macs=0.5)`', ('epfs_filters-50', None)),
    Method(
        'EPFS, cost-aware widths', "`EPFS(m, macs=0.5, widths='cost')`",
        ('epfs_filters_neyman-50', 'epfs_filters_neyman-50')),
    Method(
        'EPFS, cost-aware widths, teacher, 30 epochs', '`timm-epfs train … --distill`',
        ('.long/epfs_filters_neyman_distill-50', None)),
    Method('BN-SFP', '`BNSFP(m, macs=0.5)`', ('bn_sfp_sparse4-50', 'bn_sfp-50')),
    Method('SFP', '`SFP(m, macs=0.5)`', ('sfp_sparse4-50', None)),
    Method('SSS', '`SSS(m, macs=0.5)`', ('sss_neurons-50', None)),
    Method(
        'blocks: one-shot, Taylor', "`prune(m, macs=0.5, criterion='taylor', data=d, kinds=['blocks'])`",
        (None, 'taylor_blocks-50')),
    Method('blocks: one-shot, FPGM', "the same, `criterion='fpgm'`", (None, 'fpgm_blocks-50')),
    Method('blocks: EPFS', "`EPFS(m, macs=0.5, kinds=['blocks'])`", ('epfs_blocks-50', 'epfs_blocks-50')),
    Method(
        'blocks: EPFS, last stage kept', "the same, `exclude=['layer3*']`", (None, 'epfs_blocks_last_whole-50')),
    Method(
        'blocks: EPFS, teacher, 30 epochs', '`timm-epfs train … --distill`', (None, '.long/epfs_blocks_distill-50')),
    Method('blocks: SSS', "`SSS(m, macs=0.5, kinds=['blocks'])`", ('sss_blocks-50', 'sss_blocks-50')),
)


def methods() -> str:
    """The table, in Markdown."""
    first, *rest = (_row(method) for method in METHODS)
    rows = [COLUMNS, ('---',) * len(COLUMNS), first, *_training_free(), *rest]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _row(method: Method) -> Sequence[str]:
    found = [_results(model, name) for model, name in zip(MODELS, method.experiments)]
    epochs = dict.fromkeys(_epochs(runs[0]) for runs in found if runs) if method.when == 'finetuned' else ['0']
    names = dict.fromkeys(f'`{name}`' for name in method.experiments if name)
    return (
        method.name, method.call, ' or '.join(epochs), ' / '.join(_lost(runs, method.when) for runs in found),
        ' / '.join(map(_speed_up, found)), ', '.join(names),
    )


def _training_free() -> Iterator[Sequence[str]]:
    """The rows of what ``training_free.py`` measured at half the MACs."""
    results = [json.loads((RESULTS / f'training_free_{model}.json').read_text()) for model in MODELS]
    for name, call, ranking, step in (
            ('the same, BatchNorm recalibrated', '`recalibrate_bn(slim, d)`', 'fpgm', 'bn'),
            ('the same, compensated', "`prune(m, macs=0.5, criterion='fpgm', data=d)`", 'fpgm', 'compensated'),
            ('the same, compensated, cost-aware widths', "the same, `widths='cost'`", 'fpgm, cost-aware widths',
             'compensated'),
            ('units and widths from images, compensated', '`prune(m, macs=0.5, data=d)`', 'obs, measured widths',
             'compensated')):
        values = [lost(found, rows_by_cut(found, usual_images(found))[ranking, 0.5], step) for found in results]
        yield name, call, '0', ' / '.join(_mean(seeds) for seeds in values), MISSING, '`training_free.py`'


def _results(model: str, experiment: Optional[str]) -> List[Dict[str, Any]]:
    """The results of all seeds."""
    if experiment is None:
        return []
    group, _, name = experiment.rpartition('/')
    folder = HERE / 'cifar10' / 'results' / f'{model}{group}'
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f'{name}-[0-9].json'))]


def _epochs(run: Dict[str, Any]) -> str:
    return f'{run["epochs"]["sparse"]} + {run["epochs"]["finetune"]}'


def _lost(runs: List[Dict[str, Any]], when: str) -> str:
    return _mean([run['top1']['dense'] - run['top1'][when] for run in runs])


def _mean(values: List[float]) -> str:
    if not values:
        return MISSING
    return f'{mean(values):.2f}' + (f' ({len(values)} seeds)' if len(values) > 1 else '')


def _speed_up(runs: List[Dict[str, Any]]) -> str:
    return f'{mean(run["latency_ms"][0] / run["latency_ms"][1] for run in runs):.1f}' if runs else MISSING
