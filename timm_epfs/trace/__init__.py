"""From a model to named structures: record a forward on the meta device, solve, propose, verify."""
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..core import CostModel, PruningError, Size, Structure
from .build import Blueprint, build, calls
from .calls import Call
from .copies import meta_copy, quiet
from .interface import watch_interface
from .recorder import Recorder
from .rules import rule
from .verify import Mismatch, replay

__all__ = ['Trace', 'Skipped', 'trace', 'rule', 'meta_copy']

_MAX_ROUNDS = 60


@dataclass(frozen=True)
class Skipped:
    """A place in the model's code around which nothing is cut, and why."""
    where: str
    why: str


@dataclass(frozen=True, eq=False)
class Trace:
    """Everything that later rooms need to know of a model.

    Attributes:
        structures: What can be cut, in the order of the model's parameters.
        cost: MACs, parameters and activations as functions of the units left.
        attributes: Integer attributes that follow a cut, by path.
        skipped: Where cutting was given up, and why.
        returns: Name of the type of what the forward gives back, ``'Tensor'`` for logits.
        calls: What the forward calls, in order, where that was asked for.
    """
    structures: Tuple[Structure, ...]
    cost: CostModel
    attributes: Dict[str, Size]
    skipped: Tuple[Skipped, ...] = ()
    returns: str = 'Tensor'
    calls: Tuple[Call, ...] = ()


def trace(
        model: nn.Module,
        args: Tuple = (),
        kwargs: Optional[Dict[str, Any]] = None,
        cut: Optional[Callable] = None,
        whole_heads: bool = True,
        with_calls: bool = False,
) -> Trace:
    """Find what can be cut. The model isn't touched: all work is done on copies without data.

    Args:
        model: Any module.
        args: Positional arguments of one forward; tensors are taken for their shapes only. Batch 1.
        kwargs: Keyword arguments of the forward.
        cut: ``cut(copy, structures, keep, attributes)`` cuts a copy for verification.
        whole_heads: Units of attention are whole heads where that can be; otherwise the dims of all heads of a layer.
        with_calls: Write down what the forward calls, which takes up to a tenth longer and only a latency needs.

    Raises:
        PruningError: The forward fails.
    """
    copy = meta_copy(model).eval()
    args, kwargs = _to_meta((args, kwargs or {}))
    rec = Recorder(copy, whole_heads, with_calls)
    with watch_interface(copy, rec, args):
        try:
            returns = type(rec.run(args, kwargs)).__name__
        except Exception as e:
            why = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0]}'
            raise PruningError(f"the model's forward fails on {_shapes(args, kwargs)}: {why}") from e
    skipped = _also_in_training(copy, rec, args, kwargs)
    skipped += [Skipped(_place(site), f'operation {name} has no rule') for name, site in rec.opaque.items()]
    del copy
    pins: List[np.ndarray] = []
    for _ in range(_MAX_ROUNDS):
        blueprint = build(rec, rec.labels.solve(pins))
        if blueprint.conflicts:
            pins += blueprint.conflicts
            continue
        if cut is None or not blueprint.structures:
            break
        try:
            verified = _verify(model, rec, blueprint, cut, args, kwargs)
            while rec.blocks and not _runs_without_blocks(verified, blueprint, cut, args, kwargs):
                kept = any(block.shortcut for block in rec.blocks)
                rec.blocks = [block for block in rec.blocks if kept and not block.shortcut]
                blueprint = build(rec, rec.labels.solve(pins))
                verified = _verify(model, rec, blueprint, cut, args, kwargs)
            break
        except Mismatch as e:
            where, new = _around(rec, e.index, blueprint)
            if not new:
                where, new = _everything(rec, e.index)
            pins += new
            skipped.append(Skipped(where, e.why))
    else:
        raise PruningError(f'no cut of this model could be verified after {_MAX_ROUNDS} tries; the last: {skipped[-1]}')
    return Trace(
        blueprint.structures, blueprint.cost, blueprint.attributes, tuple(skipped), returns,
        calls(rec, blueprint.sizer),
    )


def _runs_without_blocks(copy: nn.Module, blueprint: Blueprint, cut: Callable, args: Tuple, kwargs: Dict) -> bool:
    blocks = [replace(s, members=()) for s in blueprint.structures if s.kind == 'blocks']  # they are cut already
    cut(copy, blocks, {s.name: np.arange(0) for s in blocks}, {})
    try:
        with quiet():
            copy(*args, **kwargs)
    except Exception:
        return False
    return True


def _also_in_training(copy: nn.Module, rec: Recorder, args: Tuple, kwargs: Dict[str, Any]) -> List[Skipped]:
    """Auxiliary heads run in training only: what they read must be cut along."""
    unseen = [name for name in rec.parameters if name not in rec.params]
    if not unseen:
        return []
    pair = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x, (args, kwargs))
    try:
        rec.run_training(*pair)
    except Exception as e:
        return [Skipped(unseen[0], f'runs neither in eval nor in training mode: {type(e).__name__}')]
    return []


def _place(site: Tuple[str, int]) -> str:
    """File and line, from the package on."""
    path = site[0].replace('\\', '/').rpartition('/site-packages/')[2]
    return f'{path}:{site[1]}'


def _verify(model: nn.Module, rec: Recorder, blueprint: Blueprint, cut: Callable, args, kwargs) -> nn.Module:
    """Cut about half of everything but whole blocks, by different amounts, and replay. Returns the cut copy."""
    keep = {}
    for i, s in enumerate(blueprint.structures):
        left = 1 if s.kind == 'blocks' else min(max(s.units // 2 + i % 3 - 1, 2), s.units - 1)
        keep[s.name] = np.sort(np.random.default_rng(i).permutation(s.units)[:left])
    left = {name: len(units) for name, units in keep.items()}
    copy = meta_copy(model).eval()
    cut(copy, blueprint.structures, keep, {path: size(left) for path, size in blueprint.attributes.items()})
    replay(copy, rec.operations[:rec.main], blueprint.sizer.lengths(left), args, kwargs)
    return copy


def _around(rec: Recorder, index: int, blueprint: Blueprint) -> Tuple[str, List[np.ndarray]]:
    """Labels that touch an operation wherever the same line of code runs it, if any of them is still free."""
    op = rec.operations[index]
    found = []
    for other in rec.operations:
        if (other.name, other.site) == (op.name, op.site):
            for labels in (*other.inputs, *(labels for _, labels in other.outputs)):
                found += [label for label in labels if label is not None and blueprint.sizer(0, label).coefs]
    return _place(op.site), found


def _everything(rec: Recorder, index: int) -> Tuple[str, List[np.ndarray]]:
    """Nothing at the operation is free: give up what the operations before and after it in the same file touch."""
    op = rec.operations[index]
    sites = {(o.name, o.site) for o in rec.operations[max(index - 3, 0):index + 4]}
    found = []
    for other in rec.operations:
        if (other.name, other.site) in sites:
            for labels in (*other.inputs, *(labels for _, labels in other.outputs)):
                found += [label for label in labels if label is not None]
    return _place(op.site), found


def _to_meta(tree: Any) -> Any:
    return tree_map(lambda x: x.to('meta') if isinstance(x, torch.Tensor) else x, tree)


def _shapes(args: Tuple, kwargs: Dict[str, Any]) -> str:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return ', '.join(str(tuple(x.shape)) for x in tensors) or 'no input'
