"""Dense checkpoints, read without pickle."""
import sys
from pathlib import Path
from typing import List, Mapping, Union

from timm.models import load_checkpoint
from torch import Tensor, nn

from ..core import PruningError, first_few, one_line

__all__ = ['check_readable', 'load_weights']


def check_readable(path: Union[str, Path]) -> None:
    """Raise ``PruningError`` where a checkpoint is no safetensors file, without reading it."""
    path = Path(path)
    if path.suffix != '.safetensors':
        raise PruningError(
            f'checkpoint {path} is not read, only .safetensors is (no pickle); convert it with '
            'safetensors.torch.save_file')
    if not path.is_file():
        raise PruningError(f'checkpoint {path} does not exist; give the path of a .safetensors file')


def load_weights(model: nn.Module, path: Union[str, Path]) -> None:
    """Load a dense checkpoint into a model, through the model's own ``checkpoint_filter_fn`` where it has one.

    Args:
        model: The model; on any error it is as it was.
        path: A ``.safetensors`` file.

    Raises:
        PruningError: The file isn't one, or its tensors are not the model's: the first three names and shapes.
    """
    check_readable(path)
    module_filter = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)

    def fitting(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        state_dict = module_filter(state_dict, model) if module_filter else state_dict
        problems = _misfits(model.state_dict(), state_dict)
        if problems:
            raise PruningError(f'checkpoint {path} does not fit: {first_few(problems)}')
        return state_dict

    with one_line(f'checkpoint {path} not read'):
        load_checkpoint(model, str(path), filter_fn=fitting)


def _misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> List[str]:
    problems = []
    for name in (*wanted, *(name for name in found if name not in wanted)):
        if name not in found:
            if not name.endswith('.num_batches_tracked'):  # torch fills it in
                problems.append(f'{name} {tuple(wanted[name].shape)} is missing')
        elif name not in wanted:
            problems.append(f'{name} {tuple(found[name].shape)} is not in the model')
        elif wanted[name].shape != found[name].shape:
            problems.append(f'{name} is {tuple(found[name].shape)}, the model has {tuple(wanted[name].shape)}')
    return problems
