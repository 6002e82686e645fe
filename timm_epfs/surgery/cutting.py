"""Apply a plan: the only room that changes the shapes of tensors and the attributes of modules."""
import difflib
import inspect
import reprlib
from collections import OrderedDict
from functools import reduce
from math import inf
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
import torchvision
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..core import PruningError, first_few, one_line
from ..plan import MAX_ELEMENTS, MAX_PARTS, RESERVED_ARGS, Plan, TooLarge, is_usual, limited
from .deferred import DeferredInit

__all__ = [
    'apply_plan', 'slice_checkpoint', 'inflate_checkpoint', 'build_base', 'rebuild', 'TORCHVISION',
]

TORCHVISION = 'torchvision/'

# What a module says about its own shapes, read off its tensors after a cut. What can't be read off a shape (groups,
# num_heads, splits, …) is listed in the plan.
_SHAPE_ATTRIBUTES: Tuple[Tuple[type, Callable[[nn.Module], Dict[str, Any]]], ...] = (
    (nn.Linear, lambda m: dict(out_features=m.weight.shape[0], in_features=m.weight.shape[1])),
    (_ConvTransposeNd, lambda m: dict(in_channels=m.weight.shape[0], out_channels=m.weight.shape[1] * m.groups)),
    (_ConvNd, lambda m: dict(out_channels=m.weight.shape[0], in_channels=m.weight.shape[1] * m.groups)),
    (_NormBase, lambda m: dict(num_features=len(m.weight if m.running_mean is None else m.running_mean))),
    (nn.GroupNorm, lambda m: dict(num_channels=len(m.weight))),
    (nn.Embedding, lambda m: dict(num_embeddings=m.weight.shape[0], embedding_dim=m.weight.shape[1])),
    (nn.PReLU, lambda m: dict(num_parameters=len(m.weight))),
)

# What timm's modules that can be reparameterised call the sizes of their convolutions.
_REMEMBERED = {
    'dim': 'in_channels', 'in_channels': 'in_channels', 'in_chs': 'in_channels', 'dim_out': 'out_channels',
    'out_channels': 'out_channels', 'out_chs': 'out_channels', 'groups': 'groups',
}


def apply_plan(model: nn.Module, plan: Plan, deferred: Optional[DeferredInit] = None) -> nn.Module:
    """Cut a model in place. The model is the caller's own copy; on any error it is as it was.

    Tied tensors are cut once and stay tied. Tensors of a layer that was replaced by ``nn.Identity`` (a classifier at
    ``num_classes=0``) are passed over.

    Args:
        model: The plan's base, on any device, the meta device included.
        plan: What stays.
        deferred: Where the model was built; what is not initialised yet is then made anew in its cut shape.

    Raises:
        PruningError: The model is not the base that the plan was made for.
    """
    tensors = _named_tensors(model)
    problems = _tensor_misfits(plan, tensors, absent=lambda name: _is_identity(model, name))
    problems = problems or _emptied(plan, tensors)
    problems += _attribute_misfits(model, plan.attributes)
    modules = {name for name, _ in model.named_modules()}
    blocks = plan.removed_blocks()
    needed = [name for block, children in blocks.items() for name in (block, *(f'{block}.{c}' for c in children))]
    problems += [f'block {name} is missing' for name in needed if name not in modules]
    if problems:
        raise PruningError(f'{_misfit_message(plan, problems)}; cut the model that the plan was made for')

    remembered = _remembered(model)
    changed = _cut_tensors(model, tensors, plan, deferred)
    for path, value in plan.attributes.items():
        _replaced(model, path.split('.'), value)
    for name, dense in changed.items():
        module = model.get_submodule(name)
        _refresh_shape_attributes(module)
        if deferred is not None:
            deferred.refit(module, dense)
    for module, name, layer, attribute in remembered:
        setattr(module, name, getattr(layer, attribute))
    for name, children in blocks.items():
        model.set_submodule(name, _shortcut(model.get_submodule(name), children))
    _drop_caches(model)
    return model


def _shortcut(block: nn.Module, children: Sequence[str]) -> nn.Module:
    """What is left of a block without its branches. Its children keep their names, and so do their tensors."""
    left = nn.Sequential(OrderedDict((name, block.get_submodule(name)) for name in children))
    left = left if children else nn.Identity()
    left.training = block.training
    return left


