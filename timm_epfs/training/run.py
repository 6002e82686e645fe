"""A run from a dense model to a pruned one: train, learn the cut, cut, fine-tune, save, compare."""
import argparse
import inspect
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional

import safetensors.torch
import timm
import torch
import torch.distributed as dist
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask, TrainingTask
from timm.utils import init_distributed_device, random_seed
from torch import nn

from ..core import DEFAULT_KINDS, PruningError, one_line, progress, step, write_whole
from ..importance import CRITERIA, Criterion
from ..latency import latencies, latency_note
from ..learn import METHODS, Learner
from ..plan import Plan
from ..pruner import Pruner
from ..report import Rows, compare, top1
from ..surgery import rebuild
from ..zoo import create_model, load_weights, note_origin, save_pretrained
from .checkpoints import Checkpoints, write_tensors
from .data import Batches, count_classes, describe, open_batches
from .options import PHASES, budget, check_options, cut_options, phase_epochs, run_options
from .phase import Phase, evaluate
from .run_pictures import mask_histogram
from .summary import claim_folder, write_report, write_summary

__all__ = ['Result', 'train']

_SCORING = 32  # batches that a criterion which needs data sees


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: Of the pruned model, which ``timm.create_model('local-dir:<folder>', pretrained=True)`` builds.
        rows: Dense and pruned value by quantity, and how each is shown.
        notes: How they were measured.
        history: One row an epoch.
    """
    folder: Path
    rows: Rows
    notes: str
    history: List[Dict[str, Any]]


def train(args: argparse.Namespace, model_args: Mapping[str, Any]) -> Optional[Result]:
    """Run what ``timm-epfs train`` was asked for.

    Args:
        args: Options, as ``add_train_arguments`` and the model's own define them.
        model_args: Keyword arguments of the model.

    Returns:
        The result, on the first process; None on others.

    Raises:
        PruningError: What was asked can't be done; one line says why and what to do.
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
    """The state that goes from phase to phase."""

    def __init__(self, args: argparse.Namespace, model_args: Mapping[str, Any]):
        self.args, self.model_args = args, dict(model_args)
        self.first = args.rank == 0
        self.folder = args.output.resolve()
        self.dense_path = self.folder / 'dense.safetensors'
        self.checkpoints = Checkpoints(self.folder / 'checkpoints', args.checkpoint_hist)
        self.options = {**run_options(args), 'model_args': json.loads(json.dumps(self.model_args, default=str))}
        self.epochs = phase_epochs(args)
        self.history: List[Dict[str, Any]] = []
        self.masks: List[Dict[str, Any]] = []
        if self.first:
            claim_folder(self.folder, args.resume, args.overwrite)
        self._wait()

        self.saved = self._load() if args.resume else None
        random_seed(args.seed)
        with step(f'building {args.model}'):
            self.model = self._dense(args.pretrained and not self.saved)
            if args.pretrained:
                note_origin(self.model)  # of a run that goes on, too
            if args.checkpoint and not self.saved:
                load_weights(self.model, args.checkpoint)
        self.config = describe(self.model, args)
        self.num_classes = count_classes(self.model, self.config['input_size'])
        self._placed(self.model)
        if not self.saved:
            self._rehearse()
        self.batches = self._open_batches()

    @cached_property
    def pruner(self) -> Pruner:
        """The dense model with its trace, which serves the whole run."""
        method = METHODS.get(self.args.method)
        options, _ = cut_options(self.args)
        options.setdefault('kinds', method.default_kinds if method else DEFAULT_KINDS)
        with step(f'tracing {self.args.model}'), one_line(f'--method {self.args.method} can\'t be set up'):
            return Pruner(self.model, data=_Lazily(lambda: islice(self.batches.train, _SCORING)), **options)

    def _rehearse(self) -> None:
        """Refuse before any training what would be refused after it."""
        if self.args.method == 'none':
            self._check_one_shot()
            return
        learner = self._learner(1, 1)
        try:
            self.pruner.composed(learner.plan())
        finally:
            learner.remove()

    def _check_one_shot(self) -> None:
        criterion = CRITERIA.get(self.args.criterion)
        if self.args.distributed:
            self._check_shared(criterion)
        with one_line('--method none can\'t cut'):
            self.pruner.check(budget(self.args), **self._one_shot_options())

    def _one_shot_options(self) -> Dict[str, Any]:
        """How ``--method none`` chooses units."""
        _, options = cut_options(self.args)
        return {'criterion': self.args.criterion or 'l2', 'seed': self.args.seed, **options}

    def _check_shared(self, criterion: Optional[Criterion]) -> None:
        """Refuse a one-shot cut that processes would not agree about."""
        clock = 'with --method none goes by a clock'
        _, options = cut_options(self.args)
        reasons = (
            (criterion is not None and criterion.needs_data, f'--criterion {self.args.criterion} needs data,'),
            (self.args.latency is not None, f'--latency {clock}'),
            (options.get('round_to') == 'auto', f'--round-to auto {clock}'),
        )
        for applies, reason in reasons:
            if applies:
                raise PruningError(f'{reason} of which each process has its own: run it in one process')

    def _open_batches(self) -> Batches:
        return open_batches(self.args, self.config, self.num_classes)

    def _placed(self, model: nn.Module) -> nn.Module:
        """The model itself, where it runs."""
        layout = torch.channels_last if self.args.channels_last else torch.preserve_format
        return model.to(self.args.device).to(memory_format=layout)

    def __call__(self) -> Optional[Result]:
        """Train phase by phase, from where the last checkpoint was left; the result is the first process's alone."""
        begin = PHASES.index(self.saved['phase']) if self.saved else 0
        if self.first:
            text = json.dumps({**self.options, 'epochs_by_phase': self.epochs}, indent=1) + '\n'
            write_whole(self.folder / 'args.json', lambda part: part.write_text(text, encoding='utf-8'))
        if self.saved:
            self.history, self.masks = self.saved['history'], self.saved['masks']
            if self.saved['plan']:
                self.model = self._placed(self._rebuilt(self.saved['plan']))
        with self._bar(begin) as self.bar:
            for phase in PHASES[begin:]:
                self._run_phase(phase, self.saved if self.saved and self.saved['phase'] == phase else None)
        return self._finish() if self.first else None

    def _run_phase(self, name: str, saved: Optional[Mapping[str, Any]]) -> None:
        """Train through a phase, from where it was left, and do what its end asks for."""
        random_seed(self.args.seed)
        phase = self._phase(name, saved) if self.epochs[name] else None
        for epoch in range(saved['epoch'] if saved else 0, self.epochs[name]):
            self._epoch(phase, epoch)
        averaged = phase.task.get_trainable_module(ema=True) if phase and phase.task.has_ema() else None
        if name == 'sparse':
            self.model = phase.learner.export(averaged and averaged.module) if phase else self._one_shot()
            self._record('cut', evaluate(self.args, self._task('cut'), self.batches.validation))
        elif averaged is not None:
            self.model.load_state_dict(averaged.module.state_dict())
        if name == 'dense':
            self._keep_dense()

    def _phase(self, name: str, saved: Optional[Mapping[str, Any]]) -> Phase:
        """A phase at its start, or where it was left."""
        updates = -(-len(self.batches.train) // self.args.grad_accum_steps)
        learner = self._learner(self.epochs[name] * updates, updates) if name == 'sparse' else None
        phase = Phase(self.args, name, self._task(name), self.epochs[name], updates, learner, self.num_classes)
        if saved:
            with one_line(f'--resume: the checkpoint in {self.checkpoints.folder} is of another version or model'):
                phase.load_state_dict(saved)
        return phase

    def _epoch(self, phase: Phase, epoch: int) -> None:
        """Train and evaluate for an epoch whose random numbers depend on nothing before it, then save."""
        number = 1 + epoch + sum(self.epochs[name] for name in PHASES[:PHASES.index(phase.name)])
        random_seed((self.args.seed + 9973 * number) % 2 ** 31, self.args.rank)
        self.batches.set_epoch(number)
        what = f'{phase.name} {epoch + 1}/{self.epochs[phase.name]}'

        def show(steps: int, values: Dict[str, float]) -> None:
            alive = {'alive': f'{phase.learner.alive:.3f}'} if phase.learner else {}
            self.bar.set_description(what, refresh=False)
            self.bar.set_postfix(loss=f'{values["loss"]:.3f}', top1=f'{values["top1"]:.1f}', **alive, refresh=False)
            self.bar.update(steps)

        trained = phase.train(self.batches.train, show)
        watched = phase.learner.log() if phase.learner else {}
        values = {'mask_lr' if name == 'lr' else name: value for name, value in watched.items()}
        self._record(phase.name, phase.evaluate(self.batches.validation), trained, lr=phase.lr, **values)
        if phase.learner:
            self.masks.append(mask_histogram([*phase.learner.values().values()]))
        if self.first:
            plan = self.model.pruning_plan.to_dict() if phase.name == 'finetune' else None
            state = {'options': self.options, 'phase': phase.name, 'epoch': epoch + 1, 'plan': plan,
                     'history': self.history, 'masks': self.masks, **phase.state_dict()}
            self.checkpoints.save(state, number)

    def _record(
            self,
            phase: str,
            evaluated: Mapping[str, float],
            trained: Optional[Mapping[str, float]] = None,
            **values: float,
    ) -> None:
        """One more row of the history: shown, and written where whoever waits can read it."""
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
        plan = getattr(self.model, 'pruning_plan', None)
        return plan.cost['macs'][1] / plan.cost['macs'][0] if plan else 1.0

    def _dense(self, pretrained: bool) -> nn.Module:
        return create_model(self.args.model, pretrained, **self.model_args)

    def _keep_dense(self) -> None:
        """The dense weights in a file of their own: to compare with, to distill from, and for other runs."""
        if self.first:
            write_tensors(self.dense_path, self.model.state_dict())
        self._wait()

    def _kept_dense(self) -> nn.Module:
        model = self._dense(pretrained=False)
        describe(model, self.args)
        with one_line(f'the dense weights in {self.dense_path} can\'t be read'):
            model.load_state_dict(safetensors.torch.load_file(self.dense_path))
        return model.to(self.args.device)

    def _rebuilt(self, plan: Mapping[str, Any]) -> nn.Module:
        model = rebuild(Plan.from_dict(plan))
        for name in ('pretrained_cfg', 'default_cfg'):  # a tag's may be others than the plan's base has
            if hasattr(self.model, name):
                setattr(model, name, getattr(self.model, name))
        return model

    def _learner(self, steps: int, steps_per_epoch: int) -> Learner:
        method = METHODS[self.args.method]
        _, options = cut_options(self.args)
        if 'steps_per_epoch' in inspect.signature(method).parameters:
            options.setdefault('steps_per_epoch', steps_per_epoch)
        pruner = self.pruner
        with step(f'setting up {self.args.method}'), one_line(f'--method {self.args.method} can\'t be set up'):
            return method(pruner, budget(self.args), steps, **options)

    def _one_shot(self) -> nn.Module:
        with step(f'cutting {self.args.model}'), one_line('--method none can\'t cut'):
            return self.pruner(budget(self.args), **self._one_shot_options())

    def _task(self, phase: str) -> TrainingTask:
        device = torch.device(self.args.device)
        mixed = self.args.mixup > 0 or self.args.cutmix > 0
        loss = {'smoothing': 0.0 if mixed else self.args.smoothing, 'soft_targets': mixed}
        if phase != 'finetune' or not self.args.distill:
            return ClassificationTask(self.model, criterion_kwargs=loss, device=device, verbose=False)
        return LogitDistillationTask(
            self.model, DistillationTeacher(self._kept_dense(), device=device), criterion_kwargs=loss, device=device,
            distill_loss_weight=self.args.distill_loss_weight, task_loss_weight=self.args.task_loss_weight,
            temperature=self.args.kd_temperature, verbose=False,
        )

    def _bar(self, begin: int) -> Any:
        """One bar for the whole run, so that its time left is the run's."""
        batches = len(self.batches.train)
        bar = progress((), 'training', batches * self.args.epochs)
        bar.disable = not self.first
        bar.delay = 0  # what write() draws again before a delay is over, close() would leave there
        done = sum(self.epochs[name] for name in PHASES[:begin]) + (self.saved['epoch'] if self.saved else 0)
        bar.initial = bar.n = batches * done
        return bar

    def _load(self) -> Optional[Dict[str, Any]]:
        saved = self.checkpoints.load()
        for name, now in self.options.items() if saved else ():
            if (then := saved['options'].get(name)) != now:
                raise PruningError(f'--resume: the run in {self.folder} was started with {name} {then}, now it is '
                                   f'{now}: ask for the same, or start again with --overwrite')
        return saved

    def _wait(self) -> None:
        if self.args.distributed:
            dist.barrier()

    def _finish(self) -> Result:
        """Save the pruned model, build it again from there, and compare it with the dense one."""
        args = self.args
        folder = save_pretrained(self.model, self.folder / 'pruned', overwrite=True)
        with one_line(f'{folder} can\'t be loaded again'):
            slim = timm.create_model(f'local-dir:{folder}', pretrained=True).to(args.device).eval()
        dense = self._kept_dense()
        models, images = [dense, slim], self.batches.test
        accuracy = top1(models, progress(images, 'measuring top-1', len(images)))
        image = torch.randn(1, *self.config['input_size'], generator=torch.Generator().manual_seed(args.seed))
        with step('measuring latency'):
            speed = latencies(models, image.to(args.device))
        rows = compare(dense, slim, {'top-1, %': tuple(accuracy)}, speed)
        notes = latency_note(args.device)
        write_report(self.folder, self.options, rows, notes, self.history, self.masks, slim.pruning_plan)
        return Result(folder, rows, notes, self.history)


@dataclass(frozen=True)
class _Lazily:
    """Batches that are drawn when they are first needed, and anew each time."""
    draw: Callable[[], Iterable]

    def __iter__(self) -> Iterator:
        return iter(self.draw())
