"""``allocate``: from scores and a budget to the units that stay.

1. Every structure has a *grid*, the numbers of units that it may keep: multiples of its rounding step that are at least
   its floor, and all its units (``grids.py``).
2. The steps down all grids are put into one order, by the scores. This makes a *path* from the dense model to the
   smallest one (``path.py``).
3. Bisection finds the place on the path whose cost is nearest to the budget. If the steps there are too coarse, a few
   structures leave the path, those that lose the least importance by it (``search.py``).
4. In each structure, the units with the highest scores stay.
"""
from dataclasses import dataclass
from numbers import Integral
from typing import Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..core import Budget, CostModel, OutOfReach, PruningError, Structure, check_patterns, is_number, nearest, percent
from .grids import ALIGN, grid, rounding_step
from .search import TOLERANCE, Search
from .widths import in_proportion

__all__ = ['Allocation', 'SCOPES', 'allocate', 'top']

SCOPES = ('global', 'local', 'isomorphic')
_ALLOW_MORE = 'allow more to be cut with kinds=, exclude= or only='


@dataclass(frozen=True)
class Allocation:
    """The units that stay, and how near they come to the budget.

    Attributes:
        keep: Units that stay by structure name, ascending, int64.
        target: The budget, as a share of the dense model's cost.
        achieved: The cost of the units that stay, as a share of the dense model's cost.
        problem: Why ``achieved`` differs from ``target`` by more than 1 % of the dense cost, and what to do, in a line.
            Empty where it doesn't.
    """
    keep: Dict[str, np.ndarray]
    target: float
    achieved: float
    problem: str = ''


def allocate(
        structures: Sequence[Structure],
        scores: Mapping[str, np.ndarray],
        cost: CostModel,
        budget: Budget,
        *,
        scope: str = 'global',
        width_weights: Optional[Mapping[str, float]] = None,
        round_to: Optional[int] = None,
        align: int = ALIGN,
        floor: float = 0.05,
        ratios: Optional[Mapping[str, float]] = None,
        fixed: Collection[str] = (),
) -> Allocation:
    """Choose the units that stay, so that the cost meets the budget.

    Each structure keeps the units with the highest scores, and among equal scores those that come first. Where scores
    are equal between structures, each of these loses the same share of its units.

    A convolution of 64 channels may cost an eighth, so its best 8 channels stay:

    >>> from timm_epfs.core import Size
    >>> conv = Structure('conv', 'channels', units=64, members=())
    >>> cost = CostModel(['conv'], [('macs', 9.0, (Size(0, (('conv', 1),)),))])
    >>> allocate([conv], {'conv': np.arange(64)}, cost, Budget(macs=0.125)).keep
    {'conv': array([56, 57, 58, 59, 60, 61, 62, 63])}

    Args:
        structures: All structures of the cost model.
        scores: Importance scores by structure name, shape (units,), comparable between structures, higher = keep.
        cost: Prices a vector of counts.
        budget: What the cut model may cost.
        scope: ``'global'`` ranks all units together. ``'local'`` cuts the same share of every structure.
            ``'isomorphic'`` ranks structures of the same shape together, and cuts the same share of every such set
            (Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024).
        width_weights: Weights by structure name. These structures keep units in proportion to their weights, and their
            scores only decide which. Structures without a weight are ranked by their scores.
        round_to: Channel structures that are cut keep widths that are multiples of this. None: multiples of ``align``
            where there are at least 4 · ``align`` units; elsewhere multiples of the largest power of two that is at
            most an eighth of the units. Where the budget can't be met so, as few structures as possible keep other
            widths.
        align: Width that wide layers are multiples of, a power of two.
        floor: Smallest share of its units that a structure keeps, and at least one unit. Blocks have no floor.
        ratios: Shares of units to remove, by pattern as ``Structure.matches`` reads it. If several patterns match, the
            longest counts. These structures are set first; all others then meet the budget.
        fixed: Names of structures that are not cut.

    Returns:
        The units that stay of every structure.

    Raises:
        OutOfReach: The smallest allowed cut costs more than the budget.
        PruningError: An argument is invalid.
    """
    _check_options(scope, round_to, floor)
    by_name = {s.name: s for s in structures}
    if not by_name or sorted(by_name) != sorted(cost.names):
        raise PruningError('structures and cost model have different names; take both from one trace')
    # In the cost model's order, so that the result doesn't depend on the order in which structures are listed.
    ordered = [by_name[name] for name in cost.names]
    shares = _shares(ordered, ratios or {}, fixed, floor)
    values = {s.name: _values(s, scores, shares.get(s.name)) for s in ordered}

    grids = [grid(s, rounding_step(s, round_to, align), floor, shares.get(s.name)) for s in ordered]
    finest = [g if s.name in shares else grid(s, 1, floor) for s, g in zip(ordered, grids)]
    width_weights = width_weights or {}
    descending = [
        in_proportion(width_weights[s.name], s.units) if s.name in width_weights else np.sort(values[s.name])[::-1]
        for s in ordered
    ]

    search = Search(cost, budget, grids, descending)
    _check_reach(search, finest, floor)
    search, place = _nearest_place(search, _sets(ordered, scope), finest if round_to is None else None)
    left = dict(zip(cost.names, search.choices[place]))
    gap = search.gap(place)
    return Allocation(
        keep={name: top(values[name], left[name]) for name in by_name},
        target=search.target,
        achieved=search.target + gap,
        problem=_problem(search, place, round_to, finest) if abs(gap) > TOLERANCE else '',
    )


