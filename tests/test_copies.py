"""Whatever a model holds: it is copied, or the error names what stands in the way; and modes and hooks stay."""
import threading

import pytest
import torch
import torchvision
from helpers import distance
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm_epfs
from timm_epfs.core import PruningError, clone_tensor, deep_copy, eval_mode
from timm_epfs.pruner import trace_model
from timm_epfs.trace import meta_copy
from timm_epfs.trace.copies import call_site, lies_in

IMAGE = torch.randn(1, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions and a classifier, and whatever else it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 5)
        vars(self).update(attributes)

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


class Holder:
    """An object of the user's own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def prune(model, example=IMAGE):
    slim = timm_epfs.prune(model, macs=0.5, example_input=example)
    dense, left = slim.pruning_plan.cost['macs']
    assert abs(left / dense - 0.5) < 0.02
    return slim


# -- what can be copied ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('held', [
    threading.Lock(), threading.RLock(), threading.Condition(), torch, torch.Generator(),
    [Holder(lock=threading.Lock())], torch.jit.trace(torch.relu, IMAGE), Holder(layer=nn.Linear(2, 2)),
    Holder(rates=torch.tensor([0.5, 1.0])),
], ids=lambda held: type(held).__name__)
def test_a_model_may_hold_what_python_cannot_copy(held):
    slim = prune(Net(held=held))
    assert type(slim.held) is type(held)
    if isinstance(held, type(threading.Lock())):
        assert slim.held is not held


def test_a_model_may_hold_what_an_earlier_forward_left():
    model = Net()
    out = model(IMAGE)
    vars(model).update(last=out, outputs=[{'logits': out}], holder=Holder(out=out))
    slim = prune(model)
    assert not slim.holder.out.requires_grad and torch.equal(slim.holder.out, out)
    assert model.last is out and out.requires_grad


@pytest.mark.parametrize('held, named', [
    ((i for i in range(3)), 'second.held is a generator'),
    ([0, Holder(inside={'key': (i for i in range(3))})], 'second.held.1.inside.key is a generator'),
], ids=['attribute', 'nested'])
def test_an_attribute_that_cannot_be_copied_is_named(held, named):
    model = Net()
    model.second.held = held
    with pytest.raises(PruningError, match=named):
        prune(model)


def test_a_module_that_cannot_be_traced_is_named():
    model = Net()
    model.second = torch.jit.script(model.second)
    with pytest.raises(PruningError, match='^second is a TorchScript module'):
        prune(model)
    model.second = nn.LazyConv2d(16, 3)
    with pytest.raises(PruningError, match='^second.weight of a lazy LazyConv2d has no shape yet'):
        prune(model)


def test_functions_on_modules_refer_to_the_copy():
    model = Net()
    plain = model.second.forward
    model.second.forward = lambda x: plain(x) + 1
    model.first.register_forward_hook(lambda module, args, out: out * model.fc.bias[0].abs())
    copied = deep_copy(model, clone_tensor).eval()
    with torch.no_grad():
        model.second.bias.fill_(7)
        model.fc.bias.fill_(7)
    assert distance(copied(IMAGE), model.eval()(IMAGE)) > 1e-3
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(IMAGE), model(IMAGE))
    prune(model)


class Recurrent(nn.Module):
    """An RNN, which keeps a list of its weights, and a norm by a hook, which keeps the weight that it made."""

    def __init__(self, kind):
        super().__init__()
        self.norm = nn.utils.spectral_norm(nn.Conv1d(4, 16, 1))
        self.rnn, self.fc = getattr(nn, kind)(16, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.rnn(self.norm(x).relu().transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize('kind', ['GRU', 'LSTM'])
def test_a_learner_exports_straight_after_training(kind):
    model, x, target = Recurrent(kind).train(), torch.randn(4, 4, 6), torch.tensor([0, 1, 2, 0])
    learner = timm_epfs.EPFS(model, macs=0.5, steps=2, example_input=x[:1], exclude=['norm'])  # not cut exactly
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        (nn.functional.cross_entropy(model(x), target) + learner.penalty(target)).backward()
        optimizer.step()
        learner.step()
    model.eval()
    slim = learner.export()
    with torch.no_grad():
        assert distance(model(x), slim(x)) < 1e-5
    slim.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.rnn.parameters())
    assert [id(weight) for weight in slim.rnn._flat_weights] == [id(weight) for weight in slim.rnn.parameters()]


# -- the example ----------------------------------------------------------------------------------------------------

class Image(torch.Tensor):
    """A subclass that stays one through all functions, and that can't be moved."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            raise RuntimeError('not to be moved')
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_example_of_a_subclass_is_as_good_as_a_tensor():
    model = Net()
    plain, own = (prune(model, example).pruning_plan for example in (IMAGE, IMAGE.as_subclass(Image)))
    assert plain.to_json() == own.to_json()
    assert prune(model, nn.Parameter(IMAGE)).pruning_plan.to_json() == plain.to_json()


