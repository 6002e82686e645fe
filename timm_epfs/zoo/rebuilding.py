"""Whether a name still builds a model: users replace classifiers, stems and other layers by hand."""
import re
from typing import Any, Dict, List, Mapping, Optional

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout, to_2tuple
from timm.models import get_model_args
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..core import PruningError, shorten
from ..plan import Plan
from ..surgery import apply_plan, build_base

__all__ = ['rebuilding_args']

# These do nothing but in training. Their rates are no part of how a model is described.
_ONLY_IN_TRAINING = (nn.Identity, _DropoutNd, DropPath, DropBlock2d, PatchDropout)
_WIDTH = 120  # of a layer's description in a message
_SHAPES = ' with '  # what comes before the shapes of its tensors


def rebuilding_args(
        model: nn.Module,
        base: str,
        base_args: Mapping[str, Any],
        plan: Optional[Plan] = None,
) -> Dict[str, Any]:
    """The arguments with which a name builds a model as it is now.

    Where nothing changed but the classifier's number of classes (``model.fc = nn.Linear(512, 7)``), ``num_classes``
    follows it.

    Args:
        model: The model, on any device.
        base: Name of its dense base.
        base_args: Keyword arguments that the base was built with.
        plan: What stays of the base in the model. None: all of it.

    Raises:
        PruningError: No arguments build it; the message names the first layer that differs.
    """
    args = {**base_args, **_changed_since(model, base_args)}
    with torch.random.fork_rng(devices=[]):
        built = _build(model, base, args, plan)
        difference = _difference(_layers(model), _layers(built), base)
        for classes in _possible_classes(model, built) if difference else ():
            other_args = {**args, 'num_classes': classes}
            try:
                if _layers(model) == _layers(_build(model, base, other_args, plan)):
                    return other_args
            except PruningError:  # this base has no such argument
                pass
    if difference:
        raise PruningError(difference)
    return args


def _changed_since(model: nn.Module, base_args: Mapping[str, Any]) -> Dict[str, Any]:
    """Those of the arguments that timm changes with a model (``reset_classifier``), as they are now."""
    present = get_model_args(model)
    if 'img_size' in base_args and to_2tuple(base_args['img_size']) == present.get('img_size'):
        present['img_size'] = base_args['img_size']  # one number says as much
    return {
        name: present[name] for name in ('num_classes', 'in_chans', 'global_pool', 'img_size')
        if name in base_args and name in present
    }


def _build(model: nn.Module, base: str, args: Mapping[str, Any], plan: Optional[Plan]) -> nn.Module:
    """What the name builds, cut to the plan.

    Raises:
        PruningError: It can't be built, or it can't be cut, since the plan is of a model with other layers.
    """
    built = build_base(base, args, 'meta')
    if plan is None:
        return built
    try:
        return apply_plan(built, plan)
    except PruningError as e:  # on any error, what was built is as it was
        raise PruningError(_difference(_classes(model), _classes(built), base) or str(e)) from e


def _difference(mine: Mapping[str, str], theirs: Mapping[str, str], base: str) -> str:
    """The first layer in which a model differs from what its name builds, in words; empty where there is none.

    Args:
        mine: Descriptions of the model's layers, by name.
        theirs: Descriptions of those that the name builds.
        base: The name.
    """
    for name in (*mine, *theirs):
        here, there = mine.get(name, 'nothing'), theirs.get(name, 'nothing')
        if here != there:
            if here.partition(_SHAPES)[0] != there.partition(_SHAPES)[0]:
                here, there = here.partition(_SHAPES)[0], there.partition(_SHAPES)[0]
            where = f'layer {name}' if name else 'the model'
            return f'{where} is {shorten(here, _WIDTH)} where {base} has {shorten(there, _WIDTH)}'
    return ''


def _classes(model: nn.Module) -> Dict[str, str]:
    """The class of each module that does something in evaluation mode, by name."""
    return {name: text.partition('(')[0] for name, text in _layers(model).items()}


def _layers(model: nn.Module) -> Dict[str, str]:
    """A description of each module that does something in evaluation mode, by name."""
    return {name: _layer(m) for name, m in model.named_modules() if not isinstance(m, _ONLY_IN_TRAINING)}


def _layer(module: nn.Module) -> str:
    """What a module computes, as far as it says so, and the shapes of its own tensors."""
    if isinstance(module, _BatchNorm):  # synchronised or not, whatever its momentum
        act = 'Act' if hasattr(module, 'act') else ''
        said = f'BatchNorm{act}({module.num_features}, eps={module.eps})'
    else:
        said = f'{type(module).__name__}({re.sub("(, )?inplace=True", "", module.extra_repr())})'
    if 'forward' in vars(module) and not hasattr(module, '_original_forward'):  # accelerate's only converts the output
        said += ' and another forward'
    if _has_changing_hook(module):
        said += ' and a forward hook'
    transient = module._non_persistent_buffers_set
    tensors = {**module._parameters, **{name: b for name, b in module._buffers.items() if name not in transient}}
    shapes = [f'{name} {tuple(tensor.shape)}' for name, tensor in sorted(tensors.items()) if tensor is not None]
    return f'{said}{_SHAPES}{", ".join(shapes)}' if shapes else said


def _has_changing_hook(module: nn.Module) -> bool:
    """Whether a hook on a module may change what it takes or gives."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if not hooks:
        return False
    from ..trace import changes_results  # here, since importing timm_epfs has to be cheap
    return any(map(changes_results, hooks))


def _possible_classes(model: nn.Module, built: nn.Module) -> List[int]:
    """Numbers of classes that may explain how a model's tensors differ from what its name builds."""
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in built.state_dict().items()}
    changed = [mine[name] for name in mine if name in theirs and mine[name] != theirs[name]]
    if changed:
        lengths = {shape[0] for shape in changed if shape}
        return list(lengths) if len(lengths) == 1 else []
    return [0] if theirs.keys() - mine.keys() else []
