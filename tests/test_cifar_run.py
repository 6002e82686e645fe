"""Which experiments of the comparison on CIFAR-10 are run, and what they start from."""
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CIFAR10 = Path(__file__).parents[1] / 'benchmarks' / 'cifar10'
DENSE, L1 = 'resnet20_cifar/dense-0', 'resnet20_cifar/l1-50-0'


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an experiment without training; returns the names of what was run, in order."""
    monkeypatch.setattr(sys, 'path', [str(CIFAR10), *sys.path])
    modules = ('run', 'baselines', 'data', 'common')
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run as script

    threads = torch.get_num_threads()
    done = []

    def train(args, experiment, name, seed, images):
        done.append(name)
        if 'weights' in experiment:
            weights = args.runs / name / 'dense.safetensors'
            weights.parent.mkdir(parents=True, exist_ok=True)
            save_file({'weight': torch.tensor([1 / 3]), 'steps': torch.tensor(7)}, weights)
        else:
            assert script._start(args, experiment, 'resnet20_cifar').is_file()
        return {'name': name}

    def main(*patterns):
        done.clear()
        monkeypatch.setattr(sys, 'argv', [
            'run.py', *patterns, '--data-dir', '.', '--runs', str(tmp_path / 'runs'), '--results', str(tmp_path)])
        script.main()
        return list(done)

    monkeypatch.setattr(script, '_run', train)
    monkeypatch.setattr(script, 'load', lambda *_: {})
    yield main
    torch.set_num_threads(threads)
    for name in modules:
        sys.modules.pop(name, None)


def test_the_dense_baseline_comes_first_and_what_has_a_result_is_left_out(run):
    assert run('resnet20_cifar/l1-50') == [DENSE, L1]
    assert run('resnet20_cifar/l1-50') == run('resnet20_cifar/dense') == []


def test_the_dense_weights_are_kept_beside_their_result_in_half_precision(run, tmp_path):
    run('resnet20_cifar/dense')
    kept = load_file(tmp_path / f'{DENSE}.safetensors')
    assert kept['weight'].dtype == torch.float16 and kept['steps'] == 7


def test_lost_dense_weights_are_trained_again_for_what_has_no_result_and_for_nothing_else(run, tmp_path):
    run('resnet20_cifar/l1-50')
    (tmp_path / f'{DENSE}.safetensors').unlink()
    assert run('resnet20_cifar/l1-50') == []
    (tmp_path / f'{L1}.json').unlink()
    assert run('resnet20_cifar/l1-50') == [DENSE, L1]
