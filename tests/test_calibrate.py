"""Recalibrated statistics against the moments of the activations themselves."""
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from timm_epfs.core import PruningError
from timm_epfs.surgery import recalibrate_bn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3, momentum=0.3)
        self.drop = nn.Dropout(0.9)
        self.second = BatchNormAct2d(3, momentum=0.2, drop_layer=lambda: nn.Dropout(0.9))
        self.third = nn.BatchNorm2d(3)
        self.unused = nn.BatchNorm2d(3)
        for norm in (self.first, self.second, self.third, self.unused):
            nn.init.normal_(norm.running_mean)
            norm.num_batches_tracked.fill_(7)

    def forward(self, x):
        return self.third(self.second(self.drop(self.first(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches():
    return [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]


def moments(batches):
    """Average over the batches of each batch's mean and unbiased variance."""
    means = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in batches]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    return means, variances


def standardised(x):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt()


def test_moments_of_every_layer_without_dropout(net, batches):
    net.train()
    assert recalibrate_bn(net, batches) is net
    second = [standardised(x) for x in batches]
    third = [standardised(x).relu() for x in second]
    for norm, seen in ((net.first, batches), (net.second, second), (net.third, third)):
        mean, var = moments(seen)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-5)
        assert norm.num_batches_tracked == 3


def test_tuples_and_limit(net, batches):
    seen = []

    def loader():
        for x in batches:
            seen.append(x)
            yield x, torch.zeros(8)

    recalibrate_bn(net, loader(), batches=2)
    torch.testing.assert_close(net.first.running_mean, moments(batches[:2])[0])
    assert len(seen) == 2


def test_everything_else_is_left_alone(net, batches):
    net.train()
    net.second.eval()
    modes = [module.training for module in net.modules()]
    unused = {key: value.clone() for key, value in net.unused.state_dict().items()}
    recalibrate_bn(net, batches)
    assert [module.training for module in net.modules()] == modes
    assert (net.first.momentum, net.second.momentum) == (0.3, 0.2)
    assert all(torch.equal(value, unused[key]) for key, value in net.unused.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize('loader, limit', [([], None), ([torch.randn(8, 3, 4, 4)], 0), ([torch.randn(8, 3, 4, 4)], -1)])
def test_no_batch_leaves_statistics(net, loader, limit):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(PruningError, match='no batch'):
        recalibrate_bn(net, loader, batches=limit)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_failing_loader_leaves_statistics(net, batches):
    def loader():
        yield batches[0]
        raise OSError('disk')

    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(OSError):
        recalibrate_bn(net, loader())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.first.momentum == 0.3 and all(module.training for module in net.modules())


def test_model_without_batch_norm():
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match='no BatchNorm'):
        assert recalibrate_bn(model, []) is model
