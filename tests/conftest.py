import os

os.environ['HF_HUB_OFFLINE'] = '1'  # read when huggingface_hub is first imported

import copy
import random

import numpy as np
import pytest
import torch
from timm.models import _registry

# Many small operations: two threads wait for each other longer than they work.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        '--device', default='cuda', help='device of the tests marked gpu, which are skipped where there is none')


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """A busy machine is slow: what a test expects on stderr must not depend on it."""
    monkeypatch.setattr('timm_epfs.core.progress_bar.DELAY', 600.0)


@pytest.fixture(autouse=True)
def same_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """What a test adds to timm's registry goes with it."""
    stores = [store for key, store in vars(_registry).items()
              if isinstance(store, (dict, set)) and not key.startswith('__')]
    kept = copy.deepcopy(stores)
    yield
    for store, before in zip(stores, kept):
        store.clear()
        store.update(before)
