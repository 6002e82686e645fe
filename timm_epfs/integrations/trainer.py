"""transformers' ``Trainer`` with a learner: a callback that steps it, and a mixin for what callbacks can't do."""
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Mapping, Optional, Type, Union

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..core import PruningError
from ..learn import Learner, method_of
from ..plan import PrunedModel
from ..surgery import is_masked, unmasked_name
from ..training.checkpoints import Checkpoints
from ..zoo import save_pretrained

__all__ = ['PruningCallback', 'PruningTrainerMixin']

_FOLDER = 'learner'  # of the learner's state, in the Trainer's checkpoints
_KEPT = ('id2label', 'label2id', 'problem_type', 'pretrained_cfg')  # of a wrapped model's config, where it's pruned


class PruningCallback(TrainerCallback):
    """Learns what to cut while a ``Trainer`` trains. The ``Trainer`` needs ``PruningTrainerMixin``.

    ::

        class PruningTrainer(PruningTrainerMixin, Trainer):
            pass

        pruning = PruningCallback('epfs', macs=0.5)
        trainer = PruningTrainer(model, args, train_dataset=images, callbacks=[pruning])
        trainer.train()
        trainer.save_model('half')  # the pruned model
        slim = pruning.export()     # or in memory, to fine-tune it

    The learner is made when training begins. Of a model that transformers wraps for timm, it learns the timm model. All
    processes make their own, and select the same units.

    Args:
        method: What learns: ``'epfs'``, ``'sss'``, ``'sfp'``, ``'bn_sfp'``, or a class with their calls.
        **options: Arguments of the method but for the model. ``steps`` is half the steps of the training by default;
            the model adapts to the selection in those that follow.

    Attributes:
        learner: The learner. None before training begins.

    Raises:
        PruningError: There is no such method.
    """

    def __init__(self, method: Union[str, Type[Learner]] = 'epfs', **options: Any):
        self.method = method_of(method)
        self.options = options
        self.learner: Optional[Learner] = None
        self._model: Optional[nn.Module] = None
        self._saved: Dict[str, Any] = {}  # what the next training resumes from
        self._has_penalty = False

    def on_train_begin(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            model: Optional[nn.Module] = None,
            **kwargs: Any,
    ) -> None:
        """Make the learner, unless an earlier training of this model did, or resume it.

        Raises:
            PruningError: An argument of the training or of the method can't be.
        """
        if args.load_best_model_at_end:
            raise PruningError(
                'load_best_model_at_end=True would bring back weights of before the selection; leave it out while a '
                'PruningCallback is on')
        if args.n_gpu > 1:
            raise PruningError(
                f'the Trainer spreads the model over {args.n_gpu} GPUs by DataParallel, which copies no masks; start a '
                'process for each with torchrun, or set CUDA_VISIBLE_DEVICES to one')
        if self._model is not model:
            steps = self._saved.get('steps') or max(1, state.max_steps // 2)
            self.learner = self.method(_inner(model), **{'steps': steps, **self.options})
            self._model = model
        if self._saved:
            self.learner.load_state_dict(self._saved['state'])
            self._saved = {}

    def on_optimizer_step(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            **kwargs: Any,
    ) -> None:
        """Move the masks."""
        if not self._has_penalty:
            raise PruningError(
                'PruningCallback: the loss has no penalty in it; train with a class PruningTrainer(PruningTrainerMixin,'
                ' Trainer)')
        self.learner.step()

    def penalty(self, target: Any = None) -> torch.Tensor:
        """The learner's term of the loss of the last forward, a scalar. ``PruningTrainerMixin`` adds it."""
        self._has_penalty = True
        return self.learner.penalty(target)

    def export(self) -> nn.Module:
        """Cut a copy of the model. Of a wrapped timm model, the copy is wrapped, too.

        That one can be fine-tuned in a ``Trainer``, and saved by its own ``save_pretrained``: timm and
        ``AutoModelForImageClassification`` load what that writes. Any other is what ``Learner.export`` returns; save it
        by ``timm_epfs.save_pretrained``.

        Raises:
            PruningError: Training hasn't begun, or the model isn't what its config builds.
        """
        if self.learner is None:
            raise PruningError('export: there is no learner before training begins; call trainer.train() first')
        slim = self.learner.export()
        return slim if _inner(self._model) is self._model else _wrapped(self._model, slim)

    def save(self, checkpoint: Union[str, Path], step: int) -> None:
        """Write the learner's state into a checkpoint of the ``Trainer``, without pickle."""
        state = {'steps': self.learner.steps, 'state': self.learner.state_dict()}
        Checkpoints(Path(checkpoint) / _FOLDER, keep=1).save(state, step)

    def resume(self, checkpoint: Union[str, Path]) -> None:
        """Read the learner's state from a checkpoint, for the training that follows. Without one, it learns anew."""
        self._saved = Checkpoints(Path(checkpoint) / _FOLDER).load() or {}
        if self.learner is not None:  # of an earlier training of this program
            self.learner.remove()
        self._model = self.learner = None


class PruningTrainerMixin:
    """What a ``PruningCallback`` needs of a ``Trainer``, and distillation from a teacher. Put it before ``Trainer``.

    - The loss of training includes the penalty of the callback's learner, and logs have its numbers.
    - Checkpoints hold the dense weights under their own names, and the learner's state in a folder beside them.
      Training resumes from them exactly.
    - ``save_model`` and ``push_to_hub`` write the pruned model once training has begun: a wrapped timm model for
      transformers and timm, any other for ``timm_epfs.load_pretrained``.

    Without a callback, it trains any model, such as a pruned one, with a teacher.

    Args:
        *args: Those of ``Trainer``.
        teacher: A model, such as the dense one, that takes what the trained one takes: the loss includes the KL
            divergence of its class probabilities from the trained model's (Hinton et al., 2015). It is moved to the
            device of the training and put into evaluation mode. A copy of the trained model must be made before
            training begins.
        distill_loss_weight: Factor of that divergence.
        task_loss_weight: Factor of the loss that ``Trainer`` computes, where there is a teacher.
        kd_temperature: Softmax temperature of both models in it.
        **kwargs: Those of ``Trainer``.
    """

    def __init__(
            self,
            *args: Any,
            teacher: Optional[nn.Module] = None,
            distill_loss_weight: float = 1.0,
            task_loss_weight: float = 1.0,
            kd_temperature: float = 4.0,
            **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.distill_loss_weight, self.task_loss_weight = distill_loss_weight, task_loss_weight
        self.kd_temperature = kd_temperature

    @property
    def pruning(self) -> Optional[PruningCallback]:
        """The ``PruningCallback``; None where there is none."""
        return next((c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback)), None)

    def train(self, resume_from_checkpoint: Optional[Union[str, bool]] = None, **kwargs: Any) -> Any:
        """As in ``Trainer``. A learner resumes with it."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint and self.pruning is not None:
            self.pruning.resume(checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(
            self,
            model: nn.Module,
            inputs: Dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Optional[Union[torch.Tensor, int]] = None,
    ) -> Any:
        """As in ``Trainer``; in training, with the penalty and the divergence from the teacher."""
        labels = {name: inputs[name] for name in self.label_names if name in inputs}
        images = {name: value for name, value in inputs.items() if name not in labels}
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            share = self._share(num_items_in_batch)
            if self.teacher is not None:
                divergence = self._divergence(images, outputs)
                loss = self.task_loss_weight * loss + self.distill_loss_weight * share * divergence
            if self.pruning is not None:
                loss = loss + share * self.pruning.penalty(next(iter(labels.values()), None))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: Dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in ``Trainer``, with the learner's numbers."""
        if self.is_in_train and self.pruning is not None and self.pruning.learner is not None:
            logs = {**logs, **{f'pruning_{name}': value for name, value in self.pruning.learner.log().items()}}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        """As in ``Trainer``; once there is a learner, the pruned model, and in checkpoints all that resuming takes."""
        pruning = self.pruning
        if pruning is None or pruning.learner is None:
            super().save_model(output_dir, _internal_call)
        elif output_dir is not None and _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                pruning.save(output_dir, self.state.global_step)
        else:
            self._save_pruned(pruning.export(), output_dir, _internal_call)

    def _save_pruned(self, slim: nn.Module, output_dir: Optional[str], _internal_call: bool) -> None:
        if _inner(slim) is slim:  # no config of transformers builds it
            if self.args.should_save:
                save_pretrained(slim, output_dir or self.args.output_dir, overwrite=True)
            return
        trained, self.model = self.model, slim
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = trained

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[Dict[str, torch.Tensor]] = None) -> None:
        if state_dict is None and is_masked(self.model):
            tensors = self.model.state_dict()
            state_dict = {unmasked_name(self.model, name): tensor for name, tensor in tensors.items()}
        super()._save(output_dir, state_dict)

    def _share(self, num_items_in_batch: Any) -> float:
        """Factor of a mean over this batch in a loss that ``Trainer`` divides by the steps of accumulation, or not."""
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = by_model or self.compute_loss_func is not None
        return 1 / self.current_gradient_accumulation_steps if is_scaled else 1.0

    def _divergence(self, images: Mapping[str, Any], outputs: Any) -> torch.Tensor:
        """KL divergence of the teacher's probabilities from the outputs', times the temperature's square, a scalar."""
        with torch.no_grad(), self.accelerator.autocast():
            taught = _logits(self.teacher(**images))
        student, teacher = (F.log_softmax(x.float() / self.kd_temperature, -1) for x in (_logits(outputs), taught))
        return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * self.kd_temperature ** 2


def _inner(model: nn.Module) -> nn.Module:
    """The timm model that transformers wraps; any other model itself."""
    return getattr(model, 'timm_model', model)


def _logits(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def _wrapped(model: nn.Module, slim: PrunedModel) -> nn.Module:
    """A model of transformers like the given one around a pruned timm model, with a config that builds it."""
    kept = {name: getattr(model.config, name) for name in _KEPT if hasattr(model.config, name)}
    with TemporaryDirectory() as folder:
        wrapped = type(model).from_pretrained(save_pretrained(slim, folder), **kept)
    wrapped.config.name_or_path = model.config.name_or_path
    wrapped.timm_model = slim  # what a name doesn't say, such as drop rates, stays, too
    return wrapped.train(slim.training)
