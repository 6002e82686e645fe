"""Two processes hold the same masks, bit for bit, and those of one process on the joined batch."""
import os
import socket

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import forkserver
from safetensors.numpy import load_file, save_file

import timm_epfs
from timm_epfs.latency import device_latency, timings

STEPS, BATCH, CLASSES = 8, 8, 5
FIRST = ('learner', 'wrapper')


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, 32, 32, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)


def run(path, rank=0, world=1, first='learner'):
    """Train on every ``world``-th image from ``rank`` on and write masks and centres after each step."""
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=CLASSES, img_size=32)
    model.train()

    def wrap():
        return torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model

    wrapped = wrap() if first == 'wrapper' else None
    learner = timm_epfs.EPFS(wrapped or model, macs=0.7, steps=STEPS, center=0.01)
    wrapped = wrapped or wrap()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    seen = {}
    for step in range(STEPS):
        images, target = (part[rank::world] for part in batch(step))
        (F.cross_entropy(wrapped(images), target) + learner.penalty(target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.step()
        state = learner.state_dict()
        seen.update({f'{key}.{step}': state[key].numpy().copy() for key in ('solver.x', 'solver.y', 'center.centers')})
    save_file(seen, f'{path}/{first}{rank}of{world}.safetensors')


def learn_a_latency(path, rank):
    """Select by clocks that say something else in each process, and write what was selected and how often they ran."""
    timed = []

    def time_call(call, device):
        timed.append('call')
        return 1e-6 * (rank + 1) * call()[0].numel()

    def least_seconds(models, args, kwargs):
        timed.append('model')
        return [1e-9 * (sum(p.numel() for p in model.parameters()) + 10000 * rank) for model in models]

    torch.manual_seed(0)
    os.environ['TIMM_EPFS_CACHE'] = f'{path}/cache{rank}'
    timings.time_call, device_latency.least_seconds = time_call, least_seconds
    learner = timm_epfs.OneShot(timm.create_model('resnet20_cifar'), latency=0.6, steps=1, kinds=['filters'])
    learner.penalty().backward()
    learner.step()
    kept = {cut.structure.name: cut.keep for cut in learner.plan().cuts}
    counts = {f'timed {what}': np.array(timed.count(what)) for what in ('call', 'model')}
    save_file({**kept, **counts, 'share': np.array(learner.selector.budget.value)}, f'{path}/latency{rank}.safetensors')


def worker(rank, path, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    for first in FIRST:
        run(path, rank, 2, first)
    learn_a_latency(path, rank)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    """A folder with what each of two processes saw, and one by itself."""
    folder = tmp_path_factory.mktemp('seen')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    forkserver()
    mp.start_processes(worker, args=(str(folder), port), nprocs=2, start_method='forkserver')
    for first in FIRST:
        run(str(folder), first=first)
    return folder


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch without gloo')
@pytest.mark.parametrize('first', FIRST)
def test_two_processes_are_one(seen, first):
    one, left, right = (load_file(seen / f'{first}{name}.safetensors') for name in ('0of1', '0of2', '1of2'))
    assert len(one) == 3 * STEPS and one[f'solver.x.{STEPS - 2}'].min() < 0.95
    for key in one:
        assert np.array_equal(left[key], right[key]), key
        # Sums in another order make 1e-5; sums over one process alone, 1e-2 and more.
        np.testing.assert_allclose(left[key], one[key], atol=1e-3, err_msg=key)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='torch without gloo')
def test_the_first_process_measures_latencies_for_all(seen):
    first, second = (load_file(seen / f'latency{rank}.safetensors') for rank in (0, 1))
    assert first.pop('timed call') > 10 and first.pop('timed model') > 1
    assert second.pop('timed call') == second.pop('timed model') == 0
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
