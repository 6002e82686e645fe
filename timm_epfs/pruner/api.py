"""The main job, one call: from a name or a module and a budget to a smaller module of the same class."""
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from timm.utils import unwrap_model
from torch import nn

from ..allocate import budget_from
from ..core import KINDS, PruningError, Structure, one_line
from ..importance import score
from ..latency import Asked, Bench
from ..plan import Plan
from ..surgery import is_masked
from ..trace import Trace
from ..version import __version__
from ..zoo import base_of, create_model
from .cutter import Cutter
from .inputs import Example, example_for, trace_model

__all__ = ['left_alone', 'prune']

DEFAULT_KINDS = ('channels', 'heads', 'head_dims', 'groups')


def prune(
        model: Union[str, nn.Module],
        macs: Optional[float] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        device: Optional[Union[str, torch.device]] = None,
        criterion: str = 'l2',
        scope: str = 'global',
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        exclude: Sequence[str] = (),
        only: Sequence[str] = (),
        ratios: Optional[Mapping[str, float]] = None,
        kinds: Sequence[str] = DEFAULT_KINDS,
        streams: Optional[bool] = None,
        data: Optional[Iterable] = None,
        loss_fn: Optional[Any] = None,
        seed: int = 0,
        example_input: Optional[Example] = None,
        pretrained: bool = False,
        base: Optional[str] = None,
        **model_args: Any,
) -> nn.Module:
    """Cut a model to a budget in one shot, by the importance of its weights.

    >>> slim = prune('resnet18', macs=0.5)
    >>> dense, pruned = slim.pruning_plan.cost['macs']
    >>> abs(pruned / dense - 0.5) < 0.01
    True

    Args:
        model: timm name, ``'torchvision/<name>'``, or any module; a module is left as it is.
        macs: Budget of multiply-accumulates at batch 1: a share of the dense model, or a count from 1 on.
        params: Budget of parameters, likewise.
        latency: Budget of the time that a batch takes: a share of the dense model's (``0.5``), or milliseconds
            (``'12ms'``). Exactly one of the three is given. Layers are timed on the model's device with torch's threads
            as they are set, the first time for a minute or so; what is cut is then measured whole, and corrected until
            it's within 5 %.
        latency_batch_size: Images a batch, where time is measured.
        device: Device of a model that is given by name; a module is cut and measured where it is.
        criterion: How units are ranked, one of ``timm_epfs.CRITERIA``.
        scope: ``'global'``, ``'local'``, ``'isomorphic'`` or ``'neyman'``: what is ranked against what, as in
            docs/budget.md.
        round_to: Widths that are cut stay multiples of this. None: 16 for wide layers, less for narrow ones; under
            ``latency`` as ``'auto'``: as None, with what wide layers are fastest at on the device, as is measured, in
            place of 16.
        floor: Share of its units that each structure keeps at least.
        exclude: Names, module prefixes or patterns of layers whose outputs are not to be cut.
        only: The same, of the only layers to cut.
        ratios: Shares to remove by pattern, set before the budget is met by the rest.
        kinds: Kinds of structures to cut; whole residual blocks (``'blocks'``) only if named here. Attention is cut by
            whole heads; with ``'head_dims'`` and without ``'heads'`` here, by the dims of all heads of a layer.
        streams: Whether to cut residual streams that are normalised over their channels (ViT, ConvNeXt), which can't
            be done exactly. None: only where the budget can't be met without, with a warning.
        data: Batches (images, targets) for criteria that need them.
        loss_fn: ``loss_fn(output, target)`` for these; None: cross-entropy.
        seed: For ``criterion='random'``.
        example_input: What the forward takes, where that isn't known: a tensor, a tuple of positional or a dict of
            keyword arguments; batch 1, only shapes matter.
        pretrained: Load timm's weights, where ``model`` is a name.
        base: Name from which the dense model can be rebuilt, where ``model`` is a module that doesn't say.
        **model_args: Keyword arguments of the model, where ``model`` is a name (``num_classes``, ``in_chans``, …).

    Returns:
        A smaller module of the same class, with its ``pruning_plan``.

    Raises:
        PruningError: What was asked can't be done; one line says why and what to do.

    Warns:
        UserWarning: The budget was missed: by more than 1 % of the dense cost, or by more than 5 % of a latency.
    """
    asked = None if latency is None else Asked(latency)
    if asked and (macs is not None or params is not None):
        raise PruningError('latency= was given with macs= or params=; one budget is needed, leave the others out')
    model, own = _resolve(model, pretrained, model_args)
    model = _on(model, own, device)
    timed = asked is not None or round_to == 'auto'
    whole_heads = 'heads' in kinds or 'head_dims' not in kinds
    traced = trace_model(model, example_input, whole_heads)
    budget = None if asked else budget_from(traced.structures, traced.cost, macs=macs, params=params)
    earlier = getattr(model, 'pruning_plan', None)
    fixed = left_alone(traced.structures, exclude, only, kinds)
    if isinstance(earlier, Plan):
        fixed |= earlier.uncomposable(traced.structures)
    pool = [s for s in traced.structures if s.name not in fixed]
    if not pool:
        raise PruningError(f'nothing is left to cut: {_nothing(traced)}')
    scores = score(model, pool, criterion, data=data, loss_fn=loss_fn, seed=seed)
    bench = None
    if timed:
        bench = Bench(model, traced, *example_for(model, example_input), latency_batch_size)
        traced = replace(traced, cost=bench.cost)
        scores = bench.lean(scores) if asked else scores
    measured = round_to == 'auto' or (asked and round_to is None)
    rounding = {'round_to': None, 'align': bench.alignment()} if measured else {'round_to': round_to}
    recipe = _recipe(
        method='one-shot', criterion=criterion, scope=scope, floor=floor, macs=macs, params=params, latency=latency,
        **rounding, exclude=list(exclude), only=list(only), ratios=dict(ratios or {}), streams=streams,
        kinds=list(kinds) if tuple(kinds) != DEFAULT_KINDS else None, seed=seed if criterion == 'random' else None,
        latency_on=bench.place if bench else None,
    )
    cut = Cutter(
        model, own and not asked, traced, scores, fixed, streams,  # what is measured against must stay
        options=dict(scope=scope, floor=floor, ratios=ratios, **rounding),
        base=base_of(model) if base is None else (base, {}),
        recipe=recipe,
    )
    if asked:
        slim, _, recipe['latency_ms'] = bench.meet(asked, cut)
    else:
        slim = cut(budget)
    if isinstance(earlier, Plan):
        slim.pruning_plan = earlier.compose(slim.pruning_plan)
    return slim


