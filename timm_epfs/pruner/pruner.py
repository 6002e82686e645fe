"""``Pruner``: a model, its trace and what else was found out about it, for any number of cuts."""
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, FrozenSet, Iterable, Mapping, Optional, Sequence, Tuple, Union, cast

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import nn
from torch.utils._pytree import tree_map

from ..allocate import ALIGN, Allocation, cost_aware_widths
from ..core import DEFAULT_KINDS, Budget, PruningError, kinds_named, nearest_keyword, one_line, refuse_unknown, warn
from ..importance import WITHOUT_DATA, check_criterion, score
from ..latency import DeviceLatency
from ..plan import Plan, PrunedModel, make_plan, make_recipe
from ..surgery import cut_copy, is_masked
from ..zoo import base_of, create_model
from .allocator import Allocator
from .inputs import Example, example_for, trace_model
from .inspection import Report, make_report
from .selection import describe_nothing, left_alone

__all__ = ['Choice', 'Pruner']

_CUT_STREAMS = (
    'the budget needs residual streams that are normalised over their channels to be cut: masking and cutting differ '
    'there, fine-tune after; streams=False forbids it')


@dataclass(frozen=True)
class Choice:
    """How the units that stay are chosen; the fields are arguments of ``prune``."""
    criterion: str = 'l2'
    scope: str = 'global'
    widths: Optional[str] = None
    round_to: Optional[Union[int, str]] = None
    floor: float = 0.05
    ratios: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


