"""Save a pruned model: in timm's own layout where a name builds it, otherwise as a plan and weights."""
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Union

import safetensors.torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import Tensor, nn

from ..core import PruningError, whole_folder
from ..plan import Plan, check_arguments
from ..surgery import TORCHVISION
from .description import ARCHITECTURE
from .entry_point import describe_torchvision
from .loading import plan_of
from .own_models import PLAN, WEIGHTS, without_base
from .rebuilding import rebuilding_args

__all__ = ['check_free', 'save_pretrained']

_CONFIG = 'config.json'
# What a folder of a saved model may hold. With anything else in it, or without a config or plan, it's not overwritten.
_OWN_FILES = (_CONFIG, HF_SAFE_WEIGHTS_NAME, PLAN, WEIGHTS, 'README.md', 'layers.png', '.gitattributes')


def save_pretrained(
        model: nn.Module,
        folder: Union[str, Path],
        overwrite: bool = False,
        *,
        as_module: bool = False,
) -> Path:
    """Save a pruned model; ``timm.create_model('local-dir:<folder>', pretrained=True)`` gives it back, bit for bit.

    Of a model that no name builds (one's own class, features of a timm model), plan and weights are saved, and
    ``timm_epfs.load_pretrained(model, folder)`` gives it back.

    The folder appears whole or not at all, and an old one is replaced only by a whole new one.

    Args:
        model: A model with a ``pruning_plan``.
        folder: Where to save.
        overwrite: Replace a model that was saved there before.
        as_module: Save plan and weights for ``load_pretrained`` although the model has a name: it has layers that the
            name doesn't build.

    Returns:
        The folder's path.

    Raises:
        PruningError: The model has no plan, its name doesn't build it any more (the message names the layer), the
            folder is taken, or it can't be written.
    """
    plan = plan_of(model)
    if plan is None:
        raise PruningError(f'save: this {type(model).__name__} has no pruning_plan; save what prune() returned')
    plan = without_base(plan) if as_module or plan.base is None else _loadable(model, plan)
    folder = Path(folder).resolve()
    check_free(folder, overwrite)
    weights = _separate(model)
    try:
        with whole_folder(folder) as part:
            weights_file = part / (WEIGHTS if plan.base is None else HF_SAFE_WEIGHTS_NAME)
            safetensors.torch.save_file(weights, weights_file, {'format': 'pt'})
            description = part / (PLAN if plan.base is None else _CONFIG)
            if plan.base is None:
                plan.save(description)
            else:
                _save_config(model, plan, description)
            # safetensors writes for its owner alone; both files are for whoever may read the folder
            shutil.copymode(description, weights_file)
    except (OSError, safetensors.SafetensorError) as e:
        raise PruningError(f'model not saved to {folder}: {getattr(e, "strerror", None) or e}') from e
    return folder


def _loadable(model: nn.Module, plan: Plan) -> Plan:
    """The plan with the arguments by which its base builds the model as it is now. What is saved can be loaded.

    Raises:
        PruningError: No arguments do, or they are none that a plan may hold.
    """
    check_arguments(plan.base_args, 'save: base_args')
    try:
        args = rebuilding_args(model, plan.base, plan.base_args, plan)
        if plan.base.startswith(TORCHVISION) and 'num_classes' not in args:
            args = _with_classes(model, plan, args)
        plan = replace(plan, base_args=args)
    except PruningError as e:
        raise PruningError(
            f'save: {e}, so it could not be loaded by its name; save it with as_module=True, and load it with '
            f'timm_epfs.load_pretrained into a model that you build as you built this one'
        ) from e
    check_arguments(plan.base_args, 'save: base_args')
    return plan


def _with_classes(model: nn.Module, plan: Plan, args: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of a torchvision model that also say its number of classes, where it's built by one.

    timm takes the number from a config.json itself. torchvision has to be told, and transformers may change it.
    """
    classes = describe_torchvision(copy.copy(model), plan).num_classes
    try:
        return rebuilding_args(model, plan.base, {**args, 'num_classes': classes}, plan)
    except PruningError:
        return args


def _save_config(model: nn.Module, plan: Plan, path: Path) -> None:
    described = copy.copy(model)
    if plan.base.startswith(TORCHVISION):
        describe_torchvision(described, plan)
    if 'num_classes' in plan.base_args:  # of a classifier that was replaced by hand, the model says the old number
        described.num_classes = plan.base_args['num_classes']
    try:
        save_config_for_hf(
            described,
            str(path),
            model_config={'pretrained_cfg': {'architecture': ARCHITECTURE}},
            model_args={'plan': plan.to_dict()},
        )
    except ValueError as e:
        raise PruningError(f'save: the model can\'t be described in a config.json: {e}') from e
    config = json.loads(path.read_text(encoding='utf-8'))
    # The file says the number of classes at its top, too, and transformers passes both on.
    config['model_args'].pop('num_classes', None)
    # timm writes arguments in the order in which it got them; sorted, a model that is saved again gives the same file
    config['model_args'] = dict(sorted(config['model_args'].items()))
    # where transformers looks for them
    labels = config['pretrained_cfg'].get('label_names')
    if isinstance(labels, list) and len(labels) == config['num_classes']:
        config['label_names'] = labels
    path.write_text(json.dumps(config, indent=2), encoding='utf-8', newline='\n')


def _separate(model: nn.Module) -> Dict[str, Tensor]:
    """Contiguous copies of a model's tensors on the CPU: a file holds each name by itself, tied or not."""
    tensors = model.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise PruningError(
                f'save: {name} in the model\'s state_dict is no tensor but of type {type(value).__name__}, which '
                'safetensors can\'t hold; leave it out of the state_dict')
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ``PruningError`` where a model must not be saved: over a file, another's folder, or one to be kept."""
    if folder.exists() and not folder.is_dir():
        raise PruningError(f'save: {folder} is a file; name a folder')
    present = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise PruningError(f'save: {folder} is not empty; name another folder or pass overwrite=True (--overwrite)')
    others = [name for name in present if name not in _OWN_FILES or not {_CONFIG, PLAN} & {*present}]
    if others:
        raise PruningError(f"save: {folder} holds {others[0]!r}, which isn't part of a model; name another folder")
