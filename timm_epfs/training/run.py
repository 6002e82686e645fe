"""A run from a dense model to a pruned one: train, learn the cut, cut, fine-tune, save, compare."""
import argparse
import json
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import timm
import torch
import torch.distributed as dist
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask, TrainingTask
from timm.utils import init_distributed_device, random_seed
from torch import nn
from tqdm import tqdm

from ..core import one_line, progress, step, write_whole
from ..latency import latencies, latency_note
from ..plan import Plan
from ..report import Rows, compare, top1
from ..surgery import rebuild
from ..zoo import save_pretrained
from .checkpoints import Checkpoints
from .data import Batches, count_classes, describe, open_batches
from .dense_weights import DenseWeights
from .options import PHASES, check_options, check_unchanged, phase_epochs, run_options
from .phase import Phase, evaluate
from .run_cut import RunCut
from .run_page import write_run_page
from .run_pictures import mask_histogram
from .summary import OPTIONS, check_page_place, claim_folder, write_report, write_summary

__all__ = ['Result', 'train']


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        folder: Folder of the pruned model, which ``timm.create_model('local-dir:<folder>', pretrained=True)`` loads.
        rows: The dense and the pruned model side by side.
        notes: How they were measured.
        history: One row per epoch, and one for the cut.
    """
    folder: Path
    rows: Rows
    notes: str
    history: List[Dict[str, Any]]


def train(args: argparse.Namespace, model_args: Mapping[str, Any]) -> Optional[Result]:
    """Run ``timm-epfs train``.

    Args:
        args: The options of the command.
        model_args: Keyword arguments of the model.

    Returns:
        The result in the first process; None in all others.

    Raises:
        PruningError: The run can't be done as asked; the message says why, and what to do.
    """
    check_options(args)
    with one_line(f'device {args.device!r} can\'t be used'):
        torch.device(init_distributed_device(args))
    try:
        return Run(args, model_args)()
    finally:
        if args.distributed:
            dist.destroy_process_group()


class Run:
    """A run, phase by phase.

    Subclasses may override ``_open_batches``, ``_phase``, ``_task``, ``_one_shot`` and ``_record``.

    Args:
        args: The options of ``timm-epfs train``, checked.
        model_args: Keyword arguments of the model.

    Attributes:
        model: The model as it is now: dense, then pruned.
        config: The model's data config.
        batches: The images.
        epochs: Epochs of each phase.
        history: One row per epoch, and one for each cut.
        masks: A histogram of the masks for each sparse epoch.

    Raises:
        PruningError: The run can't be done as asked. Nothing was trained.
    """

    def __init__(self, args: argparse.Namespace, model_args: Mapping[str, Any]):
        self.args, self.model_args = args, dict(model_args)
        self.first = args.rank == 0
        self.folder = args.output.resolve()
        self.checkpoints = Checkpoints(self.folder / 'checkpoints', args.checkpoint_hist)
        self.options = {**run_options(args), 'model_args': json.loads(json.dumps(self.model_args, default=str))}
        self.epochs = phase_epochs(args)
        self.history: List[Dict[str, Any]] = []
        self.masks: List[Dict[str, Any]] = []
        if self.first:
            claim_folder(self.folder, args.resume, args.overwrite)
            if args.report:
                check_page_place(args.report, self.folder)
        self._wait()

        self.saved = self._load_checkpoint() if args.resume else None
        random_seed(args.seed)
        self.dense_weights = DenseWeights(args, self.model_args, self.folder)
        self.model = self.dense_weights.start_model(resumed=self.saved is not None)
        self.config = describe(self.model, args)
        self.num_classes = count_classes(self.model, self.config['input_size'])
        self._to_device(self.model)
        self._cut = RunCut(args, self.model, lambda: self.batches.train)
        if not self.saved:
            self._cut.check()
        self.batches = self._open_batches()

    def _open_batches(self) -> Batches:
        return open_batches(self.args, self.config, self.num_classes)

    def _to_device(self, model: nn.Module) -> nn.Module:
        """Move a model to the run's device and memory layout, and return it."""
        layout = torch.channels_last if self.args.channels_last else torch.preserve_format
        return model.to(self.args.device).to(memory_format=layout)

    def __call__(self) -> Optional[Result]:
        """Train all phases, from the start or the last checkpoint. The result is None in all but the first process."""
        first_phase = PHASES.index(self.saved['phase']) if self.saved else 0
        if self.first:
            text = json.dumps({**self.options, 'epochs_by_phase': self.epochs}, indent=1) + '\n'
            write_whole(self.folder / OPTIONS, lambda part: part.write_text(text, encoding='utf-8'))
        if self.saved:
            self.history, self.masks = self.saved['history'], self.saved['masks']
            if self.saved['plan']:
                self.model = self._to_device(self._rebuilt(self.saved['plan']))
        with self._bar(first_phase) as self.bar:
            for phase in PHASES[first_phase:]:
                self._run_phase(phase, self.saved if self.saved and self.saved['phase'] == phase else None)
        return self._finish() if self.first else None

    def _run_phase(self, name: str, saved: Optional[Mapping[str, Any]]) -> None:
        """Train a phase to its end. After the sparse phase, cut the model; after the dense one, save its weights."""
        random_seed(self.args.seed)
        phase = self._phase(name, saved) if self.epochs[name] else None
        for epoch in range(saved['epoch'] if saved else 0, self.epochs[name]):
            if name == 'finetune' and 0 < epoch < (self.args.cut_steps or 1):
                self._cut_further(phase, number=epoch + 1)
            self._epoch(phase, epoch)
        has_ema = phase is not None and phase.task.has_ema()
        averaged = phase.task.get_trainable_module(ema=True).module if has_ema else None
        if name == 'sparse':
            self.batches.set_epoch(0)  # so that a resumed run cuts by the same images
            self.model = phase.learner.export(averaged) if phase else self._one_shot()
            self._record('cut', evaluate(self.args, self._task('cut'), self.batches.validation))
        elif averaged is not None:
            self.model.load_state_dict(averaged.state_dict())
        if name == 'dense':
            if self.first:
                self.dense_weights.save(self.model)
            self._wait()

    def _cut_further(self, phase: Phase, number: int) -> None:
        """Make the next of ``--cut-steps``, between two epochs. A run that is resumed from there makes it again."""
        random_seed(self.args.seed)
        self.batches.set_epoch(0)
        before, self.model = self.model, self._cut.one_shot_further(self.model, number)
        phase.go_on_with(self._task(phase.name), before, self.model)
        self._record('cut', phase.evaluate(self.batches.validation))

    def _phase(self, name: str, saved: Optional[Mapping[str, Any]]) -> Phase:
        """A phase at its start, or where the checkpoint was saved."""
        updates = ceil(len(self.batches.train) / self.args.grad_accum_steps)
        learner = self._cut.learner(self.epochs[name] * updates, updates) if name == 'sparse' else None
        phase = Phase(self.args, name, self._task(name), self.epochs[name], updates, learner, self.num_classes)
        if saved:
            with one_line(f'--resume: the checkpoint in {self.checkpoints.folder} is of another version or model'):
                phase.load_state_dict(saved)
        return phase

    def _epoch(self, phase: Phase, epoch: int) -> None:
        """Train and evaluate one epoch, then save a checkpoint.

        Each epoch has its own seed, so that a resumed run draws the same random numbers as one without interruption.
        """
        number = 1 + epoch + sum(self.epochs[name] for name in PHASES[:PHASES.index(phase.name)])
        random_seed((self.args.seed + 9973 * number) % 2 ** 31, self.args.rank)
        self.batches.set_epoch(number)
        description = f'{phase.name} {epoch + 1}/{self.epochs[phase.name]}'

        def show(steps: int, values: Dict[str, float]) -> None:
            alive = {'alive': f'{phase.learner.alive:.3f}'} if phase.learner else {}
            self.bar.set_description(description, refresh=False)
            self.bar.set_postfix(loss=f'{values["loss"]:.3f}', top1=f'{values["top1"]:.1f}', **alive, refresh=False)
            self.bar.update(steps)

        trained = phase.train(self.batches.train, show)
        learned = phase.learner.log() if phase.learner else {}
        values = {'mask_lr' if name == 'lr' else name: value for name, value in learned.items()}
        self._record(phase.name, phase.evaluate(self.batches.validation), trained, lr=phase.lr, **values)
        if phase.learner:
            self.masks.append(mask_histogram([*phase.learner.values().values()]))
        if self.first:
            self._save_checkpoint(phase, epoch, number)

    def _save_checkpoint(self, phase: Phase, epoch: int, number: int) -> None:
        plan = self.model.pruning_plan.to_dict() if phase.name == 'finetune' else None
        state = {
            'options': self.options, 'phase': phase.name, 'epoch': epoch + 1, 'plan': plan, 'history': self.history,
            'masks': self.masks, **phase.state_dict(),
        }
        self.checkpoints.save(state, number)

    def _record(
            self,
            phase: str,
            evaluated: Mapping[str, float],
            trained: Optional[Mapping[str, float]] = None,
            **values: float,
    ) -> None:
        """Add a row to the history, write ``summary.csv`` and print the row.

        Args:
            phase: The phase, or ``'cut'``.
            evaluated: Loss and top-1 on the validation split.
            trained: Loss and top-1 in training; None for the cut.
            **values: Further columns.
        """
        row = {
            'epoch': sum(row['phase'] != 'cut' for row in self.history) + (phase != 'cut'),
            'phase': phase,
            **{f'train_{name}': value for name, value in (trained or {}).items()},
            **{f'eval_{name}': value for name, value in evaluated.items()},
            'alive': self._alive(),
            **values,
        }
        self.history.append(row)
        if self.first:
            write_summary(self.folder / 'summary.csv', self.history)
            shown = '  '.join(f'{name} {value:.4g}' for name, value in row.items() if isinstance(value, float))
            self.bar.write(f'timm-epfs: epoch {row["epoch"]}/{self.args.epochs} {phase}  {shown}', file=sys.stderr)

    def _alive(self) -> float:
        """Share of the dense model's MACs that the model has."""
        plan = getattr(self.model, 'pruning_plan', None)
        return plan.cost['macs'][1] / plan.cost['macs'][0] if plan else 1.0

    def _rebuilt(self, plan: Mapping[str, Any]) -> nn.Module:
        """The pruned model of a plan, with new weights."""
        model = rebuild(Plan.from_dict(plan))
        for name in ('pretrained_cfg', 'default_cfg'):  # this run's: the plan names its base without a tag
            if hasattr(self.model, name):
                setattr(model, name, getattr(self.model, name))
        return model

    def _one_shot(self) -> nn.Module:
        return self._cut.one_shot()

    def _task(self, phase: str) -> TrainingTask:
        """timm's task of a phase: classification, with distillation if it is asked for and the phase fine-tunes."""
        device = torch.device(self.args.device)
        mixed = self.args.mixup > 0 or self.args.cutmix > 0
        loss = {'smoothing': 0.0 if mixed else self.args.smoothing, 'soft_targets': mixed}
        if phase != 'finetune' or not self.args.distill:
            return ClassificationTask(self.model, criterion_kwargs=loss, device=device, verbose=False)
        teacher = DistillationTeacher(self.dense_weights.saved_model(), device=device)
        return LogitDistillationTask(
            self.model, teacher, criterion_kwargs=loss, device=device,
            distill_loss_weight=self.args.distill_loss_weight, task_loss_weight=self.args.task_loss_weight,
            temperature=self.args.kd_temperature, verbose=False,
        )

    def _bar(self, first_phase: int) -> tqdm:
        """One progress bar for the whole run, so that it shows the time that the whole run still takes."""
        batches = len(self.batches.train)
        done = sum(self.epochs[name] for name in PHASES[:first_phase]) + (self.saved['epoch'] if self.saved else 0)
        # With a delay, close() would not clear a bar that write() has drawn before the delay is over.
        return progress(
            (), 'training', batches * self.args.epochs, initial=batches * done, delay=0, disable=not self.first)

    def _load_checkpoint(self) -> Optional[Dict[str, Any]]:
        saved = self.checkpoints.load()
        if saved:
            check_unchanged(saved['options'], self.options, self.folder)
        return saved

    def _wait(self) -> None:
        """Wait until all processes are here."""
        if self.args.distributed:
            dist.barrier()

    def _finish(self) -> Result:
        """Save the pruned model, load it again, compare it with the dense one, and write the report."""
        args = self.args
        folder = save_pretrained(self.model, self.folder / 'pruned', overwrite=True)
        with one_line(f'{folder} can\'t be loaded again'):
            slim = timm.create_model(f'local-dir:{folder}', pretrained=True).to(args.device).eval()
        dense = self.dense_weights.saved_model()
        models, images = [dense, slim], self.batches.test
        accuracy = top1(models, progress(images, 'measuring top-1', len(images)))
        image = torch.randn(1, *self.config['input_size'], generator=torch.Generator().manual_seed(args.seed))
        with step('measuring latency'):
            latency_ms = latencies(models, image.to(args.device))
        rows = compare(dense, slim, {'top-1, %': tuple(accuracy)}, latency_ms)
        notes = latency_note(args.device)
        found = (self.options, rows, notes, self.history, self.masks, slim.pruning_plan)
        write_report(self.folder, *found)
        if args.report:
            write_run_page(args.report, *found)
        return Result(folder, rows, notes, self.history)