class Pruner:
    """Cuts a model, as often as asked, of which it finds out everything once.

    The model is traced when the pruner is made; scores and latencies are found out when they are first needed, and
    kept. The model itself is never changed. If its weights change, make a new pruner.

    >>> pruner = Pruner('resnet18')
    >>> half, third = pruner(macs=0.5), pruner(macs=0.33, criterion='l1')
    >>> round(third.pruning_plan.cost['macs'][1] / pruner.cost('macs'), 2)
    0.33

    Args:
        model: timm name, ``'torchvision/<name>'``, ``'local-dir:<folder>'``, ``'hf-hub:<repo>'``, or any module.
        data: Batches (images, targets) for criteria that need them.
        loss_fn: ``loss_fn(output, target)`` for these. None: cross-entropy.
        exclude: Patterns of layers whose outputs are not to be cut: names, prefixes of modules (``'layer1'``), or with
            wildcards (``'*.conv3'``).
        only: The same, of the only layers to cut.
        kinds: Kinds of units to cut: ``'channels'`` (or ``'filters'``, ``'neurons'``), ``'heads'``, ``'head_dims'``,
            ``'groups'``, and, only where it is named, ``'blocks'``. Attention is cut by whole heads; with
            ``'head_dims'`` and without ``'heads'``, by the dims of all heads of a layer.
        streams: Whether to cut residual streams that are normalised over their channels (ViT, ConvNeXt), which can't
            be done exactly. None: only where the budget can't be met without, with a warning.
        example_input: What the forward takes, where that isn't known: a tensor, a tuple of positional or a dict of
            keyword arguments; batch 1, only shapes matter.
        device: Device of a model that is given by name; a module stays where it is.
        pretrained: Load published weights, where ``model`` is a name.
        base: Name from which the dense model can be rebuilt, where ``model`` is a module that doesn't say.
        **model_args: Keyword arguments of the model, where ``model`` is a name (``num_classes``, ``in_chans``, …).

    Attributes:
        model: The dense model.
        name: Its name, or that of its class.
        trace: What its trace found.
        structures: The structures that may be cut.
        fixed: Names of the others.
        example: Positional and keyword arguments of a forward, on the meta device.
        base: Name and keyword arguments from which timm rebuilds the model, ``(None, {})`` where they aren't known.

    Raises:
        PruningError: There is no such model, it can't be traced, or nothing of it may be cut.
    """

    def __init__(
            self,
            model: Union[str, nn.Module],
            *,
            data: Optional[Iterable] = None,
            loss_fn: Optional[Callable] = None,
            exclude: Sequence[str] = (),
            only: Sequence[str] = (),
            kinds: Sequence[str] = DEFAULT_KINDS,
            streams: Optional[bool] = None,
            example_input: Optional[Example] = None,
            device: Optional[Union[str, torch.device]] = None,
            pretrained: bool = False,
            base: Optional[str] = None,
            **model_args: Any,
    ):
        self.kinds, self.exclude, self.only, self.streams = kinds_named(kinds), tuple(exclude), tuple(only), streams
        if isinstance(model, str):
            self.model = _build(model, device, pretrained, model_args)
        else:
            self.model = _given(model, device, model_args)
        self.base = base_of(self.model) if base is None else (base, {})
        self.name = model if isinstance(model, str) else self.base[0] or type(self.model).__name__
        self.example = tree_map(_to_meta, example_for(self.model, example_input))
        whole_heads = 'heads' in self.kinds or 'head_dims' not in self.kinds
        self.trace = trace_model(self.model, example_input, whole_heads)
        self.fixed = self._find_fixed(exclude, only)
        self.structures = tuple(s for s in self.trace.structures if s.name not in self.fixed)
        self._data, self._loss_fn = data, loss_fn
        self._scores: Dict[Tuple[str, int], Dict[str, np.ndarray]] = {}
        self._latencies: Dict[int, DeviceLatency] = {}
        self._equal_cuts: Dict[Tuple, float] = {}

    def _find_fixed(self, exclude: Sequence[str], only: Sequence[str]) -> FrozenSet[str]:
        fixed = left_alone(self.trace.structures, exclude, only, self.kinds)
        earlier = self._earlier_plan
        return frozenset(fixed | (earlier.uncomposable(self.trace.structures) if earlier else set()))

    @property
    def _earlier_plan(self) -> Optional[Plan]:
        """The plan that the model was pruned by before."""
        plan = getattr(self.model, 'pruning_plan', None)
        return plan if isinstance(plan, Plan) else None

    def __call__(
            self,
            macs: Optional[Union[float, Budget]] = None,
            params: Optional[float] = None,
            **options: Any,
    ) -> PrunedModel:
        """A cut copy of the model, of the same class, with its ``pruning_plan``. Arguments are those of ``plan``.

        Raises:
            PruningError: As ``plan`` does.

        Warns:
            UserWarning: As ``plan`` does.
        """
        step = self._step(*_request(macs, params, **options))
        slim = cast(PrunedModel, cut_copy(self.model, step))
        slim.pruning_plan = self.composed(step)
        return slim

    def plan(
            self,
            macs: Optional[Union[float, Budget]] = None,
            params: Optional[float] = None,
            **options: Any,
    ) -> Plan:
        """The plan of a cut, without the cut model.

        Args:
            macs: Budget of multiply-accumulates at batch 1: a share of the dense model, or a count of more than 1; or a
                whole ``Budget``.
            params: Budget of parameters, likewise.
            **options: Further arguments, as of ``prune``: ``latency``, ``latency_batch_size``, ``criterion``,
                ``scope``, ``widths``, ``round_to``, ``floor``, ``ratios``, ``seed``.

        Raises:
            PruningError: What was asked for can't be done.

        Warns:
            UserWarning: The budget was missed: by more than 1 % of the dense cost, or by more than 5 % of a latency.
        """
        return self.composed(self._step(*_request(macs, params, **options)))

    def check(self, macs: Optional[Union[float, Budget]] = None, **options: Any) -> None:
        """Refuse what can't be done whatever the scores and the clock say. Arguments are those of ``plan``.

        Raises:
            PruningError: As ``plan`` does.
        """
        budget, choice = _request(macs, **options)
        allocator = self._allocator_of(budget, choice)
        if not budget.in_milliseconds:
            scores = {s.name: np.ones(s.units) for s in self.structures}
            allocation = allocator(scores, budget)
            self.composed(self._make_plan(allocation, {}))

    def inspect(self) -> Report:
        """What can be cut of the model."""
        return make_report(self.name, self.trace)

    def cost(self, quantity: str) -> float:
        """What the dense model costs: ``'macs'``, ``'params'``, or ``'activations'``."""
        return self.trace.cost(quantity, self.trace.cost.counts({s.name: s.units for s in self.trace.structures}))

    def scores(self, criterion: str = 'l2', seed: int = 0) -> Dict[str, np.ndarray]:
        """Importance of every unit that may be cut, by structure name, shape (units,), higher = keep.

        Args:
            criterion: One of ``timm_epfs.CRITERIA``.
            seed: For ``'random'``, and for what ``'obdc'`` draws.

        Raises:
            PruningError: As ``timm_epfs.importance.score`` does.
        """
        key = (criterion, seed)
        if key not in self._scores:
            self._scores[key] = score(
                self.model, self.structures, criterion, data=self._data, loss_fn=self._loss_fn, seed=seed)
        return self._scores[key]

    def latency(self, batch_size: int = 1) -> DeviceLatency:
        """What cuts of the model take on its device; layers are timed the first time, for a minute or so.

        Args:
            batch_size: Images in a batch.
        """
        if batch_size not in self._latencies:
            self._latencies[batch_size] = DeviceLatency(self.model, self.trace, *self.example, batch_size)
        return self._latencies[batch_size]

    def share_of_equal_cut(self, budget: Budget, allocator: Allocator) -> float:
        """The share of the table's latency at which a cut of equal shares everywhere takes as long as a budget allows.

        It says nothing about which units matter, only how far the table is off, and is measured once.

        Args:
            budget: A latency.
            allocator: What allocates under it.
        """
        key = (budget, allocator.fixed, allocator.scope, allocator.round_to, allocator.align, allocator.floor)
        if key not in self._equal_cuts:
            scores = {s.name: np.ones(s.units) for s in self.trace.structures}

            def cut(share: float) -> nn.Module:
                return cut_copy(self.model, self._make_plan(allocator(scores, budget.at(share)), {}))

            self._equal_cuts[key] = self.latency(budget.latency_batch_size).match(budget, cut).share
        return self._equal_cuts[key]

    def composed(self, step: Plan) -> Plan:
        """A plan that was made on the model, as one from the dense base where the model was pruned before."""
        return step if self._earlier_plan is None else self._earlier_plan.compose(step)

    def allocator(
            self,
            quantity: str,
            choice: Choice,
            latency_batch_size: int = 1,
            fixed: FrozenSet[str] = frozenset(),
    ) -> Allocator:
        """What allocates units of this model under budgets of one quantity.

        Args:
            quantity: ``'macs'``, ``'params'`` or ``'latency'``: what cuts are priced by.
            choice: How units are chosen. Where ``widths`` is a criterion, its widths depend on the amount, and are
                left to the caller (``Allocator.widths_by``).
            latency_batch_size: Images in a batch, where time is measured.
            fixed: Names of further structures to leave alone.

        Raises:
            PruningError: There are no such widths, or they are asked for of blocks.
        """
        if choice.widths not in (None, 'cost', *WITHOUT_DATA):
            raise PruningError(
                f"widths={choice.widths!r} was given; choose 'cost', a criterion that needs no data "
                f'({", ".join(WITHOUT_DATA)}), or None')
        timed, fixed = quantity == 'latency', self.fixed | fixed
        measured = choice.round_to == 'auto' or (timed and choice.round_to is None)
        device = self.latency(latency_batch_size) if timed or measured else None
        cost = device.cost if timed else self.trace.cost
        weights = None
        if choice.widths == 'cost':
            weights = cost_aware_widths(self.trace.structures, cost, quantity, fixed)
        return Allocator(
            self.trace.structures, cost, fixed, self.streams, choice.scope, weights,
            None if measured else choice.round_to, device.alignment() if measured else ALIGN, choice.floor,
            choice.ratios,
        )

    def _step(self, budget: Budget, choice: Choice) -> Plan:
        """The plan that takes the model, as it is, to the budget."""
        allocator = self._allocator_of(budget, choice)
        scores, by_time = self.scores(choice.criterion, choice.seed), {}
        width_scores = None if choice.widths in (None, 'cost') else self.scores(choice.widths, choice.seed)

        def find(amount: Budget) -> Allocation:
            if width_scores is None:
                return allocator(scores, amount)
            return replace(allocator, widths=allocator.widths_by(width_scores, amount))(scores, amount)

        if budget.quantity == 'latency':
            device = self.latency(budget.latency_batch_size)
            scores = device.favour_slow_layers(scores)
            match = device.match(
                budget, lambda share: cut_copy(self.model, self._make_plan(find(budget.at(share)), {})))
            allocation, problem = find(budget.at(match.share)), match.problem
            by_time = {'latency_on': device.place, 'latency_ms': match.milliseconds}
        else:
            allocation = find(budget)
            problem = allocation.problem
        for message in (problem, _CUT_STREAMS if self.streams is None and allocator.cuts_streams(allocation) else ''):
            if message:
                warn(message)
        return self._make_plan(allocation, self._recipe(budget, choice, allocator, **by_time))

    def _allocator_of(self, budget: Budget, choice: Choice) -> Allocator:
        check_criterion(choice.criterion)
        if is_masked(self.model):
            raise PruningError(
                "the model has a learner's masks; learner.export() cuts it, learner.remove() takes them off")
        if not self.structures:
            raise PruningError(f'nothing is left to cut: {describe_nothing(self.trace)}')
        return self.allocator(budget.quantity, choice, budget.latency_batch_size)

    def _recipe(self, budget: Budget, choice: Choice, allocator: Allocator, **more: Any) -> Dict[str, Any]:
        rounding = {'round_to': choice.round_to}
        if allocator.round_to != choice.round_to or allocator.align != ALIGN:  # measured
            rounding = {'align': allocator.align}
        return make_recipe(
            method='one-shot', criterion=choice.criterion, scope=choice.scope, widths=choice.widths,
            floor=choice.floor, **budget.to_dict(), **rounding, exclude=list(self.exclude), only=list(self.only),
            ratios=dict(choice.ratios), streams=self.streams,
            kinds=list(self.kinds) if set(self.kinds) != set(DEFAULT_KINDS) else None,
            seed=choice.seed if choice.criterion == 'random' else None, **more,
        )

    def _make_plan(self, allocation: Allocation, recipe: Dict[str, Any]) -> Plan:
        return make_plan(self.trace, allocation.keep, recipe, *self.base)


