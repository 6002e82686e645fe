"""An optimizer in use, taken from a model to what a cut left of it."""
from typing import Any, Collection, Dict, Iterator, List, Mapping, Optional

from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import PruningError, distinct
from ..plan import Plan, check_plan
from .masks import unmasked_name
from .optimizer_states import cut_entry

__all__ = ['cut_optimizer']


def cut_optimizer(optimizer: Optimizer, model: nn.Module, slim: nn.Module) -> None:
    """Let an optimizer that trained a model go on with the model that a cut left of it. It is changed in place.

    The optimizer keeps its parameter groups with their options, so learning rate schedulers and gradient scalers that
    refer to it go on, too. The groups then hold the parameters of ``slim``, in its order if they were in the model's
    (which masks change), and the moments are cut as the parameters were. So training goes on exactly as if the units
    that went had been masked, for optimizers that treat every entry of a weight by itself (SGD, Adam, Lion and most
    others). Where norms or factors of whole tensors play a part (LAMB, Muon, Adafactor), it goes on with what is left
    of the moments. To cut in several steps, repeat::

        for macs in (0.8, 0.65, 0.5):
            train_for_an_epoch(model, optimizer)
            slim = timm_epfs.prune(model, macs=macs * dense_macs)
            timm_epfs.cut_optimizer(optimizer, model, slim)
            model = slim

    Call it between two steps: gradients are not taken over. Parameters of other modules that the optimizer holds stay
    as they are. A weight that a mask between zero and one was multiplied into keeps its moments as they are.

    Args:
        optimizer: Any optimizer whose state of a parameter is of its shape, is one number, or is Adafactor's. Wrappers
            of optimizers (timm's Lookahead, accelerate's) are looked into.
        model: The model that the optimizer was made for, with or without a learner's masks.
        slim: What ``prune``, ``Pruner`` or ``export`` made of it.

    Raises:
        PruningError: The optimizer isn't the model's, ``slim`` isn't what is left of the model, or part of the
            optimizer's state can't be cut. Nothing is changed then.
    """
    if not isinstance(optimizer, Optimizer):
        raise PruningError(
            f'cut_optimizer: the optimizer is of type {type(optimizer).__name__}; give a torch.optim.Optimizer')
    model, slim = unwrap_model(model), unwrap_model(slim)
    parts = list(_with_wrapped(optimizer))
    groups = list({id(group): group for part in parts for group in part.param_groups}.values())
    group_of = {parameter: group for group in groups for parameter in group['params']}
    names = _names(model, group_of)
    earlier: Optional[Plan] = getattr(model, 'pruning_plan', None)
    plan = getattr(slim, 'pruning_plan', None)
    check_plan(plan)

    removed = plan.removed_since(earlier)
    cut_away = {parameter: _merged(removed, aliases) for parameter, aliases in names.items()}
    successors = _successors(names, cut_away, plan, slim)
    states = {id(part.state): part.state for part in parts}.values()
    entries = [
        {
            successors[parameter]: cut_entry(
                state[parameter], aliases[0], parameter.shape, group_of[parameter], cut_away[parameter])
            for parameter, aliases in names.items() if parameter in state and parameter in successors
        }
        for state in states
    ]
    for state, cut in zip(states, entries):
        for parameter in names:
            state.pop(parameter, None)
        state.update(cut)
    places = {parameter: i for i, parameter in enumerate(slim.parameters())}
    for group in groups:
        was_in_order = [id(p) for p in group['params'] if p in names] == [id(p) for p in names if group_of[p] is group]
        _replace_parameters(group, names, successors, places if was_in_order else {})


def _replace_parameters(
        group: Dict[str, Any],
        names: Collection[Tensor],
        successors: Mapping[Tensor, Tensor],
        places: Mapping[Tensor, int],
) -> None:
    """Let a parameter group hold what is left of its parameters.

    Args:
        group: The group, which is changed in place.
        names: The model's parameters; the group's others stay.
        successors: What is left of them.
        places: Their places in the new order. Empty: the order stays.
    """
    labels = group.get('param_names', group['params'])
    kept = [(p, label) for p, label in zip(group['params'], labels) if p not in names or p in successors]
    ours = [(successors[p], label) for p, label in kept if p in names]
    in_order = iter(sorted(ours, key=lambda item: places.get(item[0], 0)))
    kept = [next(in_order) if p in names else (p, label) for p, label in kept]
    if 'param_names' in group:
        group['param_names'][:] = [label for _, label in kept]
    group['params'][:] = [p for p, _ in kept]


def _with_wrapped(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and those that it wraps."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _with_wrapped(value)


def _names(model: nn.Module, held: Mapping[Tensor, Any]) -> Dict[Tensor, List[str]]:
    """The parameters of a model that an optimizer holds, with all their names."""
    names: Dict[Tensor, List[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in held:
            names.setdefault(parameter, []).append(unmasked_name(model, name))
    if not names:
        raise PruningError(
            'cut_optimizer: the optimizer holds none of the model\'s parameters; give the model that it was made for, '
            'then what is left of it')
    return names


def _merged(removed: Mapping[str, Mapping[int, Any]], aliases: List[str]) -> Dict[int, Any]:
    """Entries of a tensor that go, by dim, where it has several names."""
    merged: Dict[int, Any] = {}
    for name in aliases:
        for dim, gone in removed.get(name, {}).items():
            merged[dim] = distinct([merged[dim], gone]) if dim in merged else gone
    return merged


def _successors(
        names: Mapping[Tensor, List[str]],
        cut_away: Mapping[Tensor, Mapping[int, Any]],
        plan: Plan,
        slim: nn.Module,
) -> Dict[Tensor, Tensor]:
    """What is left of each parameter. Those of blocks that were taken out have nothing left."""
    theirs = dict(slim.named_parameters(remove_duplicate=False))
    successors = {}
    for parameter, aliases in names.items():
        lost = plan.lost(aliases)
        stays = [name for name in aliases if name not in lost]
        if not stays:
            continue
        expected = [n - len(cut_away[parameter].get(dim, ())) for dim, n in enumerate(parameter.shape)]
        found = theirs.get(stays[0])
        if found is None or list(found.shape) != expected:
            shape = 'is missing' if found is None else f'has shape {tuple(found.shape)}'
            raise PruningError(
                f'cut_optimizer: {stays[0]} of the cut model {shape} where {tuple(expected)} was expected; give what '
                'the cut made of the model, before changing its layers')
        successors[parameter] = found
    return successors
