"""Scores and a budget in, the units that stay out.

Every structure may keep the counts of its *grid*: multiples of its rounding step from its floor on, or all its units.
The steps down all grids are put in one order, so that cutting more is walking further along one path, and the budget
is a place on that path, found by bisection. Where the steps are too coarse to meet it there, a few structures leave the
path: those that lose the least importance.
"""
from dataclasses import dataclass
from numbers import Integral
from typing import Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..core import Budget, CostModel, OutOfReach, PruningError, Structure, is_number, percent
from .grids import ALIGN, grid, rounding_step
from .search import TOLERANCE, Search
from .widths import in_proportion

__all__ = ['Allocation', 'SCOPES', 'allocate', 'top']

SCOPES = ('global', 'local', 'isomorphic')


@dataclass(frozen=True)
class Allocation:
    """The units that stay, and how near they come to the budget.

    Attributes:
        keep: Units that stay by structure name, ascending, int64.
        asked: Cost that was asked for, as a share of the dense model's.
        got: Cost of what stays, likewise.
        problem: What keeps the cost more than 1 % of the dense model's away from what was asked, and what to do, in a
            line; empty where it is nearer.
    """
    keep: Dict[str, np.ndarray]
    asked: float
    got: float
    problem: str = ''


def allocate(
        structures: Sequence[Structure],
        scores: Mapping[str, np.ndarray],
        cost: CostModel,
        budget: Budget,
        *,
        scope: str = 'global',
        widths: Optional[Mapping[str, float]] = None,
        round_to: Optional[int] = None,
        align: int = ALIGN,
        floor: float = 0.05,
        ratios: Optional[Mapping[str, float]] = None,
        fixed: Collection[str] = (),
) -> Allocation:
    """Choose the units that stay, so that the cost lands on the budget.

    In each structure the highest scores stay, among equal ones those that come first. Equal scores in different
    structures are cut by equal shares.

    >>> from timm_epfs.core import Size
    >>> conv = Structure('conv', 'channels', units=64, members=())
    >>> cost = CostModel(['conv'], [('macs', 9.0, (Size(0, (('conv', 1),)),))])
    >>> allocate([conv], {'conv': np.arange(64)}, cost, Budget(macs=0.125)).keep
    {'conv': array([56, 57, 58, 59, 60, 61, 62, 63])}

    Args:
        structures: Everything that the cost model counts.
        scores: Importance by structure name, shape (units,), comparable between structures.
        cost: Prices a vector of counts.
        budget: What may be left.
        scope: ``'global'`` ranks all units together, ``'local'`` cuts the same share of every structure,
            ``'isomorphic'`` ranks structures of one shape together and cuts the same share of every such set (Fang et
            al., Isomorphic Pruning for Vision Models, ECCV 2024).
        widths: Weights by structure name, in proportion to which structures keep units; scores then only say which.
            Structures that have none are ranked by their scores.
        round_to: Channel structures that are cut keep widths that are multiples of this. None: of ``align`` where
            there are four times as many units, elsewhere of the largest power of two of which there are eight; and any
            width in as few structures as possible where the budget needs it.
        align: A power of two, what wide layers are to be multiples of.
        floor: Share of its units that every structure but a block keeps, one unit at least.
        ratios: Shares of units to remove by pattern, as ``Structure.matches`` reads it; of several that match, the
            longest counts. These are set first, the rest meets the budget.
        fixed: Names of structures to leave uncut.

    Raises:
        OutOfReach: The floors, or what is left alone, cost more than the budget.
        PruningError: An argument is not what it should be.
    """
    _check_options(scope, round_to, floor)
    by_name = {s.name: s for s in structures}
    if not by_name or sorted(by_name) != sorted(cost.names):
        raise PruningError('structures and cost model do not name the same things; take both from one trace')
    # In the cost model's order, so that the order in which structures are listed decides nothing.
    ordered = [by_name[name] for name in cost.names]
    shares = _shares(ordered, ratios or {}, fixed, floor)
    values = {s.name: _values(s, scores, shares.get(s.name)) for s in ordered}

    grids = [grid(s, rounding_step(s, round_to, align), floor, shares.get(s.name)) for s in ordered]
    finest = [g if s.name in shares else grid(s, 1, floor) for s, g in zip(ordered, grids)]
    worth = [
        in_proportion(widths[s.name], s.units) if s.name in (widths or {}) else np.sort(values[s.name])[::-1]
        for s in ordered
    ]
    search = Search(cost, budget, grids, worth)
    _check_reach(search, finest, floor)
    search, at = _nearest_place(search, _sets(ordered, scope), finest if round_to is None else None)
    left = dict(zip(cost.names, search.choices[at]))
    return Allocation(
        {name: top(values[name], left[name]) for name in by_name}, search.asked, search.asked + search.gap(at),
        _problem(search, at, round_to, finest) if abs(search.gap(at)) > TOLERANCE else '',
    )


