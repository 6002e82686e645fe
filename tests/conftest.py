import os

os.environ['HF_HUB_OFFLINE'] = '1'  # read when huggingface_hub is first imported

import random

import numpy as np
import pytest
import torch

# Many small operations: two threads wait for each other longer than they work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """A busy machine is slow: what a test expects on stderr must not depend on it."""
    monkeypatch.setattr('timm_epfs.progress.DELAY', 600.0)


@pytest.fixture(autouse=True)
def same_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
