"""Where torch-pruning's DependencyGraph handles a model, its coupled channels and ours are the same sets."""
from typing import FrozenSet, Iterator, Set, Tuple

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_epfs.pruner import example_for, trace_model

Entry = Tuple[str, int, int]  # tensor, dim, index

# residual adds, bottlenecks, depthwise and gates, concatenation, a chain with a flatten, layer scale, plain blocks
MODELS = (
    'resnet18', 'resnet50', 'seresnet50', 'mobilenetv2_050', 'mobilenetv3_small_050', 'efficientnet_b0', 'densenet121',
    'vgg11_bn', 'repvgg_a0', 'dla34', 'hrnet_w18_small', 'inception_v3', 'resnetv2_18',
)


def units(structures) -> Iterator[FrozenSet[Entry]]:
    for s in structures:
        for u in range(s.units):
            yield frozenset((m.tensor, m.dim, i) for m in s.members for i in m.index[u].tolist())


def entries(name: str, module: nn.Module, out: bool, index: int) -> Iterator[Entry]:
    """What torch-pruning cuts of a module when it prunes one of its channels."""
    if isinstance(module, _BatchNorm):
        vectors = ('weight', 'bias', 'running_mean', 'running_var')
    elif out:
        yield f'{name}.weight', 0, index
        vectors = ('bias',)
    else:
        yield f'{name}.weight', 1, index
        vectors = ()
    for vector in vectors:
        if getattr(module, vector) is not None:
            yield f'{name}.{vector}', 0, index


def coupled(model: nn.Module, image: torch.Tensor) -> Set[FrozenSet[Entry]]:
    """torch-pruning's units, but the classifier's outputs."""
    graph = tp.DependencyGraph().build_dependency(model, image)
    names = {module: name for name, module in model.named_modules()}
    found = set()
    for group in graph.get_all_groups(ignored_layers=[model.get_classifier()]):
        unit = {}
        for item in group:
            module = item.dep.target.module
            if module not in names or not any(True for _ in module.parameters(recurse=False)):
                continue
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            for index, root in zip(item.idxs, item.root_idxs):
                unit.setdefault(root, set()).update(entries(names[module], module, out, index))
        found.update(map(frozenset, unit.values()))
    return found


@pytest.mark.parametrize('name', MODELS)
def test_units_are_torch_prunings(name):
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    (image,), _ = example_for(model)
    traced = trace_model(model)
    ours = set(units(s for s in traced.structures if s.kind == 'channels'))
    theirs = coupled(model, image)
    assert len(ours) > 500
    assert ours == theirs
