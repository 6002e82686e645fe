"""A plan says which units of a model stay. It is data: one short, readable JSON that needs no tracing to be applied.

What a plan names, it names as the model does (tensors, modules), so that a plan found on one copy of a model cuts any
other copy, rebuilds the pruned model from its dense base, and cuts any dense checkpoint of that base.
"""
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np

from ..core import BUDGETS, PruningError, Structure, complement, distinct, percent, write_whole
from .cuts import Cut
from .limits import MAX_CHARACTERS, check_text
from .parsing import parse_plan
from .writing import plan_values

__all__ = ['Plan', 'check_plan', 'recipe_steps']


def recipe_steps(recipe: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The recipes of a plan that was composed, one per cut. A recipe is free text: ``steps`` may be anything else."""
    steps = recipe.get('steps')
    return steps if isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps) else [recipe]


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What stays of a model, and how that was found.

    Attributes:
        base: timm name of the dense model, ``'torchvision/<name>'``, or None for a module of the user's own.
        base_args: Keyword arguments that build the base (``num_classes``, ``in_chans``, …), JSON values.
        cuts: Every structure of the trace, cut or not, so that plans compose and show what else could be cut.
        attributes: Integers to set on the model, by path: ``'blocks.0.attn.num_heads': 3``. A number in the path is a
            position in a list or tuple: ``'feature_info.2.num_chs': 96``.
        recipe: How the plan was found: method, criterion, target, versions; data, date and command where it ships.
        cost: (dense, pruned) by quantity: ``{'macs': (1.8e9, 0.9e9)}``.
    """
    base: Optional[str]
    base_args: Dict[str, Any]
    cuts: Tuple[Cut, ...]
    attributes: Dict[str, int] = field(default_factory=dict)
    recipe: Dict[str, Any] = field(default_factory=dict)
    cost: Dict[str, Tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line; ``to_json`` is the whole plan."""
        cut = sum(len(cut.keep) < cut.structure.units for cut in self.cuts)
        shares = [
            f'{percent(self.cost[quantity][1] / self.cost[quantity][0])} of the {BUDGETS[quantity]}'
            for quantity in ('macs', 'params') if quantity in self.cost and self.cost[quantity][0]
        ]
        left = f', {", ".join(shares)} left' if shares else ''
        return f'<Plan of {self.base or "a module"}: {cut} of {len(self.cuts)} structures cut{left}>'

    def uncomposable(self, structures: Iterable[Structure]) -> Set[str]:
        """Names of structures of the pruned model that differ from what this plan left: no later plan may cut them.

        An example are the dims of a head that is the only one left of its layer.
        """
        left = {cut.structure.name: len(cut.keep) for cut in self.cuts}
        return {s.name for s in structures if left.get(s.name) != s.units}

    def removed_blocks(self) -> Dict[str, Tuple[str, ...]]:
        """Paths of the blocks that are taken out, with the names of those of their children that stay.

        A block inside of another one that is taken out isn't among them.
        """
        gone = [cut.structure for cut in self.cuts if cut.structure.kind == 'blocks' and not len(cut.keep)]
        blocks = {structure.name: structure.shortcut for structure in gone}
        return {name: children for name, children in blocks.items() if not _goes(name, blocks)}

    def lost(self, tensors: Iterable[str]) -> Set[str]:
        """Those of these tensors that are in a block that is taken out."""
        blocks = self.removed_blocks()
        return {name for name in tensors if _goes(name, blocks)}

    def removed(self) -> Dict[str, Dict[int, np.ndarray]]:
        """Entries that go, by tensor and dim, sorted. An entry that several structures own goes with any of them.

        Tensors of blocks that are taken out aren't among them: they go with their module.
        """
        return self._removed

    @cached_property
    def _removed(self) -> Dict[str, Dict[int, np.ndarray]]:
        gone: Dict[str, Dict[int, List[np.ndarray]]] = {}
        for cut in self.cuts:
            if cut.structure.kind == 'blocks' or len(cut.keep) == cut.structure.units:
                continue
            units = complement(cut.keep, cut.structure.units)
            for member in cut.structure.members:
                gone.setdefault(member.tensor, {}).setdefault(member.dim, []).append(member.index[units].ravel())
        return {tensor: {dim: distinct(parts) for dim, parts in dims.items()} for tensor, dims in gone.items()}

    def removed_since(self, earlier: Optional['Plan']) -> Dict[str, Dict[int, np.ndarray]]:
        """Entries that this plan removes and an earlier one of the same base doesn't, by tensor and dim, sorted.

        They are counted in the tensors that the earlier plan leaves. None stands for the base.
        """
        before = {} if earlier is None else earlier.removed()
        since: Dict[str, Dict[int, np.ndarray]] = {}
        for tensor, dims in self.removed().items():
            for dim, gone in dims.items():
                first = before.get(tensor, {}).get(dim, gone[:0])
                new = np.setdiff1d(gone, first)
                if len(new):
                    since.setdefault(tensor, {})[dim] = new - np.searchsorted(first, new)
        return since

    def compose(self, later: 'Plan') -> 'Plan':
        """The plan that does in one step what this one and then ``later``, made on the pruned model, do in two.

        Arguments of the base are those of ``later`` where both have one: the model may have got another classifier in
        between.

        Raises:
            PruningError: ``later`` has a structure that this plan does not leave behind.
        """
        left = {cut.structure.name: len(cut.keep) for cut in self.cuts}
        touched = [cut for cut in later.cuts if len(cut.keep) < cut.structure.units]
        for cut in touched:
            name, units = cut.structure.name, cut.structure.units
            if left.get(name) != units:
                found = f'the first leaves {left[name]}' if name in left else 'the first has no such structure'
                raise PruningError(
                    f'compose: the later plan has {name} with {units} units, {found}; make it on the pruned model'
                )

        steps = {cut.structure.name: cut.keep for cut in touched}
        cuts = tuple(
            Cut(cut.structure, cut.keep[steps[cut.structure.name]]) if cut.structure.name in steps else cut
            for cut in self.cuts
        )
        return Plan(
            base=self.base,
            base_args={**self.base_args, **(later.base_args if later.base == self.base else {})},
            cuts=cuts,
            attributes={**self.attributes, **later.attributes},
            recipe={'steps': [*recipe_steps(self.recipe), *recipe_steps(later.recipe)]},
            cost={
                quantity: (dense, later.cost[quantity][1])
                for quantity, (dense, _) in self.cost.items() if quantity in later.cost
            },
        )

    def to_dict(self) -> Dict[str, Any]:
        """The plan as JSON values."""
        return plan_values(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> 'Plan':
        """Read a plan from JSON values, trusting none of them.

        Raises:
            PruningError: The values are not a plan; the message names the field.
        """
        return cls(**parse_plan(data))

    def to_json(self) -> str:
        """The plan as text. The same plan gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + '\n'

    @classmethod
    def from_json(cls, text: str) -> 'Plan':
        """Read what ``to_json`` wrote.

        Raises:
            PruningError: The text is not JSON or no plan.
        """
        check_text(text, 'plan')
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise PruningError(f'plan: not JSON ({str(e)[:80]})') from None
        return cls.from_dict(data)

    def save(self, path: Union[str, Path]) -> None:
        """Write the plan's JSON, whole or not at all.

        Raises:
            PruningError: The file can't be written.
        """
        path = Path(path)
        text = self.to_json()
        try:
            write_whole(path, lambda part: part.write_text(text, encoding='utf-8', newline='\n'))
        except OSError as e:
            raise PruningError(f'plan not saved to {path}: {e.strerror or e}') from e

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'Plan':
        """Read a plan file.

        Raises:
            PruningError: The file can't be read or holds no plan.
        """
        try:
            with open(path, encoding='utf-8') as file:
                text = file.read(MAX_CHARACTERS + 1)
        except (OSError, UnicodeDecodeError) as e:
            raise PruningError(f'plan not read from {path}: {getattr(e, "strerror", None) or "not UTF-8 text"}') from e
        return cls.from_json(text)


def check_plan(plan: Any) -> None:
    """Raise ``PruningError`` where something else was given in place of a plan."""
    if not isinstance(plan, Plan):
        raise PruningError(
            f'the plan is of type {type(plan).__name__}; give a Plan, such as slim.pruning_plan or Plan.load(path)')


def _goes(name: str, blocks: Mapping[str, Sequence[str]]) -> bool:
    """Whether something of this name is in one of the blocks and in none of its children that stay."""
    parts = name.split('.')
    parents = accumulate(parts, '{}.{}'.format)
    return any(parent in blocks and child not in blocks[parent] for parent, child in zip(parents, parts[1:]))