def _request(
        macs: Optional[Union[float, Budget]] = None,
        params: Optional[float] = None,
        *,
        latency: Optional[Union[float, str]] = None,
        latency_batch_size: int = 1,
        criterion: str = 'l2',
        scope: str = 'global',
        widths: Optional[str] = None,
        round_to: Optional[Union[int, str]] = None,
        floor: float = 0.05,
        ratios: Optional[Mapping[str, float]] = None,
        seed: int = 0,
        **unknown: Any,
) -> Tuple[Budget, Choice]:
    """The arguments of a cut as two objects, checked."""
    refuse_unknown(unknown, _request)
    budget = Budget.given(macs, params, latency, latency_batch_size) or Budget()  # which says that there is none
    return budget, Choice(criterion, scope, widths, round_to, floor, dict(ratios or {}), seed)


def _build(
        name: str,
        device: Optional[Union[str, torch.device]],
        pretrained: bool,
        model_args: Dict[str, Any],
) -> nn.Module:
    """The model of a name, on its device; on the meta device without ever making its weights."""
    meta = device is not None and str(device) == 'meta'
    try:
        with torch.device('meta') if meta else nullcontext():
            model = create_model(name, pretrained, **model_args)
    except PruningError as e:
        if isinstance(e.__cause__, TypeError):
            _refuse_misspelt(model_args)
        raise
    if device is None or meta:
        return model
    with one_line(f'device {str(device)!r} can\'t be used'):
        return model.to(device)


def _given(
        model: nn.Module,
        device: Optional[Union[str, torch.device]],
        model_args: Dict[str, Any],
) -> nn.Module:
    """A module that a user gave, out of its wrappers."""
    if not isinstance(model, nn.Module):
        raise PruningError(f'a model was asked for, {type(model).__name__} was given; give a name or an nn.Module')
    _refuse_misspelt(model_args)
    if model_args:
        raise PruningError(f'{next(iter(model_args))}= goes with a model\'s name; build the module with it instead')
    if device is not None:
        raise PruningError(f'device={str(device)!r} goes with a model\'s name; move the module there instead')
    model = unwrap_model(model)
    if is_masked(model):
        raise PruningError("the model has a learner's masks; learner.export() cuts it, learner.remove() takes them off")
    return model


def _refuse_misspelt(model_args: Mapping[str, Any]) -> None:
    """Raise ``PruningError`` where what was taken for an argument of the model is nearly one of ours."""
    for name in model_args:
        near = nearest_keyword(name, Pruner.__init__, _request)
        if near:
            raise PruningError(f'unknown keyword {name}=; did you mean {near}=?')


def _to_meta(value: Any) -> Any:
    return value.to('meta') if isinstance(value, torch.Tensor) else value
