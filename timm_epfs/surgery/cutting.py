"""Cut a model to a plan: the only module that changes the shapes of a model's tensors."""
from collections import OrderedDict
from typing import Dict, List, Mapping, Sequence, Set

import numpy as np
from torch import Tensor, nn

from ..core import distinct, named_tensors, set_modes
from ..plan import Plan, check_plan
from .attributes import attribute_misfits, refresh_encoders, refresh_shapes, repeated_sizes, set_attribute
from .tensors import cut_tensor, tensor_misfits, wrong_base

__all__ = ['apply_plan']


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Cut a model in place. The model is the caller's own copy; on any error it is as it was.

    Tied tensors are cut once and stay tied. Tensors of a layer that was replaced by ``nn.Identity`` (a classifier at
    ``num_classes=0``) are passed over.

    Args:
        model: The plan's base, on any device, the meta device included.
        plan: What stays.

    Raises:
        PruningError: The model is not the base that the plan was made for.
    """
    check_plan(plan)
    tensors = named_tensors(model, remove_duplicate=False)
    blocks = plan.removed_blocks()
    problems = _misfits(model, tensors, plan, blocks)
    if problems:
        raise wrong_base(plan, problems, 'cut the model that the plan was made for')

    repeated = repeated_sizes(model)
    changed = _cut_tensors(model, tensors, plan)
    for path, value in plan.attributes.items():
        set_attribute(model, path, value)
    for module in changed:
        refresh_shapes(module)
    refresh_encoders(model)
    for module, name, layer, attribute in repeated:
        setattr(module, name, getattr(layer, attribute))
    for name, children in blocks.items():
        model.set_submodule(name, _shortcut(model.get_submodule(name), children))
    _drop_caches(model)
    return model


def _misfits(
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        plan: Plan,
        blocks: Mapping[str, Sequence[str]],
) -> List[str]:
    """What stands in the way of the cut, one line each."""
    problems = tensor_misfits(plan, tensors, may_lack=lambda name: _is_left_out(model, name))
    problems = problems or _emptied(plan, tensors)
    problems += attribute_misfits(model, plan.attributes)
    modules = {name for name, _ in model.named_modules()} if blocks else ()
    needed = [name for block, children in blocks.items() for name in (block, *(f'{block}.{c}' for c in children))]
    return problems + [f'block {name} is missing' for name in needed if name not in modules]


def _emptied(plan: Plan, tensors: Mapping[str, Tensor]) -> List[str]:
    return [
        f'nothing would be left of {name}' for name, dims in plan.removed().items()
        if name in tensors and any(len(gone) == tensors[name].shape[dim] for dim, gone in dims.items())
    ]


def _is_left_out(model: nn.Module, name: str) -> bool:
    """Whether the model was built without the layer that would own a tensor."""
    module = model
    for part in name.split('.')[:-1]:
        if part not in module._modules:
            return False
        module = module._modules[part]
        if module is None or isinstance(module, nn.Identity):
            return True
    return False


def _cut_tensors(model: nn.Module, tensors: Mapping[str, Tensor], plan: Plan) -> Set[nn.Module]:
    """Cut every tensor of the plan; returns the modules that own one."""
    removed = plan.removed()
    aliases: Dict[int, List[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)

    modules = dict(model.named_modules(remove_duplicate=False))
    changed: Set[nn.Module] = set()
    for names in aliases.values():
        dims: Dict[int, np.ndarray] = {}
        for name in names:
            for dim, gone in removed.get(name, {}).items():
                dims[dim] = distinct([dims[dim], gone]) if dim in dims else gone
        if not dims:
            continue
        dense = tensors[names[0]]
        cut = cut_tensor(dense, dims)
        if isinstance(dense, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=dense.requires_grad)
        for name in names:
            owner, _, leaf = name.rpartition('.')
            module = modules[owner]
            setattr(module, leaf, cut)
            changed.add(modules[owner.partition('.parametrizations.')[0]])
    return changed


def _shortcut(block: nn.Module, children: Sequence[str]) -> nn.Module:
    """What is left of a block without its branches. Its children keep their names, and so do their tensors."""
    left = nn.Sequential(OrderedDict((name, block.get_submodule(name)) for name in children))
    left = left if children else nn.Identity()
    left.training = block.training
    return left


def _drop_caches(model: nn.Module) -> None:
    """Drop what modules keep between forwards in evaluation (levit's attention biases): it is of dense tensors.

    timm drops it when training starts.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    set_modes(modes)
