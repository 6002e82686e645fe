"""From a model to its trace: record a forward, propose what can be cut, verify that on a cut copy.

A proposal that isn't as predicted is followed by another with tighter limits. Take a model that views 64 channels as
(4, 16) by numbers in its code::

    record     a forward of the dense model: labels, ties, operations
    propose    all that they allow, the 64 channels among it
    verify     fails at net.py:12: RuntimeError: shape '[1, 4, 16]' is invalid for input of size 31
    tighten    what this line touches is pinned, wherever it runs
    propose    all that is left
    verify     holds
"""
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..core import CostModel, PruningError, Size, Structure
from .blocks import Block
from .build import FixedDim, Proposal, build, fixed_dims
from .calls import Call
from .copies import raised_at
from .costs import build_calls
from .forwards import Forward
from .interface import watch_interface
from .isolation import Isolation
from .recorder import RETURNED, Recorder
from .records import Operation
from .sizes import Sizer
from .verify import Cut, Mismatch, Verifier

__all__ = ['OUTPUT_WIDTH', 'Skipped', 'Trace', 'trace']

OUTPUT_WIDTH = 'the model returns it'  # why the width of a classifier is fixed
_MAX_ROUNDS = 60


@dataclass(frozen=True)
class Skipped:
    """A place in the model's code around which nothing is cut, and why."""
    where: str
    why: str


@dataclass(frozen=True, eq=False)
class Trace:
    """All that is known about a model.

    Attributes:
        structures: What can be cut, in the order of the model's parameters, residual blocks last.
        cost: MACs, parameters and activations as functions of the units left.
        attributes: Integer attributes that follow a cut, by path.
        skipped: Where cutting was given up, and why.
        calls: The torch functions that the forward calls, in order.
        on_numbers: Where and why the forward fails without data, if it was recorded on numbers (``forwards.py``).
        unseen: Shapes of the parameters that no forward used, by name.
        fixed: Layers whose output width can't be cut, by name: the width, and why.
    """
    structures: Tuple[Structure, ...]
    cost: CostModel
    attributes: Dict[str, Size]
    skipped: Tuple[Skipped, ...] = ()
    calls: Tuple[Call, ...] = ()
    on_numbers: str = ''
    unseen: Mapping[str, Tuple[int, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Tuple[int, str]] = field(default_factory=dict)


@torch.inference_mode(False)  # the recorder sees operations of autograd
def trace(
        model: nn.Module,
        args: Tuple = (),
        kwargs: Optional[Dict[str, Any]] = None,
        cut: Optional[Cut] = None,
        whole_heads: bool = True,
) -> Trace:
    """Find what can be cut. The model isn't touched: all work is done on copies without data.

    Args:
        model: Any module.
        args: Positional arguments of one forward, batch 1. Only shapes and types of tensors matter.
        kwargs: Keyword arguments of the forward.
        cut: ``cut(copy, structures, keep, attributes)`` cuts a copy, to verify what was found. None: don't verify.
        whole_heads: Cut whole attention heads where possible; otherwise, the same dims of all heads of a layer.

    Raises:
        PruningError: The forward fails, or nothing that was found could be verified.
    """
    with Isolation(model) as isolation:
        forward, rec, on_numbers = _record(model, args, kwargs or {}, whole_heads, isolation)
        with isolation.fresh():
            skipped = _training_only(rec, forward)
        skipped += [Skipped(_place(site), f'operation {name} has no rule') for name, site in rec.opaque.items()]
        verifier = None if cut is None else Verifier(forward, cut, rec.operations[:rec.main], isolation)
        proposal, limits = _find_verified(rec, verifier, skipped)
    calls = build_calls(rec, proposal.sizer, proposal.blocks)
    unseen = {name: tuple(tensor.shape) for name, tensor in rec.parameters.items() if name not in rec.params}
    fixed = {
        dim.module: (dim.units, _reason(rec, dim, proposal, limits)) for dim in fixed_dims(rec, proposal.solution)}
    return Trace(
        proposal.structures, proposal.cost, proposal.attributes, limits.skipped, calls, on_numbers, unseen, fixed)


# -- record ---------------------------------------------------------------------------------------------------------

def _record(
        model: nn.Module,
        args: Tuple,
        kwargs: Dict[str, Any],
        whole_heads: bool,
        isolation: Isolation,
) -> Tuple[Forward, Recorder, str]:
    """Record the forward, on numbers where it fails without.

    Returns:
        forward: How the model was run.
        recorder: What was recorded.
        on_numbers: Where and why it fails without numbers, empty if it doesn't.
    """
    without = Forward.without_data(model, args, kwargs)
    try:
        return without, isolation.run(partial(_recorded, without, whole_heads)), ''
    except PruningError:  # the model can't be copied
        raise
    except Exception as e:
        on_numbers = _failure(e)
    forward = Forward.on_numbers(model, args, kwargs)
    try:
        return forward, isolation.run(partial(_recorded, forward, whole_heads)), on_numbers
    except Exception as e:
        raise PruningError(
            f"the model's forward fails on {forward} at {_failure(e)}; give an example_input= that the model "
            f'accepts') from e


def _failure(error: Exception) -> str:
    """The line of the model's code that an error comes from, and its first line."""
    return f'{_place(raised_at(error))}: {type(error).__name__}: {(str(error).splitlines() or [""])[0]}'


def _recorded(forward: Forward, whole_heads: bool) -> Recorder:
    copy = forward.copy()
    rec = Recorder(copy, whole_heads, forward.has_numbers)
    args, kwargs = forward.inputs()
    with watch_interface(copy, rec, args):
        rec.run(args, kwargs)
    return rec


def _training_only(rec: Recorder, forward: Forward) -> List[Skipped]:
    """Record a forward in training mode, too, if parameters such as an auxiliary head's run there alone."""
    unseen = [name for name in rec.parameters if name not in rec.params]
    if not unseen:
        return []
    pair = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x, forward.inputs())
    try:
        rec.run_training(*pair)
    except Exception as e:
        return [Skipped(unseen[0], f'runs neither in eval nor in training mode: {type(e).__name__}')]
    return []


