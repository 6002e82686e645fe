"""What a model of the zoo has to pass, stage by stage, on the meta device. The work of ``zoo.py``'s processes."""
import time
import warnings
from typing import Any, Dict, List, Tuple

import torch
import torchvision
from common import one_line
from timm.models import model_entrypoint
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch_pruning_recipe import DrawnMagnitude, NoInit, one_shot

import timm_epfs
from timm_epfs.plan import Plan
from timm_epfs.pruner import example_for
from timm_epfs.report import count_macs
from timm_epfs.surgery import TORCHVISION, build_base, rebuild
from timm_epfs.trace import Trace

STAGES = ('build', 'trace', 'cut', 'forward', 'backward', 'cost', 'rebuild')
COLUMNS = (
    'name', 'module', 'status', 'macs', 'macs_ratio', 'cost_error_dense', 'cost_error_pruned', 'share_cuttable',
    'share_exact', 'structures', 'streams_used', 'skipped', 'seconds', 'error',
)
BASELINE_COLUMNS = ('name', 'module', 'status', 'macs', 'macs_ratio', 'seconds', 'error')
TARGET, NEAR, COST_TOLERANCE, EFFECTIVE = 0.5, 0.01, 0.005, 0.9


class Failed(Exception):
    """A check that didn't hold."""


def module_of(name: str) -> str:
    """Last part of the python module that a model's entry point is in."""
    if name.startswith(TORCHVISION):
        entry = torchvision.models.get_model_builder(name[len(TORCHVISION):])
    else:
        entry = model_entrypoint(name)
    return entry.__module__.rpartition('.')[2]


def measure(name: str) -> Dict[str, Any]:
    """The row of one name; ``status`` is the first stage that failed."""
    return _staged(name, _ours)


def measure_torch_pruning(name: str) -> Dict[str, Any]:
    """The same for torch-pruning alone."""
    return _staged(name, _theirs)


def _staged(name: str, check) -> Dict[str, Any]:
    row = {'name': name, 'module': module_of(name), 'status': 'build'}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            check(name, row, caught)
        row['status'] = 'ok'
    except Failed as e:
        row['error'] = one_line(str(e))
    except Exception as e:
        row['error'] = one_line(e)
    return row


def _ours(name: str, row: Dict[str, Any], caught: List) -> None:
    model = build_base(name, device='meta').eval()
    row['status'] = 'trace'
    slim, traced = _prune(model, name, row)

    counts = traced.cost.counts({s.name: s.units for s in traced.structures})
    plan = slim.pruning_plan
    macs, left = plan.cost['macs']
    inside = [s for s in traced.structures if s.kind != 'blocks']  # a block taken out whole cuts no layer
    row.update(
        macs=round(macs),
        macs_ratio=left / macs,
        share_cuttable=traced.cost.share('macs', {s.name for s in inside}, counts),
        share_exact=traced.cost.share('macs', {s.name for s in inside if s.exact}, counts),
        structures=len(inside),
        streams_used=any(c.structure.stream and len(c.keep) < c.structure.units for c in plan.cuts),
        skipped=len(traced.skipped),
    )
    if abs(left / macs - TARGET) > NEAR:
        said = '; '.join(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        raise Failed(f'{left / macs:.3f} of the MACs are left: {said}')

    row['status'] = 'forward'
    args, kwargs = example_for(model)
    check_forward(model, slim, args, kwargs)
    row['status'] = 'backward'
    check_backward(model, slim, args, kwargs)
    row['status'] = 'cost'
    row['cost_error_dense'] = macs / count_macs(model, args, kwargs) - 1
    row['cost_error_pruned'] = left / count_macs(slim, args, kwargs) - 1
    if max(abs(row['cost_error_dense']), abs(row['cost_error_pruned'])) > COST_TOLERANCE:
        raise Failed('the cost model and FlopCounterMode differ')
    row['status'] = 'rebuild'
    _check_rebuild(slim)


def _prune(model: nn.Module, name: str, row: Dict[str, Any]) -> Tuple[nn.Module, Trace]:
    """A model's cut, timed with its trace, and the trace."""
    start = time.perf_counter()
    try:
        pruner = timm_epfs.Pruner(model, base=name)
        row['status'] = 'cut' if any(s.kind != 'blocks' for s in pruner.trace.structures) else 'trace'
        return pruner(macs=TARGET, criterion='random'), pruner.trace
    finally:
        row['seconds'] = time.perf_counter() - start


@torch.no_grad()
def check_forward(dense: nn.Module, slim: nn.Module, args, kwargs) -> None:
    """The outputs have the dense model's shapes."""
    expected, found = (_shapes(model(*args, **kwargs)) for model in (dense, slim))
    if expected != found:
        raise Failed(f'outputs of shapes {found}, the dense model\'s are {expected}')


def check_backward(dense: nn.Module, slim: nn.Module, args, kwargs) -> None:
    """Every parameter that gets a gradient in the dense model gets one of its own shape, in train mode at batch 2."""
    try:
        _backward(dense, args, kwargs)
    except Exception as e:
        raise Failed(f'the dense model itself fails in train mode: {one_line(e)}') from e
    _backward(slim, args, kwargs)
    expected = dict(dense.named_parameters())
    for name, p in slim.named_parameters():
        if (p.grad is None) != (expected[name].grad is None):
            raise Failed(f'{name} has {"no" if p.grad is None else "a"} gradient, unlike in the dense model')
        if p.grad is not None and p.grad.shape != p.shape:
            raise Failed(f'the gradient of {name} has shape {tuple(p.grad.shape)}, not {tuple(p.shape)}')


def _backward(model: nn.Module, args, kwargs) -> None:
    args, kwargs = tree_map(
        lambda x: x.new_empty(2, *x.shape[1:]) if isinstance(x, torch.Tensor) else x, (args, kwargs))
    model.train()
    sum(out.float().sum() for out in tree_leaves(model(*args, **kwargs)) if _differentiable(out)).backward()
    model.eval()


def _differentiable(out: Any) -> bool:
    return isinstance(out, torch.Tensor) and out.requires_grad


def _check_rebuild(slim: nn.Module) -> None:
    again = rebuild(Plan.from_json(slim.pruning_plan.to_json()), device='meta')
    expected, found = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (slim, again))
    if expected != found:
        differ = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
        raise Failed(f'{len(differ)} tensors differ, the first: {differ[0]}')


def _shapes(out: Any) -> List[Tuple[int, ...]]:
    return [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def _theirs(name: str, row: Dict[str, Any], caught: List) -> None:
    """On real tensors until the cut: on the meta device an index out of range goes unnoticed."""
    model = build_base(name, device='meta').eval()
    torch.manual_seed(0)
    with NoInit():
        slim = build_base(name).eval()
    row['status'] = 'trace'
    (image,), _ = example_for(model)
    start = time.perf_counter()
    try:
        one_shot(slim, torch.zeros(image.shape), DrawnMagnitude(), lambda stage: row.update(status=stage))
    finally:
        row['seconds'] = time.perf_counter() - start
    slim.to('meta')
    row['status'] = 'forward'
    check_forward(model, slim, (image,), {})
    row['status'] = 'backward'
    check_backward(model, slim, (image,), {})
    row['status'] = 'cut'
    row['macs'] = count_macs(model, (image,), {})
    row['macs_ratio'] = count_macs(slim, (image,), {}) / row['macs']
    if row['macs_ratio'] > EFFECTIVE:
        raise Failed(f'{row["macs_ratio"]:.3f} of the MACs are left')
