"""Rows, least squares and lockstep against torch's own functions and numpy."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_epfs.activations import (
    Lockstep,
    Sums,
    Watch,
    fast_format,
    image_batches,
    list_readers,
    places_to_join,
    solve_ridge,
)
from timm_epfs.core import PruningError

LAYERS = {
    'linear': (nn.Linear(6, 4), (3, 6)),
    'linear of tokens': (nn.Linear(6, 4), (3, 5, 6)),
    'linear of a map': (nn.Linear(6, 4), (3, 5, 7, 6)),
    'without bias': (nn.Linear(6, 4, bias=False), (3, 6)),
    'conv1d': (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    'conv2d': (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 4, 9, 8)),
    'pointwise': (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
    'grouped': (nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 5, 5)),
    'depthwise': (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 5, 5)),
    'same': (nn.Conv2d(4, 6, 4, padding='same', dilation=2), (3, 4, 9, 8)),
    'valid': (nn.Conv2d(4, 6, 4, padding='valid'), (3, 4, 9, 8)),
    'reflected': (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (3, 4, 9, 8)),
    'conv3d': (nn.Conv3d(2, 3, 3, padding=1), (3, 2, 4, 5, 6)),
    'transposed': (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 4)),
    'transposed, grouped': (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, dilation=2), (3, 4, 5, 4)),
    'transposed 1d': (nn.ConvTranspose1d(4, 6, 4, stride=3), (3, 4, 5)),
}


def watched(model, inputs):
    """All calls of a forward, with what they returned."""
    seen = []

    def handler(name, call, run):
        seen.append((name, call, run()))
        return seen[-1][-1]

    with torch.no_grad(), Watch(model, len(inputs), handler):
        model(inputs)
    return seen


@pytest.mark.parametrize('layer, shape', LAYERS.values(), ids=LAYERS)
def test_rows_times_weight_are_the_outputs(layer, shape):
    torch.manual_seed(0)
    (name, call, output), = watched(layer, torch.randn(shape))
    assert name == 'weight'
    at = torch.randperm(call.positions)[:3].sort().values
    last = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
    flat = output.movedim(last, -1).reshape(shape[0], -1, output.shape[last])
    torch.testing.assert_close(call.outputs(call.rows(at)), flat[:, at])
    assert call.rows(at).shape[:3] == (call.groups, shape[0], len(at))
    assert call.grouped(flat).shape == (call.groups, shape[0], call.positions, output.shape[last] // call.groups)
    assert call.weight_of(call.matrix(call.weight)).equal(call.weight)


def test_images_of_windows_stay_apart():
    """Swin's windows: each image has several entries of the first dim."""
    (_, call, _), = watched_windows()
    assert call.positions == 4 * 5
    assert call.rows(torch.tensor([0])).squeeze().tolist() == [[0.0, 0.0], [1.0, 1.0]]


def watched_windows():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(2, 3)

        def forward(self, x):
            return self.proj(x.repeat_interleave(4, 0).expand(8, 5, 2))

    return watched(Windows(), torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]))


def test_changed_weights_are_not_taken_for_the_parameter():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert not watched(layer, torch.randn(2, 3))


def test_readers_know_the_norm_behind_them_and_what_is_shared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.last, self.twice = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.twice(self.twice(self.last(self.bn(self.conv(x)).relu())))

    readers, shared = list_readers(Net().eval(), torch.randn(1, 3, 2, 2))
    assert list(readers) == ['conv.weight', 'bn.running_mean', 'last.weight']
    assert readers['conv.weight'].norm == 'bn.running_mean' and not readers['last.weight'].norm
    assert readers['bn.running_mean'].is_norm and not readers['conv.weight'].is_norm
    assert shared == ['twice.weight']


def sums_of(x, r):
    sums = Sums()
    for part in (slice(0, 7), slice(7, None)):
        sums.add(torch.from_numpy(x[None, part]), torch.from_numpy(r[None, part]))
    return sums


