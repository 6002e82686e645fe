"""A cut as data.

In: structures and the units that stay, or untrusted JSON. Out: a validated ``Plan``, and its JSON.
"""
from .cuts import Cut
from .limits import MAX_ELEMENTS, MAX_PARTS, RESERVED_ARGS, TooLarge, check_arguments, check_size, is_usual, limited
from .making import make_plan, make_recipe
from .pruned_model import PrunedModel
from .pruning_plan import Plan, check_plan, recipe_steps
from .writing import FORMAT

__all__ = [
    'FORMAT', 'MAX_ELEMENTS', 'MAX_PARTS', 'RESERVED_ARGS', 'Cut', 'Plan', 'PrunedModel', 'TooLarge', 'check_arguments',
    'check_plan', 'check_size', 'is_usual', 'limited', 'make_plan', 'make_recipe', 'recipe_steps',
]
