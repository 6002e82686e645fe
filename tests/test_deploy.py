"""Pruned models go where their bases go: exporters, compilers, other number formats, EMA, DDP, fusion, features."""
import copy

import onnxruntime
import pytest
import timm
import torch
import torch.distributed as dist
from helpers import distance, randomise
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from timm.models import create_feature_extractor
from timm.utils import ModelEmaV3, reparameterize_model
from torch.fx.experimental.optimization import fuse
from torch.nn.parallel import DistributedDataParallel

import timm_epfs
from timm_epfs.deploy.export import trace_program, write_onnx

# One of each kind: name, image size, arguments that make it small.
KINDS = {
    'plain': ('vgg16_bn_cifar', 32, {}),
    'residual': ('test_resnet', 64, {}),
    'inverted residual with SE': ('test_efficientnet', 64, {}),
    'concatenation': ('densenet121', 64, {'growth_rate': 16, 'block_config': (2, 2, 2)}),
    'ConvNeXt': ('test_convnext', 64, {'depths': (1, 1, 1, 1)}),
    'ViT': ('test_vit', 64, {'img_size': 64, 'depth': 2}),
    'Swin': ('swin_tiny_patch4_window7_224', 56, {
        'img_size': 56, 'embed_dim': 48, 'depths': (2, 1), 'num_heads': (3, 6)}),
}
# What merges the branches, or the norms, of a model for inference: plain attributes that no forward reads are cut too.
MERGED = {
    'mobileone_s0': 64, 'repvgg_a0': 64, 'fastvit_t8': 64, 'fastvit_sa12': 64, 'repghostnet_050': 64,
    'levit_128s': 224, 'efficientvit_m0': 224,
}

# The order of float32 sums, which each engine and each processor has its own of, makes 1e-6; a mistake, 1e-2 and more.
TOLERANCE = 1e-4


class Pair:
    """A dense model, what was left of it, images, and what is left's outputs."""

    def __init__(self, name, size, args):
        torch.manual_seed(0)
        self.dense = randomise(timm.create_model(name, num_classes=10, **args)).eval().requires_grad_(False)
        self.images = torch.randn(3, 3, size, size)
        self.slim = timm_epfs.prune(self.dense, macs=0.5, streams=True, example_input=self.images[:1])
        self.expected = self.slim(self.images)


@pytest.fixture(scope='module')
def made():
    return {}


@pytest.fixture(params=KINDS)
def pair(request, made):
    if request.param not in made:
        made[request.param] = Pair(*KINDS[request.param])
    return made[request.param]


class Calibration(CalibrationDataReader):
    def __init__(self, images):
        self.batches = iter([{'images': images.numpy()}])

    def get_next(self):
        return next(self.batches, None)


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path)
    output, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)


def test_exported_onnx_and_int8_give_the_same_outputs(pair, tmp_path):
    program = trace_program(pair.slim, pair.images[:2], dynamic_batch=True)
    assert distance(pair.expected, program.module()(pair.images)) < TOLERANCE
    path, quantised = tmp_path / 'model.onnx', tmp_path / 'int8.onnx'
    write_onnx(program, path)
    assert distance(pair.expected, run_onnx(path, pair.images)) < TOLERANCE
    # Sums of 8-bit weights saturate on processors without VNNI, those of 7-bit ones on none.
    quantize_static(path, quantised, Calibration(pair.images), per_channel=True, reduce_range=True)
    assert 0 < distance(pair.expected, run_onnx(quantised, pair.images)) < 0.1


def test_compiles_in_one_graph(pair):
    torch.compiler.reset()
    compiled = torch.compile(pair.slim, fullgraph=True, backend='aot_eager')
    assert distance(pair.expected, compiled(pair.images)) < TOLERANCE


def test_inductor_compiles_in_one_graph():
    torch.compiler.reset()
    pair = Pair('test_vit', 32, {'img_size': 32, 'depth': 1})
    # What another processor left in the cache of graphs may not fit this one: it gave NaN.
    compiled = torch.compile(pair.slim, fullgraph=True, options={'fx_graph_cache': False})
    assert distance(pair.expected, compiled(pair.images)) < TOLERANCE


@pytest.mark.filterwarnings('ignore')
def test_torchscript_trace(pair):
    traced = torch.jit.trace(pair.slim, pair.images[:1], check_trace=False)
    assert distance(pair.expected, traced(pair.images)) < TOLERANCE


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    """Within some roundings of a number in it: one when it was measured, sixteen are allowed."""
    output = copy.deepcopy(pair.slim).to(dtype)(pair.images.to(dtype))
    assert output.dtype == dtype and 0 < distance(pair.expected, output.float()) < 16 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings('ignore')
def test_linear_layers_in_int8_by_torchao(made):
    quantization = pytest.importorskip('torchao.quantization')
    vit = made.setdefault('ViT', Pair(*KINDS['ViT']))
    slim = copy.deepcopy(vit.slim)
    quantization.quantize_(slim, quantization.Int8DynamicActivationInt8WeightConfig())
    assert 0 < distance(vit.expected, slim(vit.images)) < 0.05


def norms(model):
    """How many norms there are of the kind that torch.fx fuses: timm's own, with an activation, it leaves."""
    return sum(type(module) is torch.nn.BatchNorm2d for module in model.modules())


def test_norms_fuse_into_convolutions(pair):
    if not norms(pair.dense):
        pytest.skip('this model has no plain BatchNorm2d')
    fused = fuse(pair.slim)
    assert norms(pair.slim) - norms(fused) == norms(pair.dense) - norms(fuse(pair.dense)) > 0
    assert distance(pair.expected, fused(pair.images)) < TOLERANCE


@pytest.mark.parametrize('name', MERGED)
def test_branches_merge_exactly(name):
    pair = Pair(name, MERGED[name], {})
    merged = reparameterize_model(pair.slim)
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in pair.slim.parameters())
    assert distance(pair.expected, merged(pair.images)) < TOLERANCE
    again = reparameterize_model(timm_epfs.rebuild(pair.slim.pruning_plan).eval())
    assert [p.shape for p in again.parameters()] == [p.shape for p in merged.parameters()]


def test_features_by_node_are_those_of_the_modules(pair):
    node = [name for name, _ in pair.slim.named_children()][-3]
    seen = []
    with getattr(pair.slim, node).register_forward_hook(lambda module, args, out: seen.append(out)):
        pair.slim(pair.images)
    found = create_feature_extractor(pair.slim, [node])(pair.images)[node]
    assert torch.equal(found, seen[0])


def test_a_state_dict_goes_through_ema_into_a_rebuilt_model(pair):
    model = copy.deepcopy(pair.slim)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    ema.update(model)
    rebuilt = timm_epfs.rebuild(pair.slim.pruning_plan).eval()
    rebuilt.load_state_dict(ema.module.state_dict())
    assert torch.equal(rebuilt(pair.images), ema.module(pair.images))
    for (name, mean), before in zip(rebuilt.named_parameters(), pair.slim.parameters()):
        torch.testing.assert_close(mean, 1.25 * before, msg=name)


@pytest.fixture
def process_group(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip('torch without gloo')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_dict_goes_through_ddp(pair, process_group):
    model = copy.deepcopy(pair.slim).requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    assert torch.equal(wrapped(pair.images), pair.expected)
    wrapped(pair.images).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    other = DistributedDataParallel(timm_epfs.rebuild(pair.slim.pruning_plan).eval())
    other.load_state_dict(wrapped.state_dict())
    assert torch.equal(other(pair.images), pair.expected)