def _drop_caches(model: nn.Module) -> None:
    """What modules keep between forwards in evaluation (levit's attention biases) was made from dense tensors.

    timm drops it when training starts.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, training in modes:
        module.training = training


def slice_checkpoint(state_dict: Mapping[str, Tensor], plan: Plan) -> Dict[str, Tensor]:
    """Cut a dense checkpoint of the plan's base. Tensors that the plan doesn't cut pass through as they are.

    Args:
        state_dict: Tensors by name, as in the base's ``state_dict()``.
        plan: What stays.

    Raises:
        PruningError: The checkpoint is of another base.
    """
    named = {member.tensor for cut in plan.cuts for member in cut.structure.members}
    absent = named.difference(state_dict)
    if absent and plan.base is not None:
        # Buffers that are not persistent are in the model and never in a checkpoint.
        absent = absent.intersection(build_base(plan.base, plan.base_args, device='meta').state_dict())
        named = named.intersection(state_dict) | absent
    problems = _tensor_misfits(plan, state_dict, absent=lambda name: name not in named)
    if problems:
        raise PruningError(f'{_misfit_message(plan, problems)}; give a dense checkpoint of the base, unwrapped')

    removed, lost = plan.removed(), plan.lost(state_dict)
    return {
        name: _cut_tensor(tensor, removed[name]) if name in removed else tensor
        for name, tensor in state_dict.items() if name not in lost
    }


def inflate_checkpoint(state_dict: Mapping[str, Tensor], plan: Plan) -> Dict[str, Tensor]:
    """The inverse of ``slice_checkpoint``: a checkpoint of the pruned model with zeros for what the plan removed.

    It fits the dense base, so whatever adapts a dense checkpoint (to other classes, channels or image sizes) adapts it.

    Raises:
        PruningError: The checkpoint is not of this plan's model.
    """
    dense, lengths = dict(state_dict), _dense_lengths(plan)
    for name, dims in plan.removed().items():
        for dim, gone in dims.items() if name in dense else ():
            part, length = dense[name], lengths[name, dim]
            if dim >= part.ndim or part.shape[dim] + len(gone) != length:
                raise PruningError(
                    f'{name} of shape {tuple(state_dict[name].shape)} is not what the plan leaves of {plan.base}; '
                    'give the weights that were saved with the plan'
                )
            keep = torch.from_numpy(np.setdiff1d(np.arange(length), gone)).to(part.device)
            whole = part.new_zeros((*part.shape[:dim], length, *part.shape[dim + 1:]))
            dense[name] = whole.index_copy(dim, keep, part)
    if plan.removed_blocks():
        base = build_base(plan.base, plan.base_args, device='meta').state_dict()
        dense.update({name: torch.zeros(base[name].shape, dtype=base[name].dtype) for name in plan.lost(base)})
    return dense


def build_base(
        base: Optional[str],
        base_args: Optional[Mapping[str, Any]] = None,
        device: Optional[Union[str, torch.device]] = None,
        **create_args: Any,
) -> nn.Module:
    """Build a dense model by name, without weights unless ``create_args`` asks for them.

    Args:
        base: timm name or ``'torchvision/<name>'``.
        base_args: Keyword arguments that shape the architecture (``num_classes``, ``in_chans``, …).
        device: Where to build.
        **create_args: Further arguments of ``timm.create_model``: from the caller, never from a plan.

    Raises:
        PruningError: No such model, or it can't be built with these arguments.
    """
    if base is None:
        raise PruningError("the plan names no base, it was made on a module of the user's own; pass base= when pruning")
    base_args = dict(base_args or {})
    reserved = [name for name in base_args if name in RESERVED_ARGS]
    if reserved:
        raise PruningError(f'base_args of {base} hold {reserved[0]!r}, which is not for a plan to set; remove it')
    cfg = create_args.get('pretrained_cfg')
    if not is_usual(base_args, cfg):
        _check_growth(base, base_args, {'pretrained_cfg': cfg})
    try:
        return _build_on(device or torch.get_default_device(), base, base_args, create_args)
    except PruningError as e:
        # A constructor that reads what it computes with tensors can't do so without data.
        if not isinstance(e.__cause__, NotImplementedError) or torch.device(device or 'cpu').type != 'meta':
            raise
        return _build_on('cpu', base, base_args, create_args).to(device)


def _check_growth(base: str, base_args: Dict[str, Any], create_args: Dict[str, Any]) -> None:
    """Raise ``PruningError`` where arguments make a base far larger than it is without, before it is allocated."""
    try:
        with limited(MAX_PARTS, MAX_ELEMENTS):
            _build_on('meta', base, base_args, create_args)
    except TooLarge:
        with limited(inf, inf) as dense:
            _build_on('meta', base, {}, {})
        parts, elements = dense
        if 2 * parts <= MAX_PARTS and 2 * elements <= MAX_ELEMENTS:
            raise
        with limited(max(MAX_PARTS, 2 * parts), max(MAX_ELEMENTS, 2 * elements)):
            _build_on('meta', base, base_args, create_args)
    except PruningError as e:
        if not isinstance(e.__cause__, NotImplementedError):
            raise


def _build_on(
        device: Union[str, torch.device],
        base: str,
        base_args: Dict[str, Any],
        create_args: Dict[str, Any],
) -> nn.Module:
    with torch.device(device):
        if base.startswith(TORCHVISION):
            return _build_torchvision(base, base_args)
        if '/' in base or ':' in base or not timm.is_model(base.partition('.')[0]):
            raise _unknown_base(base, timm.list_models())
        with one_line(f'{base} can\'t be built with {reprlib.repr(base_args)}'):
            return timm.create_model(base, **{**create_args, **base_args})


def rebuild(plan: Plan, device: Optional[Union[str, torch.device]] = None) -> nn.Module:
    """The pruned model of a plan, built from its base, with fresh weights and ``model.pruning_plan`` set.

    Raises:
        PruningError: The base can't be built, or is not the one that the plan was made for.
    """
    with DeferredInit() as deferred:
        model = apply_plan(build_base(plan.base, plan.base_args, device), plan, deferred)
    model.pruning_plan = plan
    return model


def _named_tensors(model: nn.Module) -> Dict[str, Tensor]:
    """Parameters and buffers under every name they have: tied ones appear several times."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _cut_tensors(
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        plan: Plan,
        deferred: Optional[DeferredInit],
) -> Dict[str, Dict[str, Tuple[int, ...]]]:
    """Cut every tensor of the plan; returns the dense shapes of those that changed, by module and name within it."""
    removed = plan.removed()
    aliases: Dict[int, List[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)

    changed: Dict[str, Dict[str, Tuple[int, ...]]] = {}
    for names in aliases.values():
        dims: Dict[int, np.ndarray] = {}
        for name in names:
            for dim, gone in removed.get(name, {}).items():
                dims[dim] = np.union1d(dims[dim], gone) if dim in dims else gone
        if not dims:
            continue
        dense = tensors[names[0]]
        shape = [length - len(dims.get(dim, ())) for dim, length in enumerate(dense.shape)]
        cut = deferred.resized(dense, shape) if deferred is not None else None
        if cut is None:
            cut = _cut_tensor(dense, dims)
        if isinstance(dense, nn.Parameter):
            cut = nn.Parameter(cut, requires_grad=dense.requires_grad)
        for name in names:
            owner, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(owner), leaf, cut)
            changed.setdefault(owner, {})[leaf] = tuple(dense.shape)
    return changed


