"""``Pruner``: a model, its trace, its scores and its latencies, for any number of cuts."""
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Callable, Dict, FrozenSet, Iterable, List, Optional, Sequence, Tuple, Union, cast

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..allocate import ALIGN, Allocation, cost_aware_width_weights
from ..core import DEFAULT_KINDS, KINDS, Budget, PruningError, first_few, named_tensors, refuse_unknown, step, warn
from ..importance import WITHOUT_DATA, Sensitivity, check_criterion
from ..latency import DeviceLatency
from ..plan import Plan, PrunedModel, make_plan, make_recipe
from ..surgery import compensate as compensate_cut
from ..surgery import cut_copy
from ..trace import meta_tensor
from ..zoo import base_of, plan_of, present_base_of
from .allocator import Allocator
from .dense_model import check_unmasked, prepare_model
from .inputs import Example, example_for, trace_model
from .inspection import Report, make_report
from .request import Choice, make_request
from .scorer import Scorer, Scores
from .selection import checked_options, describe_nothing, left_alone

__all__ = ['Pruner']

_STREAMS_ARE_CUT = (
    'to meet the budget, residual streams that are normalised over their channels were cut, which is not exact; '
    'fine-tune the model, or forbid such cuts with streams=False')


class Pruner:
    """Cuts a model to any number of budgets, from one trace.

    The constructor traces the model. Scores and latencies are computed when they are first needed, and then kept. The
    model itself is never changed. If its weights change, make a new pruner.

    >>> pruner = Pruner('resnet18')
    >>> half, third = pruner(macs=0.5), pruner(macs=0.33, criterion='l1')
    >>> round(third.pruning_plan.cost['macs'][1] / pruner.cost('macs'), 2)
    0.33

    Args:
        model: timm name, ``'torchvision/<name>'``, ``'local-dir:<folder>'``, ``'hf-hub:<repo>'``, or any module.
        data: Batches of images, or tuples that start with images. Units and widths are then chosen by what the network
            makes of these images, unless ``criterion`` is given, and every cut is compensated. Criteria that need
            targets take batches (images, targets).
        loss_fn: ``loss_fn(output, target)``, for the same criteria. None: cross-entropy.
        exclude: Patterns of layers whose outputs are not cut: names of layers or of modules (``'layer1'``: all layers
            in it), with or without wildcards (``'*.conv3'``, ``'layer?.0'``).
        only: Patterns of the only layers whose outputs are cut. None: all are.
        kinds: Kinds of units to cut: ``'channels'`` (or ``'filters'``, ``'neurons'``), ``'heads'``, ``'head_dims'``,
            ``'groups'`` and ``'blocks'``. None: all but blocks; and under ``latency``, where one search chooses widths
            and depth, blocks, too. Attention is cut by whole heads; with ``'head_dims'`` and without ``'heads'``, the
            same dims of all heads of a layer are cut.
        streams: Whether to cut residual streams that are normalised over their channels (ViT, ConvNeXt). Such a cut is
            never exact. None: only if the budget can't be met otherwise, with a warning.
        example_input: Input of the forward, for models that don't declare it: a tensor, a tuple of positional or a dict
            of keyword arguments, at batch 1. Only the shapes matter.
        device: Device of a model that is given by name. A module stays where it is.
        pretrained: Whether to load published weights, where ``model`` is a name.
        base: Name from which the dense model can be rebuilt, where ``model`` is a module that doesn't know its name.
        **model_args: Keyword arguments of the model, where ``model`` is a name (``num_classes``, ``in_chans``, …).

    Attributes:
        model: The dense model.
        name: Its name, or the name of its class.
        trace: Its trace.
        structures: The structures that may be cut.
        fixed: Names of all other structures.
        example: Positional and keyword arguments of a forward, on the meta device.
        base: Name and keyword arguments from which timm rebuilds the model; ``(None, {})`` where they aren't known.

    Raises:
        PruningError: There is no such model, it can't be traced, or a pattern matches nothing.
    """

    def __init__(
            self,
            model: Union[str, nn.Module],
            *,
            data: Optional[Iterable] = None,
            loss_fn: Optional[Callable] = None,
            exclude: Optional[Sequence[str]] = None,
            only: Optional[Sequence[str]] = None,
            kinds: Optional[Sequence[str]] = None,
            streams: Optional[bool] = None,
            example_input: Optional[Example] = None,
            device: Optional[Union[str, torch.device]] = None,
            pretrained: bool = False,
            base: Optional[str] = None,
            **model_args: Any,
    ):
        checked = checked_options(exclude, only, DEFAULT_KINDS if kinds is None else kinds, streams)
        self.exclude, self.only, self.kinds, self.streams = checked
        self.model = prepare_model(model, device, pretrained, model_args, ours=(Pruner.__init__, make_request))
        built_by_name = isinstance(model, str) and base is None
        self.base = base_of(self.model) if built_by_name else present_base_of(self.model, base)
        self.name = model if isinstance(model, str) else self.base[0] or type(self.model).__name__
        self.example = tree_map(_to_meta, example_for(self.model, example_input))
        whole_heads = 'heads' in self.kinds or 'head_dims' not in self.kinds
        with step(f'tracing {self.name}'):
            self.trace = trace_model(self.model, example_input, whole_heads)
        self.fixed = self._find_fixed(self.kinds)
        self.structures = tuple(s for s in self.trace.structures if s.name not in self.fixed)
        with_blocks = (*self.kinds, 'blocks') if kinds is None else self.kinds
        self._more_blocks = self.fixed - self._find_fixed(with_blocks)  # that latencies are met by, too
        self._scorer = Scorer(self.model, self.structures, data, loss_fn)
        self._latencies: Dict[Tuple[int, bool], DeviceLatency] = {}  # by the arguments of ``latency``
        self._equal_cuts: Dict[Tuple, float] = {}

    def __repr__(self) -> str:
        return f'<Pruner of {self.name}: {len(self.structures)} of {len(self.trace.structures)} structures may be cut>'

    def _find_fixed(self, kinds: Sequence[str]) -> FrozenSet[str]:
        fixed = left_alone(self.trace.structures, self.exclude, self.only, kinds)
        if self._earlier_plan is not None:
            fixed |= self._earlier_plan.uncomposable(self.trace.structures)
        return frozenset(fixed)

    @property
    def _earlier_plan(self) -> Optional[Plan]:
        """The plan by which the model was pruned before; None for a dense model."""
        return plan_of(self.model)

    def __call__(
            self,
            macs: Optional[Union[float, Budget]] = None,
            params: Optional[float] = None,
            *,
            compensate: bool = True,
            **options: Any,
    ) -> PrunedModel:
        """Cut a copy of the model to a budget. All other arguments, errors and warnings are those of ``plan``.

        Args:
            macs: As in ``plan``.
            params: As in ``plan``.
            compensate: Whether the weights that stay make up for those that went, where the pruner has ``data``
                (``timm_epfs.compensate``).
            **options: As in ``plan``.

        Returns:
            A smaller model of the same class, with its ``pruning_plan``.

        Raises:
            PruningError: As for ``plan``.

        Warns:
            UserWarning: As for ``plan``.
        """
        with step(f'cutting {self.name}'):
            plan = self._plan_cut(*_request(macs, params, **options))
            slim = cast(PrunedModel, cut_copy(self.model, plan))
        slim.pruning_plan = self.composed(plan)
        if compensate and self._scorer.has_data:
            compensate_cut(slim, self.model, self._scorer.data)
        return slim

    def plan(
            self,
            macs: Optional[Union[float, Budget]] = None,
            params: Optional[float] = None,
            **options: Any,
    ) -> Plan:
        """The plan of a cut, without the cut model.

        Args:
            macs: Budget of multiply-accumulates at batch 1: a share of the dense model's (``0.5``), a count above 1
                (``2e9``), or a whole ``Budget``.
            params: Budget of parameters: a share or a count.
            **options: As in ``prune``: ``latency``, ``latency_batch_size``, ``criterion``, ``scope``, ``widths``,
                ``round_to``, ``floor``, ``ratios``, ``seed``.

        Raises:
            PruningError: An argument is invalid, the budget is out of reach, or nothing may be cut.

        Warns:
            UserWarning: The budget is missed, by more than 1 % of the dense cost or more than 5 % of a latency; or
                residual streams had to be cut (``streams``).
        """
        return self.composed(self._plan_cut(*_request(macs, params, **options)))

    def check(self, macs: Optional[Union[float, Budget]] = None, **options: Any) -> None:
        """Check the arguments of ``plan``, without scores: raise where no scores could make the plan possible.

        A budget in milliseconds is not checked, since the dense model would have to be timed.

        Raises:
            PruningError: As for ``plan``.
        """
        budget, choice = _request(macs, **options)
        choice = choice.for_data(self._scorer.has_data)
        allocator = self._allocator_of(budget, choice)
        if not budget.in_milliseconds:
            allocation = allocator({s.name: np.ones(s.units) for s in allocator.free}, budget)
            self.composed(self._make_plan(allocation, {}))

    def inspect(self) -> Report:
        """Report what this pruner may cut of the model."""
        may_be_cut = [s for s in self.structures if not (s.stream and self.streams is False)]
        return make_report(self.name, self.trace, may_be_cut)

    def cost(self, quantity: str) -> float:
        """Cost of the dense model at batch 1.

        Args:
            quantity: ``'macs'``, ``'params'`` or ``'activations'``.
        """
        return self.trace.cost(quantity, self.trace.cost.counts({s.name: s.units for s in self.trace.structures}))

    def scores(self, criterion: str = 'l2', seed: int = 0) -> Scores:
        """Importance scores of every unit that may be cut, by structure name, shape (units,), higher = keep.

        Args:
            criterion: One of ``timm_epfs.CRITERIA``.
            seed: Seed of ``'random'``, and of the targets that ``'obdc'`` draws.

        Raises:
            PruningError: As for ``timm_epfs.importance.score``.
        """
        return self._scorer.scores(self.structures, criterion, seed)

    def sensitivity(self, criterion: str = 'obs', seed: int = 0) -> Sensitivity:
        """What the network's output loses as one structure after the other gets narrower, measured on the data.

        Each structure is narrowed in six steps, and the layers that read it make up for what goes. This takes as long
        as six forwards of up to 512 small or 42 large images for each structure. The first call measures; the result is
        kept.

        >>> images = torch.randn(8, 3, 32, 32)
        >>> sensitivity = Pruner('resnet20_cifar', data=images).sensitivity()
        >>> sensitivity.curves['layer1.0.conv1'].removed
        (2, 4, 6, 9, 11, 14)

        Args:
            criterion: Which units go first, one of ``timm_epfs.CRITERIA``.
            seed: As in ``scores``.

        Raises:
            PruningError: The pruner has no data, or the model's outputs can't be compared.
        """
        return self._scorer.sensitivity(self.structures, criterion, seed)

    def latency(self, batch_size: int = 1, together: bool = False) -> DeviceLatency:
        """Latency of the model's cuts on its device. The first call times the layers, for a minute or so.

        Args:
            batch_size: Number of images in a batch.
            together: Whether all processes that train together call this, and use the result alike: then the first one
                measures for all of them.
        """
        key = (batch_size, together)
        if key not in self._latencies:
            self._latencies[key] = DeviceLatency(self.model, self.trace, *self.example, batch_size, together)
        return self._latencies[key]

    def share_of_equal_cut(self, budget: Budget, allocator: Allocator, together: bool = False) -> float:
        """The share of the table's latency at which a cut of equal shares everywhere is measured to meet a budget.

        The table adds up timings of single layers, so it is a little off. This tells by how much, without knowing which
        units matter. It is measured once for each budget and allocator.

        Args:
            budget: A latency.
            allocator: Chooses units under that budget.
            together: As in ``latency``.
        """
        key = (together, budget, allocator.fixed, allocator.scope, allocator.round_to, allocator.align, allocator.floor)
        if key not in self._equal_cuts:
            equal_scores = {s.name: np.ones(s.units) for s in self.trace.structures}
            device = self.latency(budget.latency_batch_size, together)
            match = device.match(budget, lambda share: self._cut(allocator(equal_scores, budget.at(share))))
            self._equal_cuts[key] = match.share
        return self._equal_cuts[key]

    def composed(self, plan: Plan) -> Plan:
        """The plan from the dense base model, for one that was made on this model.

        The two differ where this model was already pruned: both cuts then become one plan.
        """
        return plan if self._earlier_plan is None else self._earlier_plan.compose(plan)

    def allocator(
            self,
            quantity: str,
            choice: Choice,
            latency_batch_size: int = 1,
            fixed: FrozenSet[str] = frozenset(),
            together: bool = False,
    ) -> Allocator:
        """An ``Allocator`` of this model's units, for budgets of one quantity.

        Args:
            quantity: Quantity of the budget: ``'macs'``, ``'params'`` or ``'latency'``.
            choice: How units are chosen. Where ``widths`` is a criterion, the widths depend on the size of the budget,
                so they are left to the caller (``Allocator.width_weights_by``).
            latency_batch_size: Number of images in a batch when latency is measured.
            fixed: Names of further structures to leave uncut.
            together: As in ``latency``.

        Raises:
            PruningError: ``widths`` is unknown or needs data that the pruner lacks, or is ``'cost'`` where blocks may
                be cut.
        """
        if choice.widths not in (None, 'cost', 'sensitivity', *WITHOUT_DATA):
            raise PruningError(
                f"widths={choice.widths!r} was given; choose 'sensitivity', 'cost', a criterion that needs no data "
                f'({", ".join(WITHOUT_DATA)}), or None')
        if choice.widths == 'sensitivity' and not self._scorer.has_data:
            raise PruningError("widths='sensitivity' needs images, found none; give data=, batches of images")
        fixed = self.fixed | fixed
        budget_is_latency = quantity == 'latency'
        measure_alignment = choice.round_to == 'auto' or (budget_is_latency and choice.round_to is None)
        device = self.latency(latency_batch_size, together) if budget_is_latency or measure_alignment else None
        cost = device.cost if budget_is_latency else self.trace.cost
        width_weights = None
        if choice.widths == 'cost':
            width_weights = cost_aware_width_weights(self.trace.structures, cost, quantity, fixed)
        return Allocator(
            self.trace.structures, cost, fixed, self.streams,
            scope=choice.scope,
            width_weights=width_weights,
            round_to=None if measure_alignment else choice.round_to,
            align=device.alignment() if measure_alignment else ALIGN,
            floor=choice.floor,
            ratios=choice.ratios,
        )

    # How a plan is made.

    def _plan_cut(self, budget: Budget, choice: Choice) -> Plan:
        """The plan that cuts this model to the budget."""
        choice = choice.for_data(self._scorer.has_data)
        allocator = self._allocator_of(budget, choice)
        free, measured = allocator.free, {}
        scores = self._scorer.scores(free, choice.criterion, choice.seed)
        width_scores = self.scores(choice.widths, choice.seed) if choice.widths in WITHOUT_DATA else None
        if choice.widths == 'sensitivity':
            sensitivity = self._scorer.sensitivity(free, choice.criterion, choice.seed)
            scores = sensitivity.scores(allocator.unit_prices(budget.quantity))

        if budget.quantity == 'latency':
            device = self.latency(budget.latency_batch_size)
            if choice.widths != 'sensitivity':
                scores = device.favour_slow_layers(scores)
            allocate_to = partial(_allocate, allocator, scores, width_scores)
            match = device.match(budget, lambda share: self._cut(allocate_to(budget.at(share))))
            allocation, problem = allocate_to(budget.at(match.share)), match.problem
            measured = {'latency_on': device.conditions, 'latency_ms': match.milliseconds}
        else:
            allocation = _allocate(allocator, scores, width_scores, budget)
            problem = allocation.problem

        if problem:
            warn(problem)
        if self.streams is None and allocator.cuts_streams(allocation):
            warn(_STREAMS_ARE_CUT)
        unfit = self._may_not_fit(allocation)
        if unfit:
            warn(
                f'no forward used {first_few(unfit)}, so nothing of them was cut, and they have as many entries as '
                f'something that was; give an example_input= that uses them, or exclude= what they read')
        return self._make_plan(allocation, self._recipe(budget, choice, allocator, **measured))

    def _allocator_of(self, budget: Budget, choice: Choice) -> Allocator:
        check_criterion(choice.criterion)
        check_unmasked(self.model)
        if not self.structures:
            why = describe_nothing(self.trace, self.exclude, self.only, self.kinds)
            raise PruningError(f'nothing is left to cut: {why}')
        allocator = self.allocator(budget.quantity, choice, budget.latency_batch_size)
        scores_decide = choice.scope == 'global' and choice.widths in (None, 'sensitivity')
        more = self._more_blocks if budget.quantity == 'latency' and scores_decide else frozenset()
        return replace(allocator, fixed=allocator.fixed - more)

    def _recipe(self, budget: Budget, choice: Choice, allocator: Allocator, **measured: Any) -> Dict[str, Any]:
        kinds = {*self.kinds, 'blocks'} if self._more_blocks - allocator.fixed else set(self.kinds)
        rounding = {'round_to': choice.round_to}
        if allocator.round_to != choice.round_to or allocator.align != ALIGN:  # the alignment was measured
            rounding = {'align': allocator.align}
        return make_recipe(
            method='one-shot', criterion=choice.criterion, scope=choice.scope, widths=choice.widths,
            floor=choice.floor, **budget.to_dict(), **rounding, exclude=list(self.exclude), only=list(self.only),
            ratios=dict(choice.ratios), streams=self.streams,
            kinds=[kind for kind in KINDS if kind in kinds] if kinds != set(DEFAULT_KINDS) else None,
            seed=choice.seed if choice.criterion == 'random' else None, **measured,
        )

    def _may_not_fit(self, allocation: Allocation) -> List[str]:
        """Parameters that no forward used, and that may belong to what is cut."""
        members = [m for s in self.structures if len(allocation.keep[s.name]) < s.units for m in s.members]
        tensors = named_tensors(self.model) if members and self.trace.unseen else {}
        lengths = {tensors[m.tensor].shape[m.dim] for m in members if m.tensor in tensors}
        return [name for name, shape in self.trace.unseen.items() if lengths & set(shape)]

    def _make_plan(self, allocation: Allocation, recipe: Dict[str, Any]) -> Plan:
        return make_plan(self.trace, allocation.keep, recipe, *self.base)

    def _cut(self, allocation: Allocation) -> nn.Module:
        return cut_copy(self.model, self._make_plan(allocation, {}))


def _request(
        macs: Optional[Union[float, Budget]],
        params: Optional[float] = None,
        **options: Any,
) -> Tuple[Budget, Choice]:
    """``make_request``, with an error for keywords that it doesn't have or that are a pruner's."""
    known, of_pruner = signature(make_request).parameters, signature(Pruner).parameters
    unknown = {name: value for name, value in options.items() if name not in known}
    for name in unknown:
        if name in of_pruner:
            raise PruningError(f'{name}= belongs to Pruner(model, {name}=…), not to a single cut; give it there')
    refuse_unknown(unknown, make_request, related=[Pruner.__init__])
    return make_request(macs, params, **options)


def _allocate(allocator: Allocator, scores: Scores, width_scores: Optional[Scores], budget: Budget) -> Allocation:
    """Choose the units that stay: by scores alone, or with widths that another criterion's scores give."""
    if width_scores is not None:
        allocator = replace(allocator, width_weights=allocator.width_weights_by(width_scores, budget))
    return allocator(scores, budget)


def _to_meta(value: Any) -> Any:
    return meta_tensor(value) if isinstance(value, torch.Tensor) else value
