"""Dense checkpoints, read without pickle."""
import sys
from pathlib import Path
from typing import Mapping, Union

from timm.models import load_checkpoint
from torch import Tensor, nn

from ..core import PruningError, first_few, one_line
from .weights import shape_misfits

__all__ = ['check_readable', 'load_weights']


def check_readable(path: Union[str, Path]) -> None:
    """Raise ``PruningError`` where a checkpoint isn't a safetensors file, without opening it."""
    path = Path(path)
    if path.suffix != '.safetensors':
        raise PruningError(
            f'checkpoint {path} is not a .safetensors file, the only format that is read (no pickle); convert it with '
            'safetensors.torch.save_file'
        )
    if not path.is_file():
        raise PruningError(f'checkpoint {path} does not exist; give the path of a .safetensors file')


def load_weights(model: nn.Module, path: Union[str, Path]) -> None:
    """Load a dense checkpoint into a model, through the model's own ``checkpoint_filter_fn`` where it has one.

    Args:
        model: The model; on any error it is as it was.
        path: A ``.safetensors`` file.

    Raises:
        PruningError: It isn't one, or its tensors are not the model's: the first three names, with their shapes.
    """
    check_readable(path)
    own_filter = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)

    def filtered_and_checked(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
        state_dict = own_filter(state_dict, model) if own_filter else state_dict
        expected = {
            name: tensor for name, tensor in model.state_dict().items()
            if name in state_dict or not name.endswith('.num_batches_tracked')  # torch fills it in
        }
        problems = shape_misfits(state_dict, expected)
        if problems:
            raise PruningError(f'checkpoint {path} does not fit: {first_few(problems)}; give the weights of this model')
        return state_dict

    with one_line(f"checkpoint {path} can't be read"):
        load_checkpoint(model, str(path), filter_fn=filtered_and_checked)