def _cut_tensor(tensor: Tensor, removed: Mapping[int, np.ndarray]) -> Tensor:
    cut = tensor.detach()
    for dim, gone in removed.items():
        keep = np.setdiff1d(np.arange(tensor.shape[dim]), gone)
        cut = cut.index_select(dim, torch.from_numpy(keep).to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous() and \
        tensor.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _tensor_misfits(plan: Plan, tensors: Mapping[str, Tensor], absent: Callable[[str], bool]) -> List[str]:
    """What stands in the way of a cut, one line a tensor.

    Args:
        plan: The plan.
        tensors: What it is to cut, by name.
        absent: Whether a tensor of the plan may be missing.
    """
    problems = []
    for (name, dim), length in _dense_lengths(plan).items():
        tensor = tensors.get(name)
        if tensor is None:
            if not absent(name):
                problems.append(f'{name} is missing')
        elif dim >= tensor.ndim or tensor.shape[dim] != length:
            problems.append(f'{name} has shape {tuple(tensor.shape)} where dim {dim} should have {length}')
    return list(dict.fromkeys(problems))


def _emptied(plan: Plan, tensors: Mapping[str, Tensor]) -> List[str]:
    return [
        f'nothing would be left of {name}' for name, dims in plan.removed().items()
        if name in tensors and any(len(gone) == tensors[name].shape[dim] for dim, gone in dims.items())
    ]


def _dense_lengths(plan: Plan) -> Dict[Tuple[str, int], int]:
    """Lengths of the dense model's dims, by tensor and dim. Where a member doesn't say, structures own all of a dim."""
    lengths: Dict[Tuple[str, int], int] = {}
    for member in (member for cut in plan.cuts for member in cut.structure.members):
        key = member.tensor, member.dim
        lengths[key] = max(lengths.get(key, 0), member.length or int(member.index.max()) + 1)
    return lengths


def _attribute_misfits(model: nn.Module, attributes: Mapping[str, int]) -> List[str]:
    problems = []
    for path, value in attributes.items():
        try:
            present = reduce(_entry, path.split('.'), model)
        except (AttributeError, IndexError, KeyError, ValueError):
            problems.append(f'attribute {path} is missing')
            continue
        if type(present) is not int:
            problems.append(f'attribute {path} is no integer that can be set')
        elif not 0 <= value <= present:
            problems.append(f'attribute {path} is {present} and the plan says {value}')
    return problems


def _misfit_message(plan: Plan, problems: Sequence[str]) -> str:
    base = f' (base {plan.base})' if plan.base else ''
    return f'a plan for another base{base}: {first_few(problems)}'


def _is_identity(model: nn.Module, name: str) -> bool:
    """Whether the layer that would own a tensor was left out when the model was built."""
    module = model
    for part in name.split('.')[:-1]:
        if part not in module._modules:
            return False
        module = module._modules[part]
        if module is None or isinstance(module, nn.Identity):
            return True
    return False


def _entry(owner: Any, part: str) -> Any:
    """One step of an attribute path: to a module, to what it holds itself, or to an entry of that.

    A plan goes no other way: not to methods, classes or tensors, nor to anything that modules keep for torch.
    """
    if isinstance(owner, FeatureInfo):
        owner = owner.info
    if isinstance(owner, (list, tuple)) and part.isdecimal():
        return owner[int(part)]
    if isinstance(owner, dict):
        return owner[part]
    if not isinstance(owner, nn.Module) or part.startswith('_'):
        raise KeyError(part)
    return owner._modules[part] if part in owner._modules else inspect.getattr_static(owner, part)


def _replaced(owner: Any, path: Sequence[str], value: int) -> Any:
    """Set the entry at a path: in place on objects, in a new container for lists, tuples and dicts.

    Containers are replaced because a model may share them with its copies or its class.
    """
    part, rest = path[0], path[1:]
    present = _entry(owner, part)
    entry = _replaced(present, rest, value) if rest else value
    if entry is present:
        return owner
    if isinstance(owner, FeatureInfo):
        owner.info = _replaced(owner.info, path, value)
        return owner
    if isinstance(owner, (list, tuple)):
        return type(owner)(entry if i == int(part) else item for i, item in enumerate(owner))
    if isinstance(owner, dict):
        return {**owner, part: entry}
    setattr(owner, part, entry)
    return owner


def _refresh_shape_attributes(module: nn.Module) -> None:
    for kind, read in _SHAPE_ATTRIBUTES:
        if isinstance(module, kind):
            for name, value in read(module).items():
                setattr(module, name, value)
            return
    if hasattr(module, 'normalized_shape') and getattr(module, 'weight', None) is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _remembered(model: nn.Module) -> List[Tuple[nn.Module, str, nn.Module, str]]:
    """Attributes that ``reparameterize()`` reads and no forward does, each with the layer's that it repeats.

    Of the parallel layers in a module, the one that agrees with most of what the module remembers is taken.
    """
    found = []
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name in _REMEMBERED and type(value) is int}
        if not own or not hasattr(module, 'reparameterize'):
            continue
        repeated = []
        for layer in module.modules():
            if isinstance(layer, (_ConvNd, _NormBase)):
                theirs = {name: _REMEMBERED[name] if isinstance(layer, _ConvNd) else 'num_features' for name in own}
                repeated.append([(module, n, layer, a) for n, a in theirs.items() if getattr(layer, a) == own[n]])
        found += max(repeated, key=len, default=[])
    return found


def _build_torchvision(base: str, args: Mapping[str, Any]) -> nn.Module:
    name = base[len(TORCHVISION):]
    if name not in torchvision.models.list_models():
        raise _unknown_base(base, [TORCHVISION + known for known in torchvision.models.list_models()])
    accepted = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    # Detection and segmentation models fetch a backbone unless told not to.
    no_weights = {arg: None for arg in ('weights', 'weights_backbone') if arg in accepted}
    with one_line(f'{base} can\'t be built with {reprlib.repr(args)}'):
        return torchvision.models.get_model(name, **no_weights, **args)


def _unknown_base(base: str, known: Iterable[str]) -> PruningError:
    near = difflib.get_close_matches(base, known, n=3)
    hint = f'nearest: {", ".join(near)}' if near else "give a timm name or 'torchvision/<name>'"
    return PruningError(f'no model is named {base[:80]!r}; {hint}')
