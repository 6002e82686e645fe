"""What EPFS, SSS and the soft methods are compared with and ``timm-epfs train`` doesn't offer by itself."""
import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
import torch_pruning as tp
from records import plan_of
from timm.task import TrainingTask
from torch import Tensor, nn
from torch_pruning_recipe import nearest, one_shot

from timm_epfs.allocate import top
from timm_epfs.core import Structure
from timm_epfs.importance import score
from timm_epfs.learn.center_loss import CenterLoss, FeatureHook, find_classifier
from timm_epfs.plan import Plan, make_plan
from timm_epfs.pruner import trace_model
from timm_epfs.surgery import apply_plan
from timm_epfs.training.phase import Phase
from timm_epfs.training.run import Run

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


class WholeRun(ExperimentRun):
    """The dense model with all its units, trained for as long as the others: what papers leave out."""

    def _one_shot(self) -> nn.Module:
        traced = trace_model(self.model)
        keep = {structure.name: np.arange(structure.units) for structure in traced.structures}
        model = copy.deepcopy(self.model)
        model.pruning_plan = make_plan(traced, keep, {'method': 'none'}, self.args.model, self.model_args)
        return model


class ScratchRun(ExperimentRun):
    """The shape that another experiment found, with fresh weights (Liu et al., ICLR 2019)."""

    def _one_shot(self) -> nn.Module:
        return self._rebuilt(self._found().to_dict()).to(self.args.device)

    def _found(self) -> Plan:
        found = self.results / f'{self.experiment["shape_of"]}-{self.seed}.json'
        if not found.exists():
            raise SystemExit(f'{found.stem} has no result yet, and this experiment takes its widths: run that first')
        return plan_of(json.loads(found.read_text())['plan'])


class ShapeRun(ScratchRun):
    """The shape that another experiment found, of the units that a criterion ranks highest within each structure."""

    def _one_shot(self) -> nn.Module:
        plan = self._found()
        scores = score(self.model, [cut.structure for cut in plan.cuts], self.args.criterion)
        cuts = tuple(replace(cut, keep=top(scores[cut.structure.name], len(cut.keep))) for cut in plan.cuts)
        recipe = {'method': 'one-shot', 'criterion': self.args.criterion, 'widths': self.experiment['shape_of']}
        model = copy.deepcopy(self.model)
        model.pruning_plan = replace(plan, cuts=cuts, recipe=recipe)
        return apply_plan(model, model.pruning_plan)


class GroupNormRun(ExperimentRun):
    """torch-pruning's sparse training (Fang et al., DepGraph, CVPR 2023) in the dense phase; then its group norm ranks.

    Its regulariser, strength and group importance are its own; the budget is met by ours, as for all others.
    """

    def _phase(self, name: str, saved: Optional[Mapping[str, Any]]) -> Phase:
        phase = super()._phase(name, saved)
        if name == 'dense':
            example = torch.zeros(1, *self.config['input_size'], device=self.args.device)
            pruner = tp.pruner.GroupNormPruner(
                self.model, example, tp.importance.GroupMagnitudeImportance(p=2), reg=self.experiment['reg'],
                ignored_layers=[self.model.get_classifier()], in_channel_groups={}, out_channel_groups={})
            phase.optimizer.register_step_pre_hook(lambda *_: pruner.regularize(self.model))
        return phase


class TorchPruningRun(ExperimentRun):
    """torch-pruning's own one-shot, as its README has it: L2 over groups, the same share of channels in each layer."""

    def _one_shot(self) -> nn.Module:
        traced = trace_model(self.model)
        recipe = {'method': 'one-shot', 'criterion': 'torch-pruning'}

        def cut(ratio: float) -> Tuple[Plan, float]:
            left = self._channels_left(ratio)
            keep = {structure.name: _units_left(structure, left) for structure in traced.structures}
            plan = make_plan(traced, keep, recipe, self.args.model, self.model_args)
            return plan, plan.cost['macs'][1] / plan.cost['macs'][0]

        model = copy.deepcopy(self.model)
        model.pruning_plan, _ = nearest(cut, self.args.macs)
        return apply_plan(model, model.pruning_plan)

    def _channels_left(self, ratio: float) -> Dict[str, np.ndarray]:
        """The channels that are left, by the name of each BatchNorm's mean, which is numbered before the cut."""
        model = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format).eval()
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.running_mean.copy_(torch.arange(norm.num_features))
        example = torch.zeros(1, *self.config['input_size'], device=self.args.device)
        one_shot(model, example, tp.importance.GroupMagnitudeImportance(p=2), ratio=ratio)
        return {f'{name}.running_mean': norm.running_mean.cpu().numpy() for name, norm in norms.items()}


def _units_left(structure: Structure, left: Mapping[str, np.ndarray]) -> np.ndarray:
    """The units of a structure whose channels are left: of blocks all, which torch-pruning doesn't cut."""
    if structure.kind == 'blocks':
        return np.arange(structure.units)
    member = next(member for member in structure.members if member.tensor in left)
    return np.flatnonzero(np.isin(member.index, left[member.tensor]).all(axis=1))


class CenteredRun(ExperimentRun):
    """Center Loss on the deep feature while fine-tuning, too; the centres start anew where a run is resumed."""

    def _task(self, phase: str) -> TrainingTask:
        task = super()._task(phase)
        if phase == 'finetune':
            self._center(task)
        return task

    def _center(self, task: TrainingTask) -> None:
        image = torch.empty(1, *self.config['input_size'], device='meta')
        name, features, classes = find_classifier(self.model, (image,), {})
        center, hook = CenterLoss(classes, features), FeatureHook(self.model.get_submodule(name))

        def add(task: TrainingTask, args: Tuple[Tensor, Tensor], result: Dict[str, Tensor]) -> Dict[str, Tensor]:
            loss = result['loss'] + self.experiment['center'] * center(hook.take(), args[1])
            center.update()
            return {**result, 'loss': loss}

        task.register_forward_hook(add)


RUNNERS = {
    'train': ExperimentRun, 'whole': WholeRun, 'scratch': ScratchRun, 'shape': ShapeRun, 'group_norm': GroupNormRun,
    'centered': CenteredRun, 'torch_pruning': TorchPruningRun,
}
