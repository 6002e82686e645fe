"""Scores and a budget in, the units that stay out.

Every structure may keep the counts of its *grid*: multiples of its rounding step from its floor on, or all its units.
The steps down all grids are put in one order, so that cutting more is walking further along one path, and the budget
is a place on that path, found by bisection. Where the steps are too coarse to meet it there, a few structures leave the
path: those that lose the least importance.
"""
import warnings
from fnmatch import fnmatchcase
from math import ceil, gcd
from numbers import Integral
from typing import Collection, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..core import Budget, CostModel, OutOfReach, PruningError, Structure, is_number, percent
from .search import TOLERANCE, Search

__all__ = ['ALIGN', 'Budget', 'SCOPES', 'allocate', 'budget_from', 'top']

SCOPES = ('global', 'local', 'isomorphic', 'neyman')
ALIGN = 16  # what wide layers are multiples of by default


def budget_from(
        structures: Sequence[Structure],
        cost: CostModel,
        macs: Optional[float] = None,
        params: Optional[float] = None,
) -> Budget:
    """The budget that ``macs=0.5`` (a share of the dense model) or ``macs=2e9`` (a count, over 1) stands for.

    Raises:
        PruningError: None or both are given, or the budget is not between nothing and the dense model.
    """
    asked = [Budget(name, value) for name, value in (('macs', macs), ('params', params)) if value is not None]
    if len(asked) != 1:
        raise PruningError(f'{len(asked)} budgets were given, one is needed; give either macs= or params=')
    quantity, target = asked[0].quantity, float(asked[0].target)
    dense = cost(quantity, cost.counts({s.name: s.units for s in structures}))
    if target == 1 or target >= dense:
        raise PruningError(f'{quantity}={target:g} was asked, the dense model has {dense:g}; ask for less, as in 0.5')
    return Budget(quantity, target if target > 1 else target * dense)


def allocate(
        structures: Sequence[Structure],
        scores: Mapping[str, np.ndarray],
        cost: CostModel,
        budget: Budget,
        *,
        scope: str = 'global',
        round_to: Optional[int] = None,
        align: int = ALIGN,
        floor: float = 0.1,
        ratios: Optional[Mapping[str, float]] = None,
        fixed: Collection[str] = (),
) -> Dict[str, np.ndarray]:
    """Choose the units that stay, so that the cost lands on the budget.

    In each structure the highest scores stay, among equal ones those that come first. Equal scores in different
    structures are cut by equal shares.

    >>> from timm_epfs.core import Size
    >>> conv = Structure('conv', 'channels', units=64, members=())
    >>> cost = CostModel(['conv'], [('macs', 9.0, (Size(0, (('conv', 1),)),))])
    >>> allocate([conv], {'conv': np.arange(64)}, cost, budget_from([conv], cost, macs=0.125))
    {'conv': array([56, 57, 58, 59, 60, 61, 62, 63])}

    Args:
        structures: Everything that the cost model counts.
        scores: Importance by structure name, shape (units,), comparable between structures.
        cost: Prices a vector of counts.
        budget: What may be left.
        scope: ``'global'`` ranks all units together, ``'local'`` cuts the same share of every structure,
            ``'isomorphic'`` ranks structures of one shape together and cuts the same share of every such set (Fang et
            al., Isomorphic Pruning for Vision Models, ECCV 2024). ``'neyman'`` lets the cost say how many units each
            structure keeps, and the scores only which: see ``_diminishing``.
        round_to: Channel structures that are cut keep widths that are multiples of this. None: of ``align`` where
            there are four times as many units, elsewhere of the largest power of two of which there are eight; and any
            width in as few structures as possible where the budget needs it.
        align: A power of two, what wide layers are to be multiples of: oneDNN computes channels in sixteens.
        floor: Share of its units that every structure but a block keeps, one unit at least.
        ratios: Shares of units to remove by name, module prefix or fnmatch pattern, the longest that matches. These are
            set first, the rest meets the budget.
        fixed: Names of structures to leave uncut.

    Returns:
        Units that stay by structure name, ascending, int64.

    Raises:
        OutOfReach: The floors, or what is left alone, cost more than the budget.
        PruningError: An argument is not what it should be.

    Warns:
        UserWarning: The result is more than 1 % of the dense cost away from the budget.
    """
    _check_options(scope, round_to, floor)
    by_name = {s.name: s for s in structures}
    if not by_name or sorted(by_name) != sorted(cost.names):
        raise PruningError('structures and cost model do not name the same things; take both from one trace')
    # In the cost model's order, so that the order in which structures are listed decides nothing.
    ordered = [by_name[name] for name in cost.names]
    shares = _shares(cost.names, ratios or {}, fixed, floor)
    values = {s.name: _values(s, scores, shares.get(s.name)) for s in ordered}

    grids = [_grid(s, _step(s, round_to, align), floor, shares.get(s.name)) for s in ordered]
    finest = [grid if s.name in shares else _grid(s, 1, floor) for s, grid in zip(ordered, grids)]
    if scope == 'neyman':
        worth = _diminishing(ordered, cost, budget, shares)
    else:
        worth = [np.sort(values[s.name])[::-1] for s in ordered]
    search = Search(cost, budget, grids, worth)
    _check_reach(search, finest, floor)
    search, at = _met(search, _sets(ordered, scope), finest if round_to is None else None)
    if abs(search.gap(at)) > TOLERANCE:
        _warn(search, at, round_to, finest)
    left = dict(zip(cost.names, search.choices[at]))
    return {name: top(values[name], left[name]) for name in by_name}