@pytest.mark.parametrize('intercept', [False, True])
def test_ridge_is_the_closed_form(intercept):
    random = np.random.default_rng(0)
    x = random.normal(1, 1, (200, 5))
    r = x @ random.normal(size=(5, 3)) + 2 + random.normal(size=(200, 3))
    matrix, shift = solve_ridge(sums_of(x[:150], r[:150]), sums_of(x[150:], r[150:]), intercept)
    mean_x, mean_r = (x.mean(0), r.mean(0)) if intercept else (0, 0)
    gram = (x - mean_x).T @ (x - mean_x)
    solutions = [
        np.linalg.solve(gram + 10.0 ** power * np.diag(gram).mean() * np.eye(5), (x - mean_x).T @ (r - mean_r))
        for power in range(-9, 2)
    ]
    distances = [np.abs(matrix[0].numpy() - solution).max() for solution in solutions]
    assert min(distances) < 1e-5
    expected = mean_r - mean_x @ matrix[0].numpy() if intercept else np.zeros(3)
    np.testing.assert_allclose(shift[0].numpy(), expected, atol=1e-5)


def test_ridge_takes_the_penalty_that_is_best_on_the_held_out_rows():
    """With many features and few rows, a small penalty fits noise."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(60, 2)) / 8

    def rows(count):
        x = random.normal(size=(count, 60))
        return x, x @ weight + random.normal(size=(count, 2))

    fit, held_out = sums_of(*rows(40)), sums_of(*rows(4000))
    matrix, _ = solve_ridge(fit, held_out, centred=False)
    assert held_out.error(matrix) < held_out.error(torch.zeros_like(matrix))
    assert matrix.abs().mean() < 0.9 * np.abs(weight).mean()  # shrunk


def test_ridge_leaves_noise_alone():
    random = np.random.default_rng(0)
    x, r = random.normal(size=(400, 30)), random.normal(size=(400, 2))
    assert solve_ridge(sums_of(x[:40], r[:40]), sums_of(x[40:], r[40:]), centred=False) is None
    assert solve_ridge(sums_of(x, r), Sums(), centred=False) is None  # nothing to judge it on


def test_lockstep_takes_turns():
    events = []
    lockstep = Lockstep(lambda place: events.append(place))

    def task(number):
        events.append((number, 'a'))
        lockstep.meet(number, 'first')
        events.append((number, 'b'))
        lockstep.meet(number, 'second')
        events.append((number, 'c'))

    lockstep.run([task] * 3)
    assert events == [
        (0, 'a'), (1, 'a'), (2, 'a'), 'first', (0, 'b'), (1, 'b'), (2, 'b'), 'second', (0, 'c'), (1, 'c'), (2, 'c')]


@pytest.mark.parametrize('number', [0, 1, 2])
def test_lockstep_raises_what_a_task_raised(number):
    lockstep = Lockstep(lambda place: None)

    def task(own):
        lockstep.meet(own, 'first')
        if own == number:
            raise KeyError('reason')
        lockstep.meet(own, 'second')

    with pytest.raises(KeyError, match='reason'):
        lockstep.run([task] * 3)


def test_lockstep_lets_others_join():
    events = []

    def at_meeting(place):
        events.append(place)
        lockstep.join(3)

    lockstep = Lockstep(at_meeting)

    def task(number):
        if number < 2:
            lockstep.meet(number, 'first')
        events.append(number)
        lockstep.meet(number, 'second')

    lockstep.run([task] * 3, joined=2)
    assert events == ['first', 0, 1, 2, 'second']
    with pytest.raises(PruningError, match='its end and another layer come at the same time'):
        Lockstep(lambda place: None).run([lambda number: None] * 3, joined=2)


def test_batches_join_where_there_is_room():
    mega = 2 ** 19
    assert places_to_join([16 * mega, 8 * mega, 16 * mega], [64, 64, 1]) == [0, 0]  # the last one never fits
    assert places_to_join([16 * mega, 8 * mega, 4 * mega], [100, 100, 100, 100, 200]) == [0, 1, 2, 2]
    assert places_to_join([1000 * mega, 0], [1, 64, 64]) == [0, 0, 1]  # 64 images are held in any case


def test_lockstep_refuses_other_ways():
    lockstep = Lockstep(lambda place: None)
    with pytest.raises(PruningError, match='another way for other images: first and second'):
        lockstep.run([lambda n: lockstep.meet(n, 'first'), lambda n: lockstep.meet(n, 'second')])
    with pytest.raises(PruningError, match='another way for other images: first and its end'):
        lockstep.run([lambda n: lockstep.meet(n, 'first'), lambda n: None])


@pytest.mark.parametrize('data', [
    torch.ones(6, 3, 8, 8), [torch.ones(4, 3, 8, 8), torch.ones(2, 3, 8, 8)], [(torch.ones(6, 3, 8, 8), 'targets')],
    (batch for batch in [torch.ones(6, 3, 8, 8, dtype=torch.float64)]),
], ids=['tensor', 'list', 'tuples', 'stream'])
def test_images_come_in_many_forms(data):
    batches = image_batches(data, nn.Linear(2, 2), images=5)
    assert sum(map(len, batches)) == 5
    assert all(batch.dtype == torch.float32 and batch.shape[1:] == (3, 8, 8) for batch in batches)


def test_large_batches_are_split():
    assert [len(batch) for batch in image_batches(torch.ones(24, 3, 224, 224), nn.Linear(2, 2))] == [20, 4]


def test_the_fast_format_is_left_out_where_a_forward_needs_the_other():
    class Views(nn.Module):
        def forward(self, x):
            return x.view(len(x) * 3, 1, 4, 4)

    images = torch.rand(2, 3, 4, 4)
    assert fast_format(images, nn.Conv2d(3, 3, 1)) == torch.channels_last
    assert fast_format(images, nn.Conv2d(3, 3, 1), Views()) == torch.contiguous_format
    assert fast_format(torch.rand(2, 3, 4), nn.Linear(4, 4)) == torch.contiguous_format


def test_not_more_images_than_needed_are_read():
    def endless():
        while True:
            yield torch.ones(300, 1, 512, 32)

    assert sum(map(len, image_batches(endless(), nn.Linear(2, 2)))) == 1024


@pytest.mark.parametrize('data, message', [
    ([], 'found no images; give at least one batch'),
    (None, 'images of type NoneType were given; give a tensor'),
    ('folder', 'images of type str were given'),
    (3, 'images of type int were given'),
    ([{'pixel_values': torch.ones(2, 3, 4, 4)}], 'batch of type dict with the keys pixel_values; give tensors'),
    ([np.ones((2, 3, 4, 4))], 'batch of type ndarray; give tensors'),
    ([torch.ones(2, 3, 4, 4, dtype=torch.uint8)], 'dtype torch.uint8; convert them'),
    ([torch.ones(0, 3, 4, 4)], r'shape \(0, 3, 4, 4\), which has no images'),
    ([torch.full((2, 3, 4, 4), float('nan'))], 'not finite; look for NaN'),
    ((1 / 0 for _ in range(2)), "images can't be read: ZeroDivisionError"),
])
def test_what_is_no_image(data, message):
    with pytest.raises(PruningError, match=message):
        image_batches(data, nn.Linear(2, 2))


def test_batch_norm_is_seen():
    norm = nn.BatchNorm2d(3).eval()
    (name, call, _), = watched(norm, torch.ones(2, 3, 4, 4))
    assert name == 'running_mean' and call.running_var is norm.running_var


def test_functions_count_without_a_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return F.linear(x, self.kernel)

    assert [name for name, _, _ in watched(Net(), torch.ones(2, 3))] == ['kernel']