def _resolve(model: Union[str, nn.Module], pretrained: bool, model_args: Dict[str, Any]) -> Tuple[nn.Module, bool]:
    """The module to cut, and whether it is ours to change."""
    if isinstance(model, str):
        return create_model(model, pretrained, **model_args), True
    if not isinstance(model, nn.Module):
        raise PruningError(f'a model was asked for, {type(model).__name__} was given; give a name or an nn.Module')
    if model_args:
        raise PruningError(f'{next(iter(model_args))}= goes with a model\'s name; build the module with it instead')
    model = unwrap_model(model)
    if is_masked(model):
        raise PruningError("the model has a learner's masks; learner.export() cuts it, learner.remove() takes them off")
    return model, False


def _on(model: nn.Module, own: bool, device: Optional[Union[str, torch.device]]) -> nn.Module:
    if device is None:
        return model
    if own:
        with one_line(f'device {str(device)!r} can\'t be used'):
            return model.to(device)
    raise PruningError(f'device={str(device)!r} goes with a model\'s name; move the module there instead')


def matches(structure: Structure, pattern: str) -> bool:
    """Whether a layer whose output is part of the structure has this name, prefix or pattern."""
    if structure.kind == 'blocks':
        return _named(structure.name, pattern)
    names = {structure.name.partition('#')[0], structure.name}
    names.update(m.tensor.rpartition('.')[0] for m in structure.members if m.role == 'out')
    return any(_named(name, pattern) for name in names)


def _named(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(f'{pattern}.') or fnmatchcase(name, pattern)


def left_alone(structures: Sequence[Structure], exclude, only, kinds) -> set:
    """Names of the structures that the user wants left alone."""
    for option, patterns in (('exclude', exclude), ('only', only)):
        if isinstance(patterns, str):
            raise PruningError(f'{option}={patterns!r} was given; give a list of patterns: {option}=[{patterns!r}]')
        for pattern in patterns:
            if not any(matches(s, pattern) for s in structures):
                raise PruningError(
                    f'{option}: nothing that can be cut is named {pattern!r}; timm_epfs.inspect lists the names, such '
                    f'as {", ".join(s.name for s in structures[:3])}'
                )
    for kind in kinds:
        if kind not in KINDS:
            raise PruningError(f'kinds: there is no kind {kind!r}; choose among {", ".join(KINDS)}')
    return {
        s.name for s in structures
        if s.kind not in kinds
        or any(matches(s, p) for p in exclude)
        or (only and not any(matches(s, p) for p in only))
    }


def _nothing(traced: Trace) -> str:
    if traced.structures:
        return 'exclude=, only= and kinds= leave out every structure; loosen them'
    places = '; '.join(f'{s.where} ({s.why})' for s in traced.skipped[:3])
    return f'no structure of this model can be cut{": " + places if places else ""}'


def _recipe(**values: Any) -> Dict[str, Any]:
    """What was asked and by which versions; what was left at its default of nothing is left out."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}
    given = {key: value for key, value in plain.items() if value not in (None, [], {})}
    return {**given, 'timm_epfs': __version__, 'timm': timm.__version__, 'torch': torch.__version__.split('+')[0]}
