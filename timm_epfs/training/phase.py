"""One phase of a run: trains a model epoch by epoch, with a task, an optimizer and a schedule of timm."""
import argparse
import math
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, Iterator, Optional, Tuple

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import AverageMeter, NativeScaler, accuracy, dispatch_clip_grad, distribute_bn
from torch import Tensor, nn

from ..core import PruningError, one_line
from ..surgery import cut_optimizer

__all__ = ['Phase', 'evaluate']

_CHECK_EVERY = 20  # steps between two checks of the loss; reading it waits for the device


class Phase:
    """One phase of training.

    Args:
        args: The options of ``timm-epfs train``.
        name: Name of the phase.
        task: timm's task, with the model on its device.
        epochs: Number of epochs of the phase.
        updates: Optimizer steps per epoch.
        learner: The method that learns the cut, in the sparse phase. None in other phases.
        num_classes: Number of the model's classes; a label that is not below it is an error. None: not checked.

    Raises:
        PruningError: The optimizer or the schedule can't be set up.
    """

    def __init__(
            self,
            args: argparse.Namespace,
            name: str,
            task: TrainingTask,
            epochs: int,
            updates: int,
            learner: Optional[Any] = None,
            num_classes: Optional[int] = None,
    ):
        self.args, self.name, self.task, self.learner, self.num_classes = args, name, task, learner, num_classes
        self.device = torch.device(args.device)
        self.done = 0  # optimizer steps
        lr, sched = _lr_and_schedule(args, name)
        with one_line(f'optimizer {args.opt!r} with schedule {sched!r} can\'t be set up'):
            self.optimizer = create_optimizer_v2(
                task.get_trainable_module(), opt=args.opt, lr=lr, weight_decay=args.weight_decay,
                momentum=args.momentum, **args.opt_kwargs,
            )
            warmup = min(5.0, 0.1 * epochs) if args.warmup_epochs is None else min(args.warmup_epochs, epochs)
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer, sched=sched, num_epochs=epochs, min_lr=args.min_lr, warmup_epochs=warmup,
                warmup_lr=min(args.warmup_lr, lr), noise_seed=args.seed, step_on_epochs=False,
                updates_per_epoch=updates,
            )
        scale_loss = args.amp and args.amp_dtype == 'float16'
        self.scaler = NativeScaler(device=self.device.type) if scale_loss else None
        self._prepare_task()
        self._update_lr()

    def _prepare_task(self) -> None:
        args = self.args
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile)
        if args.distributed:
            self.task.prepare_distributed(device_ids=[args.local_rank] if self.device.type == 'cuda' else None)

    def go_on_with(self, task: TrainingTask, before: nn.Module, after: nn.Module) -> None:
        """Train what a cut left of the model, with the optimizer's state and the schedule. Averages start anew.

        Args:
            task: A task with the cut model.
            before: The model that was trained so far.
            after: The cut model.

        Raises:
            PruningError: The optimizer's state can't be cut.
        """
        cut_optimizer(self.optimizer, before, after)
        self.task = task
        self._prepare_task()

    def _update_lr(self) -> None:
        """Set the learning rate of the next step; ``lr`` keeps that of the last one, for the history."""
        self.lr = self.optimizer.param_groups[0]['lr']
        if self.scheduler is not None:
            self.scheduler.step_update(self.done)

    def state_dict(self) -> Dict[str, Any]:
        """Everything that the next step depends on, except the state of random number generators."""
        return {
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict() if self.scaler else None,
            'learner': self.learner.state_dict() if self.learner else None,
            'done': self.done,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from where ``state_dict`` was taken, but with the learning rate that the options ask for now."""
        self.task.load_checkpoint_state(state['state_dict'])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state['state_dict_ema'], ema=True)
        if self.scaler:
            self.scaler.load_state_dict(state['scaler'])
        if self.learner:
            self.learner.load_state_dict(state['learner'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.done = state['done']
        self._update_lr()  # overwrites the saved rate: --lr may have been lowered

    def train(self, loader: Any, show: Callable[[int, Dict[str, float]], None]) -> Dict[str, float]:
        """Train for one epoch.

        Args:
            loader: Batches on the device.
            show: Called every few steps with the number of steps since the last call, and with the mean loss and top-1
                of the epoch so far.

        Returns:
            Mean loss and top-1 in percent.

        Raises:
            PruningError: The loss is NaN or infinite, a label is out of range, or there is no batch.
        """
        self.task.train()
        self.optimizer.zero_grad()
        meters = {'loss': AverageMeter(), 'top1': AverageMeter()}
        first_bad = torch.full((), math.inf, device=self.device)  # first step with a loss that isn't finite, if any
        batches, shown, step = len(loader), 0, 0
        for step, (images, target) in enumerate(_reading(loader), 1):
            if step == 1 or self.device.type == 'cpu':  # on other devices, each check would wait for the device
                self._check_target(target)
            loss, output = self._step(images, target, step, batches)
            first_bad = torch.where(torch.isfinite(loss), first_bad, first_bad.clamp(max=self.done))
            hard = target.argmax(1) if target.ndim > 1 else target
            meters['loss'].update(loss, len(target))
            meters['top1'].update(accuracy(output, hard)[0], len(target))
            if step % _CHECK_EVERY == 0 or step == batches:
                self._check_loss(first_bad)
                show(step - shown, {name: float(meter.avg) for name, meter in meters.items()})
                shown = step
        if not step:
            raise PruningError('data: the training split has no batch; give at least one batch of images')
        self._check_loss(first_bad)
        if self.args.distributed:
            distribute_bn(self.task.get_trainable_module(), self.args.world_size, reduce=True)
        return {name: self._mean(meter) for name, meter in meters.items()}

    def _step(self, images: Tensor, target: Tensor, step: int, batches: int) -> Tuple[Tensor, Tensor]:
        """Train on one batch, and update the weights if its group of accumulated batches is complete.

        The gradient of a group is the mean over its batches. The last group of an epoch may be smaller than the others.

        Returns:
            Loss and logits, detached.
        """
        accumulated = self.args.grad_accum_steps
        update = step % accumulated == 0 or step == batches
        in_last_group = step > batches - batches % accumulated
        group_size = batches % accumulated if in_last_group else accumulated
        with nullcontext() if update else self.task.no_sync():
            with autocast(self.args):
                result = self.task(in_layout(self.args, images), target)
                loss = result['loss']
                if self.learner:
                    loss = loss + self.learner.penalty(target.argmax(1) if target.ndim > 1 else target)
            self._backward(loss / group_size, update)
        if update:
            self._after_update()
        return loss.detach(), result['output'].detach()

    def _backward(self, loss: Tensor, update: bool) -> None:
        clip = {'clip_grad': self.args.clip_grad, 'clip_mode': self.args.clip_mode}
        parameters = self.task.get_clip_parameters(exclude_head=self.args.clip_mode == 'agc')
        if self.scaler:
            self.scaler(loss, self.optimizer, parameters=parameters, need_update=update, **clip)
            return
        loss.backward()
        if update:
            if self.args.clip_grad is not None:
                dispatch_clip_grad(parameters, value=self.args.clip_grad, mode=self.args.clip_mode)
            self.optimizer.step()

    def _after_update(self) -> None:
        self.optimizer.zero_grad()
        self.done += 1
        if self.learner:
            self.learner.step()
        self.task.update_ema(step=self.done)
        self._update_lr()

    def _check_loss(self, first_bad: Tensor) -> None:
        step = float(first_bad)
        if math.isfinite(step):
            raise PruningError(
                f'the loss of step {int(step)} of the {self.name} phase is NaN or infinite; lower --lr or clip '
                'gradients (--clip-grad 1), and continue from the last checkpoint with --resume')

    def _check_target(self, target: Tensor) -> None:
        if self.num_classes and target.ndim == 1 and int(target.max()) >= self.num_classes:
            raise PruningError(
                f'data: an image has label {int(target.max())}, the model has {self.num_classes} classes; give '
                '--num-classes')

    def _mean(self, meter: AverageMeter) -> float:
        """The mean over the batches of all processes."""
        if not self.args.distributed:
            return float(meter.avg)
        sums = torch.stack([meter.sum.double(), torch.tensor(meter.count, device=self.device).double()])
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def evaluate(self, loader: Any) -> Dict[str, float]:
        """Loss and top-1 in percent of the weights that the next phase would start from: the averaged ones, if any."""
        return evaluate(self.args, self.task, loader)


@torch.no_grad()
def evaluate(args: argparse.Namespace, task: TrainingTask, loader: Any) -> Dict[str, float]:
    """Loss and top-1 in percent over a split, with the task's averaged weights if it has any.

    Raises:
        PruningError: The split has no batch.
    """
    model = task.get_eval_model(ema=task.has_ema())
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for images, target in _reading(loader):
        with autocast(args):
            output = model(in_layout(args, images))
        evaluator.update(output, target)
    if not evaluator.num_samples:
        raise PruningError('data: the validation split has no batch; give at least one image')
    metrics = evaluator.compute(distributed=args.distributed)
    return {name: metrics[name] for name in ('loss', 'top1')}


def autocast(args: argparse.Namespace) -> ContextManager:
    """The context of mixed precision, if the options ask for it."""
    if not args.amp:
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype))


def in_layout(args: argparse.Namespace, images: Tensor) -> Tensor:
    """Images in the memory layout that the options ask for."""
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def _reading(loader: Any) -> Iterator:
    with one_line('data: images can\'t be read'):
        yield from loader


def _lr_and_schedule(args: argparse.Namespace, phase: str) -> Tuple[float, str]:
    """The learning rate of a phase and the name of its schedule."""
    if phase == 'sparse':
        return 0.5 * args.lr if args.sparse_lr is None else args.sparse_lr, args.sparse_sched
    if phase == 'finetune':
        return 0.5 * args.lr if args.finetune_lr is None else args.finetune_lr, args.sched
    return args.lr, args.sched
