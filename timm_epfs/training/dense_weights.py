"""The dense model of a run: how it is built, and the file that keeps its weights after the dense phase."""
import argparse
from pathlib import Path
from typing import Any, Mapping

import safetensors.torch
from torch import nn

from ..core import one_line, step
from ..zoo import create_model, load_weights, note_origin
from .checkpoints import write_tensors
from .data import describe

__all__ = ['DenseWeights']


class DenseWeights:
    """Builds the dense model of a run, and saves and loads its weights.

    Args:
        args: The options of ``timm-epfs train``.
        model_args: Keyword arguments of the model.
        folder: Folder of the run.
    """

    def __init__(self, args: argparse.Namespace, model_args: Mapping[str, Any], folder: Path):
        self.args, self.model_args = args, model_args
        self.path = folder / 'dense.safetensors'

    def start_model(self, resumed: bool) -> nn.Module:
        """The model that the run starts from.

        Args:
            resumed: Whether a checkpoint of the run will be loaded. The model then needs no weights, but still notes
                where its first weights came from.

        Raises:
            PruningError: There is no such model, or its weights can't be loaded.
        """
        with step(f'building {self.args.model}'):
            model = create_model(self.args.model, self.args.pretrained and not resumed, **self.model_args)
            if self.args.pretrained:
                note_origin(model)
            if self.args.checkpoint and not resumed:
                load_weights(model, self.args.checkpoint)
        return model

    def save(self, model: nn.Module) -> None:
        """Save the weights: for the comparison at the end, for distillation, and for other runs."""
        write_tensors(self.path, model.state_dict())

    def saved_model(self) -> nn.Module:
        """The dense model with the saved weights, on the device of the run.

        Raises:
            PruningError: The weights can't be read.
        """
        model = create_model(self.args.model, **self.model_args)
        describe(model, self.args)
        with one_line(f'the dense weights in {self.path} can\'t be read'):
            model.load_state_dict(safetensors.torch.load_file(self.path))
        return model.to(self.args.device)