def _met(search: Search, sets: np.ndarray, finest: Optional[List[np.ndarray]]) -> Tuple[Search, np.ndarray]:
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


def top(scores: np.ndarray, left: int) -> np.ndarray:
    """The units with the highest scores, among equal ones those that come first, ascending, int64, shape (left,)."""
    threshold = np.partition(scores, -left)[-left]
    above, ties = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    return np.sort(np.append(above, ties[:left - len(above)])).astype(np.int64)


def _step(structure: Structure, round_to: Optional[int], align: int) -> int:
    """How many units make the widths of the layer that a structure leaves multiples of ``round_to``."""
    if structure.kind not in ('channels', 'head_dims'):
        return 1
    if round_to is None:
        eighth = max(1, structure.units // 8)
        round_to = align if structure.units >= 4 * align else 1 << eighth.bit_length() - 1
    entries = max(((m.role == 'out', m.index.shape[1]) for m in structure.members), default=(True, 1))[1]
    return round_to // gcd(round_to, entries)


def _grid(structure: Structure, step: int, floor: float, share: Optional[float] = None) -> np.ndarray:
    """The counts that a structure may keep, ascending: one of them where the share to remove is set."""
    lowest = 0 if structure.kind == 'blocks' else max(1, ceil(floor * structure.units - 1e-9))
    grid = np.append(np.arange(-(-lowest // step) * step, structure.units, step), structure.units)
    if share is None:
        return grid
    return grid[np.abs(grid - (1 - share) * structure.units).argmin()][None] if share else grid[-1:]


def _sets(structures: Sequence[Structure], scope: str) -> np.ndarray:
    """The set that each structure is ranked in, numbered from 0, shape (structures,)."""
    keys = []
    for s in structures:
        members = sorted((m.role, m.dim, m.tensor.rpartition('.')[2], m.index.shape[1]) for m in s.members)
        shape = (s.kind, s.units, *members)
        keys.append({'global': (), 'neyman': (), 'local': (s.name,), 'isomorphic': shape}[scope])
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _diminishing(
        structures: Sequence[Structure],
        cost: CostModel,
        budget: Budget,
        shares: Mapping[str, float],
) -> List[np.ndarray]:
    """What one more unit is worth where so many are there already, shape (units,) by structure, descending.

    Cut where they are worth the same, structures keep what Neyman's allocation of a sample to strata gives (Cochran,
    Sampling Techniques, 5.5): n ∝ N·S/√c. The sample are the units that stay of N, c is what one of them costs in the
    dense model. S says how far the units of a stratum differ, our reading: by one for every layer that reads or writes
    them, because what is lost of a residual stream adds up over its layers, and by √k where a unit is k channels, so
    that a head is worth what its channels would be.
    """
    blocks = [s.name for s in structures if s.kind == 'blocks' and s.name not in shares]
    if blocks:
        raise PruningError(
            f"scope='neyman' says how wide layers are, not which blocks stay, and {blocks[0]} may go whole; leave "
            f'blocks out, or choose another scope')
    dense = cost.counts({s.name: s.units for s in structures})
    prices = np.maximum(cost.gradient(budget.quantity, dense), 1e-12 * cost(budget.quantity, dense))
    spreads = [max(1.0, sum(m.index.shape[1] ** 0.5 for m in s.members if m.role != 'per')) for s in structures]
    worth = [s.units * spread / price ** 0.5 for s, spread, price in zip(structures, spreads, prices)]
    return [value / (np.arange(s.units) + 0.5) for s, value in zip(structures, worth)]  # n is rounded, not cut off


def _shares(
        names: Sequence[str],
        ratios: Mapping[str, float],
        fixed: Collection[str],
        floor: float,
) -> Dict[str, float]:
    """The share of units to remove, where it is set before the search."""
    unknown = sorted(set(fixed) - set(names))
    if unknown:
        raise PruningError(f'fixed= names {unknown[0]!r}, which no structure is called; use names of structures')
    shares = dict.fromkeys(fixed, 0.0)
    for pattern in sorted(ratios, key=lambda pattern: (-len(pattern), pattern)):
        share = ratios[pattern]
        if not is_number(share) or not 0 <= share <= 1 - floor + 1e-9:
            raise PruningError(
                f'ratios= asks to remove {share!r} of {pattern!r}; give a share from 0 to {1 - floor:g} (1 - floor)')
        matches = [
            name for name in names
            if fnmatchcase(name, pattern) or name.startswith((f'{pattern}.', f'{pattern}#'))
        ]
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
        raise PruningError(f'scope={scope!r} was asked; choose one of {", ".join(SCOPES)}')
    if round_to is not None and not (is_number(round_to) and isinstance(round_to, Integral) and round_to >= 1):
        raise PruningError(f'round_to={round_to!r} was asked; give a whole number from 1 on, or None')
    if not is_number(floor) or not 0 <= floor < 1:
        raise PruningError(f'floor={floor!r} was asked; give the share of units that every structure keeps, as in 0.1')


def _check_reach(search: Search, finest: List[np.ndarray], floor: float) -> None:
    asked, lowest = search.asked, search.price(np.array([grid[0] for grid in finest]))
    if asked >= 1:
        raise PruningError(f'asked for {percent(asked)} of the {search.label}; ask for less than the dense model has')
    if asked < lowest - 1e-9:
        raise OutOfReach(
            f'asked for {percent(asked)} of the {search.label} ({search.budget.target:.4g}): with these structures '
            f'and a floor of {percent(floor)} of the units the model can reach {percent(lowest)}; '
            f'lower floor=, or allow more structures')


def _warn(search: Search, at: np.ndarray, round_to: Optional[int], finest: List[np.ndarray]) -> None:
    if search.price(np.array([grid[-1] for grid in finest])) < search.asked:
        binds, remedy = 'ratios=', 'remove less there'
    elif any(len(grid) < len(fine) for grid, fine in zip(search.grids, finest)):
        binds, remedy = f'round_to={round_to}', 'take a smaller one, or None'
    else:
        binds, remedy = 'cutting whole units', 'allow more structures'
    warnings.warn(
        f'{binds} leaves {percent(search.asked + search.gap(at))} of the {search.label} where '
        f'{percent(search.asked)} were asked, the nearest that was found; {remedy}', UserWarning, stacklevel=3)
