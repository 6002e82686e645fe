"""Save and load pruned models that no name builds: a plan and weights, for a model that its user builds."""
import json
from dataclasses import replace
from pathlib import Path
from typing import Union, cast

from timm.models._hub import HF_SAFE_WEIGHTS_NAME
from timm.utils import unwrap_model
from torch import nn

from ..core import PruningError, named_tensors
from ..plan import Plan, PrunedModel
from ..surgery import cut_copy
from .weights import read_weights

__all__ = ['PLAN', 'WEIGHTS', 'load_pretrained', 'without_base']

PLAN = 'plan.json'
# Not model.safetensors: transformers' from_pretrained would take such a file for a dense model's, and may give random
# values to every layer whose shape it doesn't find.
WEIGHTS = 'pruned.safetensors'


def without_base(plan: Plan) -> Plan:
    """The plan of a model that no name builds."""
    return replace(plan, base=None, base_args={})


def load_pretrained(model: nn.Module, folder: Union[str, Path]) -> PrunedModel:
    """Cut a copy of a dense model to a saved plan, and give it the saved weights.

    ::

        slim = timm_epfs.prune(Net(), macs=0.5, example_input=image)
        timm_epfs.save_pretrained(slim, 'net_half')
        slim = timm_epfs.load_pretrained(Net(), 'net_half')  # in another program; gives the same outputs

    No pickle is read and nothing is traced. The plan finds tensors and modules by their names.

    Args:
        model: The dense model, built as it was for ``prune``. Its weights don't matter. It is unchanged.
        folder: What ``save_pretrained`` wrote, of a model with or without a name in timm.

    Returns:
        A smaller model of the same class and in the same mode, with its ``pruning_plan``.

    Raises:
        PruningError: The folder holds no pruned model, or one of another dense model; the message names tensors.
    """
    if not isinstance(model, nn.Module):
        raise PruningError(
            f'load: the model is of type {type(model).__name__}; give the dense nn.Module, freshly built')
    model, folder = unwrap_model(model), Path(folder)
    if isinstance(getattr(model, 'pruning_plan', None), Plan):
        raise PruningError(f'load: this {type(model).__name__} is pruned already; give the dense one, freshly built')
    plan = _saved_plan(folder)
    slim = cut_copy(model, plan)
    weights = read_weights(folder / (WEIGHTS if plan.base is None else HF_SAFE_WEIGHTS_NAME), slim.state_dict())
    on_meta = any(tensor.is_meta for tensor in named_tensors(slim).values())
    slim.load_state_dict(weights, assign=on_meta)
    left = [name for name, tensor in named_tensors(slim).items() if tensor.is_meta]
    if on_meta and left:
        raise PruningError(f'load: {left[0]} is on the meta device and is not saved; build the model on the CPU')
    slim = cast(PrunedModel, slim)
    slim.pruning_plan = plan
    return slim


def _saved_plan(folder: Path) -> Plan:
    """The plan in a folder, by itself or in a config.json, which may hold one and not the name of one."""
    if (folder / PLAN).is_file():
        return without_base(Plan.load(folder / PLAN))
    try:
        plan = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['model_args']['plan']
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        plan = None
    if not isinstance(plan, dict):
        raise PruningError(
            f'load: {folder} holds no plan; give a folder that timm_epfs.save_pretrained wrote, not a model\'s own '
            'save_pretrained')
    return Plan.from_dict(plan)