# -- hooks ----------------------------------------------------------------------------------------------------------

SEEN = []


def watch(module, args, out):
    SEEN.append(out.numpy())


class Watcher:
    """Watches a module's inputs by a method."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, args):
        self.seen.append(args[0].numpy())

    def method(self, module, args, out):
        self(module, args)


def test_hooks_of_users_do_not_see_a_trace():
    seen, watcher, model = [], Watcher(), Net()
    model.first.register_forward_hook(lambda module, args, out: seen.append(out.numpy()))
    model.second.register_forward_hook(watch)
    model.second.register_forward_pre_hook(watcher)
    model.fc.register_forward_hook(watcher.method)
    with torch.nn.modules.module.register_module_forward_hook(watch):
        slim = prune(model)
    assert seen == SEEN == watcher.seen == []
    assert len(slim.first._forward_hooks) == len(model.first._forward_hooks) == 1


class WithHook(Net):
    """Needs what its own hook keeps."""

    def __init__(self):
        super().__init__()
        self.first.register_forward_hook(lambda module, args, out: self.keep(out))
        self.kept = []

    def keep(self, out):
        self.kept.append(out)

    def forward(self, x):
        logits = super().forward(x)
        return logits + self.kept.pop().mean()


def test_hooks_of_the_library_that_a_model_is_from_run_in_a_trace():
    """transformers collects hidden states by hooks, from the first forward on."""
    transformers = pytest.importorskip('transformers')
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], decoder_hidden_size=8,
        patch_sizes=[3, 3], strides=[2, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2], num_labels=3)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    images = torch.rand(1, 3, 16, 16)
    model(images)
    slim = timm_epfs.prune(model, macs=0.7, example_input=images)
    assert slim(images).logits.shape == model(images).logits.shape


def test_hooks_of_the_model_run_in_a_trace():
    model = WithHook()
    slim = prune(model)
    assert model.kept == [] and slim(IMAGE).shape == (1, 5) and model.kept == []

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(512, 2))
    model[0].register_forward_hook(lambda module, args, out: out[:, :4])
    assert prune(model)(IMAGE).shape == (1, 2)
    assert len(meta_copy(nn.utils.spectral_norm(nn.Linear(2, 2)))._forward_pre_hooks) == 1


# -- modes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('training', [False, True])
def test_a_feature_extractor_keeps_its_mode(training):
    model = torchvision.models.squeezenet1_1(num_classes=2)
    model = create_feature_extractor(model, ['features.4']).train(training)
    model.features.get_submodule('0').train(not training)
    slim = prune(model, torch.randn(1, 3, 32, 32))
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in slim.named_modules()} == modes
    assert slim.training == training and slim.graph is (slim.train_graph if training else slim.eval_graph)


def test_a_module_returns_to_its_mode_by_its_own_method():
    class Merged(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merged(2, 2), nn.BatchNorm1d(2).eval())
    with eval_mode(model):
        assert model[0].merged
    assert not model[0].merged and [module.training for module in model.modules()] == [True, True, False]


# -- the line of the model's code -----------------------------------------------------------------------------------

def test_code_in_a_folder_named_torch_is_not_torchs(tmp_path):
    """A fixed number holds one convolution's width. Only that line is left alone, if lines are told apart."""
    code = '\n'.join([
        'from torch import nn',
        'class Net(nn.Module):',
        '    def __init__(self):',
        '        super().__init__()',
        '        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)',
        '        self.c, self.d = nn.Conv2d(16, 16, 1), nn.Linear(16, 2)',
        '    def forward(self, x):',
        '        x = self.b(self.a(x).view(1, 16, -1, 1))',
        '        x = self.c(x)',
        '        return self.d(x.mean(2).view(1, -1))',
    ])
    found = []
    for folder in (tmp_path / 'other', tmp_path / 'torch'):
        folder.mkdir()
        path = folder / 'net.py'
        names = {}
        exec(compile(code, str(path), 'exec'), names)
        traced = trace_model(names['Net'](), IMAGE)
        found.append([s.name for s in traced.structures])
        assert [skipped.where for skipped in traced.skipped] == [f'{path}:8']
    assert found[0] == found[1] == ['b', 'c']


def test_paths_are_compared_by_folders(monkeypatch):
    assert lies_in('/env/torch/nn/functional.py', '/env/torch') and not lies_in('/env/torchvision/ops.py', '/env/torch')
    assert not lies_in('/home/torch/net.py', '/env/torch')
    import ntpath
    monkeypatch.setattr('timm_epfs.trace.copies.os.path', ntpath)
    assert lies_in(r'c:\Env\Torch\nn\functional.py', r'C:\env\torch')
    assert not lies_in(r'C:\torch\net.py', r'C:\env\torch')
    assert call_site()[0].endswith('.py')