def top(scores: np.ndarray, left: int) -> np.ndarray:
    """The units with the highest scores, among equal ones those that come first, ascending, int64, shape (left,).

    >>> top(np.array([3.0, 1.0, 2.0, 2.0]), 2)
    array([0, 2])
    """
    threshold = np.partition(scores, -left)[-left]
    above, ties = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    return np.sort(np.append(above, ties[:left - len(above)])).astype(np.int64)


def _nearest_place(
        search: Search,
        sets: np.ndarray,
        finest: Optional[List[np.ndarray]],
) -> Tuple[Search, np.ndarray]:
    """The place on its grids that is nearest to the budget, with finer grids for a few structures if they are given."""
    at = search.repair(search.walk(sets))
    if abs(search.gap(at)) > TOLERANCE:
        at = search.settle_coarsest(at, sets)
    while finest is not None and abs(search.gap(at)) > TOLERANCE:
        refined = search.refine(at, finest)
        if refined is None:
            break
        search, at = refined[0], refined[0].repair(refined[1])
    return search, at


def _sets(structures: Sequence[Structure], scope: str) -> np.ndarray:
    """The set that each structure is ranked in, numbered from 0, shape (structures,)."""
    keys = []
    for s in structures:
        members = sorted((m.role, m.dim, m.tensor.rpartition('.')[2], m.index.shape[1]) for m in s.members)
        keys.append({'global': (), 'local': (s.name,), 'isomorphic': (s.kind, s.units, *members)}[scope])
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _shares(
        structures: Sequence[Structure],
        ratios: Mapping[str, float],
        fixed: Collection[str],
        floor: float,
) -> Dict[str, float]:
    """The share of units to remove, where it is set before the search."""
    unknown = sorted(set(fixed) - {s.name for s in structures})
    if unknown:
        raise PruningError(f'fixed= names {unknown[0]!r}, which no structure is called; use names of structures')
    shares = dict.fromkeys(fixed, 0.0)
    for pattern in sorted(ratios, key=lambda pattern: (-len(pattern), pattern)):
        share = ratios[pattern]
        if not is_number(share) or not 0 <= share <= 1 - floor + 1e-9:
            raise PruningError(
                f'ratios= asks to remove {share!r} of {pattern!r}; give a share from 0 to {1 - floor:g} (1 - floor)')
        matches = [s.name for s in structures if s.matches(pattern)]
        if not set(matches) - set(fixed):
            raise PruningError(f'ratios= names {pattern!r}, which matches no structure that may be cut; check the name')
        for name in matches:
            shares.setdefault(name, float(share))
    return shares


def _values(structure: Structure, scores: Mapping[str, np.ndarray], share: Optional[float]) -> np.ndarray:
    if share == 0:
        return np.zeros(structure.units)
    if structure.name not in scores:
        raise PruningError(f'{structure.name} has no scores; give one score a unit, or name it in fixed=')
    values = np.asarray(scores[structure.name], dtype=np.float64)
    if values.shape != (structure.units,):
        raise PruningError(
            f'{structure.name} has scores of shape {values.shape} for {structure.units} units; give one score a unit')
    if not np.isfinite(values).all():
        raise PruningError(f'{structure.name} has scores that are not finite; look for NaN or inf in its weights')
    return values


def _check_options(scope: str, round_to: Optional[int], floor: float) -> None:
    if scope not in SCOPES:
        raise PruningError(f'scope={scope!r} was given; choose one of {", ".join(SCOPES)}')
    if round_to is not None and not (is_number(round_to) and isinstance(round_to, Integral) and round_to >= 1):
        raise PruningError(f'round_to={round_to!r} was given; give a whole number from 1 on, or None')
    if not is_number(floor) or not 0 <= floor < 1:
        raise PruningError(f'floor={floor!r} was given; give the share of units that every structure keeps, as in 0.1')


def _check_reach(search: Search, finest: List[np.ndarray], floor: float) -> None:
    lowest = search.price(np.array([counts[0] for counts in finest]))
    if search.asked < lowest - 1e-9:
        raise OutOfReach(
            f'asked for {percent(search.asked)} of the {search.label}: with these structures and a floor of '
            f'{percent(floor)} of the units the model can reach {percent(lowest)}; lower floor=, or allow more '
            f'structures')


def _problem(search: Search, at: np.ndarray, round_to: Optional[int], finest: List[np.ndarray]) -> str:
    if search.price(np.array([counts[-1] for counts in finest])) < search.asked:
        binds, remedy = 'ratios=', 'remove less there'
    elif any(len(counts) < len(fine) for counts, fine in zip(search.grids, finest)):
        binds, remedy = f'round_to={round_to}', 'take a smaller one, or None'
    else:
        binds, remedy = 'cutting whole units', 'allow more structures'
    got = percent(search.asked + search.gap(at))
    return (
        f'{binds} leaves {got} of the {search.label} where {percent(search.asked)} were asked for, the nearest that '
        f'was found; {remedy}')