# -- propose, verify, tighten ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Limits:
    """What a proposal must leave alone.

    Attributes:
        pins: Labels of which nothing is cut, and why.
        blocks: The residual blocks that may go; no others.
        skipped: Where the pins come from.
    """
    pins: Tuple[Tuple[np.ndarray, str], ...]
    blocks: Tuple[Block, ...]
    skipped: Tuple[Skipped, ...]


def _find_verified(
        rec: Recorder,
        verifier: Optional[Verifier],
        skipped: Sequence[Skipped],
) -> Tuple[Proposal, _Limits]:
    """Propose, verify and tighten the limits until a proposal holds.

    Returns:
        proposal: The one that holds.
        limits: Its limits. They come from the places given and from others.
    """
    limits = _Limits((), rec.blocks, tuple(skipped))
    for _ in range(_MAX_ROUNDS):
        proposal = build(rec, rec.labels.solve([label for label, _ in limits.pins]), limits.blocks)
        tighter = _tighten(limits, proposal, rec.operations, verifier)
        if tighter is None:
            return proposal, limits
        limits = tighter
    last = limits.skipped[-1] if limits.skipped else Skipped('attributes', 'they need two values at once')
    raise PruningError(
        f'no cut of this model could be verified in {_MAX_ROUNDS} tries; the last one failed at {last.where}: '
        f'{last.why}; please report the model')


def _tighten(
        limits: _Limits,
        proposal: Proposal,
        operations: Sequence[Operation],
        verifier: Optional[Verifier],
) -> Optional[_Limits]:
    """Verify a proposal. Returns the limits for the next one, or None if this one holds."""
    if proposal.conflicts:
        return replace(limits, pins=(*limits.pins, *proposal.conflicts))
    if verifier is None or not proposal.structures:
        return None
    try:
        copy = verifier.verify(proposal)
    except Mismatch as e:
        skipped = Skipped(_place(operations[e.index].site), e.why)
        why = f'a cut fails at {skipped.where}: {e.why}'
        pins = [(label, why) for label in _labels_around(operations, e.index, proposal.sizer)]
        return replace(limits, pins=(*limits.pins, *pins), skipped=(*limits.skipped, skipped))
    if not verifier.runs_without_blocks(copy, proposal):
        return replace(limits, blocks=_fewer(limits.blocks))
    return None


def _labels_around(operations: Sequence[Operation], index: int, sizer: Sizer) -> List[np.ndarray]:
    """Labels to pin because of an operation: what its line of code touches, wherever it runs, and what is cut of that.

    If nothing of it is cut, the cause lies nearby: whatever the operation and its neighbours touch.
    """
    cut = [label for label in _touched(operations, [operations[index]]) if sizer.is_cut(label)]
    return cut or _touched(operations, operations[max(index - 3, 0):index + 4])


def _touched(operations: Sequence[Operation], some: Sequence[Operation]) -> List[np.ndarray]:
    """Labels that some operations touch, wherever their lines of code run."""
    lines = {(op.name, op.site) for op in some}
    return [label for op in operations if (op.name, op.site) in lines for label in op.labels]


def _reason(rec: Recorder, dim: FixedDim, proposal: Proposal, limits: _Limits) -> str:
    """Why a width is fixed."""
    if dim.source == RETURNED:
        return OUTPUT_WIDTH
    if dim.source is not None and dim.source < len(rec.operations):
        operation = rec.operations[dim.source]
        return f'{operation.name} at {_place(operation.site)}'
    held = (why for label, why in limits.pins if (proposal.solution.unit[label] == dim.unit).any())
    return next(held, 'a reshape that no cut fits')


def _fewer(blocks: Sequence[Block]) -> Tuple[Block, ...]:
    """Fewer blocks to try next: those whose shortcut is the identity; none if all of them are such blocks."""
    identities = tuple(block for block in blocks if not block.shortcut)
    return identities if len(identities) < len(blocks) else ()


def _place(site: Tuple[str, int]) -> str:
    """File and line, from the package on."""
    path = site[0].replace('\\', '/').rpartition('/site-packages/')[2]
    return f'{path}:{site[1]}'
