"""Lightning's ``Trainer`` with a learner: a callback that learns what to cut, cuts, and goes on with what is left."""
from math import ceil, isfinite
from typing import Any, Callable, Dict, Mapping, Optional, Type, Union

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import PruningError, one_line
from ..learn import Learner, method_of
from ..plan import Plan
from ..surgery import cut_copy, cut_optimizer

__all__ = ['LightningPruningCallback']

_TARGETS = ('target', 'targets', 'label', 'labels')


class LightningPruningCallback(pl.Callback):
    """Learns what to cut in the first epochs of a ``Trainer``, cuts, and lets it fine-tune what is left.

    ::

        pruning = LightningPruningCallback('epfs', macs=0.5, sparse_epochs=10)
        trainer = L.Trainer(max_epochs=15, callbacks=[pruning])
        trainer.fit(module, loader)
        timm_epfs.save_pretrained(module.model, 'half')

    The model is an attribute of the ``LightningModule``, which holds the smaller model after the cut. The optimizers
    go on with it (``cut_optimizer``), and so do their learning rate schedulers and the gradient scaler. Checkpoints of
    any time can be resumed from, by a module as it was before training. Works with automatic optimization, mixed
    precision, accumulation and DDP; in manual optimization, with one backward for each step.

    Args:
        method: What learns: ``'epfs'``, ``'sss'``, ``'sfp'``, ``'bn_sfp'``, or a class with their calls.
        sparse_epochs: Number of epochs in which the method learns. The cut is made at the start of the next, or at the
            end of training if there is none.
        attribute: Name of the ``LightningModule``'s attribute that is the model to prune.
        target: Gives the classes of a batch, for Center Loss. None: what follows the images in a tuple, or an entry
            ``'target'`` or ``'label'`` of a dict.
        **options: Arguments of the method but for the model. ``steps`` is the number of optimizer steps in
            ``sparse_epochs`` by default.

    Attributes:
        learner: The learner. None before training begins, and after the cut.

    Raises:
        PruningError: There is no such method, or ``sparse_epochs`` isn't a positive integer.
    """

    def __init__(
            self,
            method: Union[str, Type[Learner]] = 'epfs',
            *,
            sparse_epochs: int,
            attribute: str = 'model',
            target: Optional[Callable[[Any], Any]] = None,
            **options: Any,
    ):
        if not (isinstance(sparse_epochs, int) and sparse_epochs >= 1):
            raise PruningError(f'sparse_epochs={sparse_epochs!r} was given; give a positive integer')
        self.method = method_of(method)
        self.sparse_epochs, self.attribute, self.target, self.options = sparse_epochs, attribute, target, options
        self.learner: Optional[Learner] = None
        self._plan: Optional[Plan] = None   # of the cut, made on the model as it was before training
        self._slim: Optional[nn.Module] = None
        self._batch_target: Any = None
        self._has_penalty = False           # whether the gradients of the next step include the penalty's

    # What the Trainer calls.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the learner, before weights are loaded: masked tensors have longer names."""
        model = self._model(pl_module)
        if self._slim is not model:
            self._plan = self._slim = None
        is_new = self._slim is None and (self.learner is None or self.learner.model is not model)
        if stage == 'fit' and is_new:
            _check_strategy(trainer)
            self._check_epochs_and_callbacks(trainer)
            self._make_learner(model, self.options.get('steps') or self._count_steps(trainer))
        own = pl_module.on_load_checkpoint

        def prepare_then_own(checkpoint: Dict[str, Any]) -> None:
            self._prepare(pl_module, checkpoint.get('callbacks', {}).get(self.state_key))
            own(checkpoint)

        # No hook of a callback runs before the module's weights are loaded.
        pl_module.on_load_checkpoint = prepare_then_own

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its own hook back."""
        vars(pl_module).pop('on_load_checkpoint', None)

    def on_train_batch_start(
            self,
            trainer: pl.Trainer,
            pl_module: pl.LightningModule,
            batch: Any,
            batch_idx: int,
    ) -> None:
        """Cut if it is time. Not when an epoch starts: a resumed one doesn't."""
        if self.learner and trainer.current_epoch >= self.sparse_epochs:
            self._cut(trainer, pl_module)
        self._batch_target = (self.target or _target)(batch) if self.learner else None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the penalty to the loss of the backward, with what the Trainer multiplied that by."""
        if self.learner is None:
            return
        scaler = getattr(trainer.precision_plugin, 'scaler', None)
        scale = scaler.get_scale() if scaler else 1.0
        if pl_module.automatic_optimization:
            scale /= trainer.accumulate_grad_batches
        loss.add_((self.learner.penalty(self._batch_target) * scale).to(loss.dtype))
        self._has_penalty = True

    def on_before_optimizer_step(
            self,
            trainer: pl.Trainer,
            pl_module: pl.LightningModule,
            optimizer: Optimizer,
    ) -> None:
        """Move the masks: once for each step, however many batches it accumulates."""
        if self.learner and self._has_penalty:
            self.learner.step()
            self._has_penalty = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the learner's numbers."""
        if self.learner:
            self.log_dict({f'pruning/{name}': value for name, value in self.learner.log().items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut if training ended with the last sparse epoch."""
        if self.learner and trainer.current_epoch >= self.sparse_epochs:
            self._cut(trainer, pl_module)

    def state_dict(self) -> Dict[str, Any]:
        """The learner's state; after the cut, its plan. Tensors, numbers and text."""
        if self.learner:
            return {'steps': self.learner.steps, 'learner': self.learner.state_dict()}
        return {'plan': self._plan.to_json()} if self._plan else {}

    # How it does it.

    def _check_epochs_and_callbacks(self, trainer: pl.Trainer) -> None:
        """Raise ``PruningError`` where the model would never be cut, or something can't follow a cut."""
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < self.sparse_epochs:
            raise PruningError(
                f'sparse_epochs={self.sparse_epochs} was given, and training ends after {trainer.max_epochs} epochs; '
                'give fewer, or a larger max_epochs')
        for callback in trainer.callbacks:
            if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
                raise PruningError(
                    f'{type(callback).__name__} averages weights that change their shapes at the cut; average while '
                    'you fine-tune, in a Trainer of its own')

    def _model(self, pl_module: pl.LightningModule) -> nn.Module:
        model = getattr(pl_module, self.attribute, None)
        if not isinstance(model, nn.Module):
            raise PruningError(
                f'{type(pl_module).__name__}.{self.attribute} is of type {type(model).__name__}; give attribute=, the '
                'name of the attribute that is the model to prune')
        return model

    def _make_learner(self, model: nn.Module, steps: int) -> None:
        self.learner = self.method(model, **{**self.options, 'steps': steps})

    def _count_steps(self, trainer: pl.Trainer) -> int:
        """Optimizer steps of the sparse epochs."""
        with one_line('the batches of an epoch can\'t be counted before training begins; give steps='):
            trainer.fit_loop.setup_data()
            batches = trainer.num_training_batches
        if not isfinite(batches):
            raise PruningError('the training data has no length; give steps=, the number of steps to learn for')
        return self.sparse_epochs * ceil(batches / trainer.accumulate_grad_batches)

    def _prepare(self, pl_module: pl.LightningModule, saved: Optional[Mapping[str, Any]]) -> None:
        """Bring the model to where a checkpoint was saved, but for its weights: masked, or cut."""
        if not saved:
            return
        if self._slim is not None and saved.get('plan') != self._plan.to_json():
            raise PruningError(
                'this checkpoint was saved before the model was cut; give one that was saved after it, or a new '
                'LightningModule')
        model = self._model(pl_module)
        if 'learner' in saved:
            if self.learner is None:
                self._make_learner(model, saved['steps'])
            self.learner.load_state_dict(saved['learner'])
        elif self._slim is None:
            self._plan = Plan.from_json(saved['plan'])
            self._remove_learner()
            self._replace(pl_module, _cut_to(self._plan, model))

    def _cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the smaller model."""
        model, slim, self._plan = self.learner.model, self.learner.export(), self.learner.plan()
        parameters = set(model.parameters())
        for optimizer in trainer.optimizers:
            if any(p in parameters for group in optimizer.param_groups for p in group['params']):
                cut_optimizer(optimizer, model, slim)
        self._remove_learner()
        self._replace(pl_module, slim)
        if trainer.strategy.model is not pl_module:  # DDP knows the parameters of the model before the cut
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()

    def _remove_learner(self) -> None:
        if self.learner:
            self.learner.remove()
        self.learner = None

    def _replace(self, pl_module: pl.LightningModule, slim: nn.Module) -> None:
        setattr(pl_module, self.attribute, slim)
        self._slim = slim


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raise ``PruningError`` where the model can't be replaced: it is sharded, or trained in copies of this process."""
    strategy = trainer.strategy
    spawns = getattr(strategy, '_start_method', 'popen') != 'popen'
    if trainer.world_size > 1 and (spawns or not hasattr(strategy, 'configure_ddp')):
        raise PruningError(
            f'strategy {type(strategy).__name__}{" in spawned processes" * spawns} can\'t go on with a smaller model; '
            'train with strategy=\'ddp\'')


def _cut_to(plan: Plan, model: nn.Module) -> nn.Module:
    earlier = getattr(model, 'pruning_plan', None)
    slim = cut_copy(model, plan)
    slim.pruning_plan = earlier.compose(plan) if earlier else plan
    return slim


def _target(batch: Any) -> Any:
    """The classes of a batch, where it is one of the usual kinds."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _TARGETS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
