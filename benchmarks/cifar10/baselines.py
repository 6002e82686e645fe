"""What EPFS, SSS and the soft methods are compared with and ``timm-epfs train`` doesn't offer by itself."""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import torch
import torch_pruning as tp
from torch import nn

from timm_epfs.training.run import Run
from timm_epfs.training.stage import Stage

__all__ = ['RUNNERS']


class ExperimentRun(Run):
    """A run of ``timm-epfs train``.

    Args:
        args: Its options.
        model_args: Keyword arguments of the model.
        experiment: The experiment's file.
        seed: The run's seed.
        results: Folder of the model's results.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            model_args: Mapping[str, Any],
            experiment: Dict[str, Any],
            seed: int,
            results: Path,
    ):
        self.experiment, self.seed, self.results = experiment, seed, results
        super().__init__(args, model_args)


class ScratchRun(ExperimentRun):
    """The shape that another experiment found, with fresh weights (Liu et al., ICLR 2019)."""

    def _one_shot(self) -> nn.Module:
        found = self.results / f'{self.experiment["shape_of"]}-{self.seed}.json'
        if not found.exists():
            raise SystemExit(f'the shape of {found.stem} is not known yet; run that first')
        model = self._rebuilt(json.loads(found.read_text())['plan'])
        return model.to(self.args.device)


class GroupNormRun(ExperimentRun):
    """torch-pruning's sparse training (Fang et al., DepGraph, CVPR 2023) in the dense phase; then its group norm ranks.

    Its regulariser, strength and group importance are its own; the budget is met by ours, as for all others.
    """

    def _stage(self, phase: str, saved: Optional[Mapping[str, Any]]) -> Stage:
        stage = super()._stage(phase, saved)
        if phase == 'dense':
            example = torch.zeros(1, *self.config['input_size'], device=self.args.device)
            pruner = tp.pruner.GroupNormPruner(
                self.model, example, tp.importance.GroupMagnitudeImportance(p=2), reg=self.experiment['reg'],
                ignored_layers=[self.model.get_classifier()], in_channel_groups={}, out_channel_groups={})
            stage.optimizer.register_step_pre_hook(lambda *_: pruner.regularize(self.model))
        return stage


RUNNERS = {'train': ExperimentRun, 'scratch': ScratchRun, 'group_norm': GroupNormRun}
