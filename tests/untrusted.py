"""What the tests of untrusted data share: plans to spoil, and what a refusal may cost."""
import functools
import gc
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from timm_epfs import prune

SMALL = 'resnet20_cifar'
SECONDS, MEGABYTES = 1.0, 200  # the slowest takes 0.2 s of a processor, which may have a busy neighbour


def line(error):
    """The message of a refusal: one line that a terminal can show."""
    text = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert text.isprintable() and len(text) < 1000, text
    return text


@contextmanager
def soon():
    """The block takes no longer than it may."""
    gc.disable()  # to look through all that the tests before have made takes longer than any block
    try:
        started = time.process_time()
        yield
        assert time.process_time() - started < SECONDS
    finally:
        gc.enable()


@contextmanager
def small():
    """The block doesn't raise the process's peak memory by more than may be."""
    try:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
    except OSError:
        pytest.skip('peak memory is read from /proc, which this system does not have')
    before = _memory('VmRSS')
    yield
    assert _memory('VmHWM') - before < MEGABYTES


def _memory(field):
    status = dict(entry.split(':', 1) for entry in Path('/proc/self/status').read_text().splitlines())
    return int(status[field].split()[0]) / 1024


@functools.cache
def seeds():
    """Plans as JSON values: of channels, of groups and blocks, of heads and streams."""
    models = [
        prune('resnet18', macs=0.5),
        prune('mobilenetv2_035', macs=0.6, kinds=('blocks', 'channels')),
        prune('test_vit', macs=0.6, kinds=('blocks', 'heads', 'channels')),
        prune(SMALL, macs=0.5, kinds=('blocks', 'channels'), num_classes=3),
    ]
    return [model.pruning_plan.to_dict() for model in models]


def elements(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())


def nested(depth, wrap=lambda value: [value]):
    return functools.reduce(lambda value, _: wrap(value), range(depth), 0)