def top(scores: np.ndarray, left: int) -> np.ndarray:
    """The units with the highest scores, and among equal scores those that come first.

    >>> top(np.array([3.0, 1.0, 2.0, 2.0]), 2)
    array([0, 2])
    >>> top(np.array([3.0, 1.0, 2.0, 2.0]), 0)
    array([], dtype=int64)

    Args:
        scores: Scores, shape (units,), floating-point.
        left: How many units to return.

    Returns:
        Units, ascending, int64, shape (left,).
    """
    return np.sort(np.argsort(-scores, kind='stable')[:left]).astype(np.int64)


def _nearest_place(
        search: Search,
        sets: np.ndarray,
        finest: Optional[List[np.ndarray]],
) -> Tuple[Search, np.ndarray]:
    """Find the place that is nearest to the budget; and the search whose grids it is on.

    If ``finest`` grids are given, a few structures get finer grids where the budget can't be met otherwise.
    """
    place = search.repair(search.walk(sets))
    if abs(search.gap(place)) > TOLERANCE:
        place = search.try_coarsest(place, sets)
    while finest is not None and abs(search.gap(place)) > TOLERANCE:
        refined = search.refine(place, finest)
        if refined is None:
            break
        search, start = refined
        place = search.repair(start)
    return search, place


def _sets(structures: Sequence[Structure], scope: str) -> np.ndarray:
    """The set of structures that each structure is ranked with, numbered from 0, shape (structures,)."""
    keys = []
    for s in structures:
        members = sorted((m.role, m.dim, m.tensor.rpartition('.')[2], m.index.shape[1]) for m in s.members)
        shape = (s.kind, s.units, *members)
        keys.append({'global': (), 'local': (s.name,), 'isomorphic': shape}[scope])
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _shares(
        structures: Sequence[Structure],
        ratios: Mapping[str, float],
        fixed: Collection[str],
        floor: float,
) -> Dict[str, float]:
    """The share of units to remove, by structure name, where ``ratios`` or ``fixed`` sets it."""
    unknown = sorted(set(fixed) - {s.name for s in structures})
    if unknown:
        raise PruningError(f'fixed= names {unknown[0]!r}, but there is no such structure; give names of structures')
    check_patterns('ratios', ratios, structures, fixed, 'exclude=, only=, kinds=, streams= or fixed=')
    shares = dict.fromkeys(fixed, 0.0)
    for pattern in sorted(ratios, key=lambda pattern: (-len(pattern), pattern)):
        share = ratios[pattern]
        if not is_number(share) or not 0 <= share <= 1 - floor + 1e-9:
            raise PruningError(
                f'ratios= has {share!r} for {pattern!r}; give a share from 0 to {1 - floor:g} (1 - floor)')
        for s in structures:
            if s.matches(pattern):
                shares.setdefault(s.name, float(share))
    return shares


def _values(structure: Structure, scores: Mapping[str, np.ndarray], share: Optional[float]) -> np.ndarray:
    """The scores of a structure, checked. One that isn't cut needs none."""
    if share == 0:
        return np.zeros(structure.units)
    if structure.name not in scores:
        raise PruningError(f'{structure.name} has no scores; give one score per unit, or name it in fixed=')
    values = np.asarray(scores[structure.name], dtype=np.float64)
    if values.shape != (structure.units,):
        raise PruningError(
            f'{structure.name} has scores of shape {values.shape} for {structure.units} units; give one score per unit')
    if not np.isfinite(values).all():
        raise PruningError(f'{structure.name} has scores that are not finite; look for NaN or inf in its weights')
    return values


def _check_options(scope: str, round_to: Optional[int], floor: float) -> None:
    if scope not in SCOPES:
        near = nearest(scope, SCOPES)
        hint = f', nearest is {near[0]!r}' if near else ''
        raise PruningError(f'scope={scope!r} was given{hint}; choose one of {", ".join(SCOPES)}')
    if round_to is not None and not (is_number(round_to) and isinstance(round_to, Integral) and round_to >= 1):
        raise PruningError(f'round_to={round_to!r} was given; give a positive integer or None')
    if not is_number(floor) or not 0 <= floor < 1:
        raise PruningError(f'floor={floor!r} was given; give the smallest share of units to keep, from 0 to below 1')


def _check_reach(search: Search, finest: List[np.ndarray], floor: float) -> None:
    lowest = search.price(np.array([counts[0] for counts in finest]))
    if search.target < lowest - 1e-9:
        raise OutOfReach(
            f'asked for {percent(search.target)} of the {search.label}, the largest possible cut leaves '
            f'{percent(lowest)} (floor={percent(floor)} of the units); lower floor=, or {_ALLOW_MORE}')


def _problem(search: Search, place: np.ndarray, round_to: Optional[int], finest: List[np.ndarray]) -> str:
    """Why the budget is missed, and what to do."""
    if search.price(np.array([counts[-1] for counts in finest])) < search.target:
        cause, remedy = 'ratios= alone removes that much', 'give smaller shares there'
    elif round_to is not None and any(len(counts) < len(fine) for counts, fine in zip(search.grids, finest)):
        cause, remedy = f'widths are rounded by round_to={round_to}', 'give a smaller number, or None'
    else:
        cause, remedy = 'only whole units can be cut', _ALLOW_MORE
    return (
        f'the nearest cut found leaves {percent(search.target + search.gap(place))} of the {search.label}, '
        f'{percent(search.target)} were asked for, because {cause}; {remedy}')
