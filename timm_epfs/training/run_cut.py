"""The cut of a run: by a method that learns while the model is trained, or in one shot by a criterion."""
import argparse
import inspect
from functools import cached_property
from itertools import islice
from typing import Any, Callable, Dict, Iterable

from torch import nn

from ..core import Budget, PruningError, Repeatable, one_line, step
from ..importance import CRITERIA
from ..learn import METHODS, Learner
from ..pruner import Pruner
from .options import budget, cut_options

__all__ = ['RunCut']

_SOME_BATCHES = 32  # for criteria, widths and compensation


class RunCut:
    """The cut of a run, as ``--method`` says.

    Args:
        args: The options of ``timm-epfs train``.
        model: The dense model on its device.
        train_batches: Returns the training batches. It is called when they are needed.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, train_batches: Callable[[], Iterable]):
        self.args, self.model = args, model
        self._some_batches = Repeatable(lambda: islice(train_batches(), _SOME_BATCHES))

    @cached_property
    def pruner(self) -> Pruner:
        """The dense model with its trace, which is made once and serves the whole run."""
        return self._pruner(self.model)

    def _pruner(self, model: nn.Module) -> Pruner:
        method = METHODS.get(self.args.method)
        options, _ = cut_options(self.args)
        if method is not None:
            options.setdefault('kinds', method.default_kinds)
        with one_line(f'--method {self.args.method} can\'t be set up'):
            return Pruner(model, data=self._some_batches, **options)

    def check(self) -> None:
        """Raise ``PruningError`` before any training, if the model can't be cut as the options say."""
        if self.args.method == 'none':
            self._check_one_shot()
            return
        learner = self._learner(steps=1, steps_per_epoch=1, measure=False)
        try:
            self.pruner.composed(learner.plan())
        finally:
            learner.remove()

    def learner(self, steps: int, steps_per_epoch: int) -> Learner:
        """Put the masks of the method on the model.

        Args:
            steps: Optimizer steps of the sparse phase.
            steps_per_epoch: Optimizer steps of one epoch.

        Raises:
            PruningError: The method can't cut this model to this budget.
        """
        return self._learner(steps, steps_per_epoch, measure=True)

    def _learner(self, steps: int, steps_per_epoch: int, measure: bool) -> Learner:
        """A learner, without widths from images unless ``measure``: a check comes before any training, and is quick."""
        method = METHODS[self.args.method]
        _, options = cut_options(self.args)
        if options.get('widths') == 'sensitivity' and not measure:
            del options['widths']
        if 'steps_per_epoch' in inspect.signature(method).parameters:
            options.setdefault('steps_per_epoch', steps_per_epoch)
        pruner = self.pruner
        with step(f'setting up {self.args.method}'), one_line(f'--method {self.args.method} can\'t be set up'):
            return method(pruner, budget(self.args), steps, **options)

    def one_shot(self) -> nn.Module:
        """A copy of the model, cut by a criterion: to the budget, or to that of the first of ``--cut-steps``.

        Raises:
            PruningError: The model can't be cut to the budget.
        """
        wanted = budget(self.args)
        if (self.args.cut_steps or 1) > 1:
            wanted = self._budget_of_step(1, self.pruner.cost(wanted.quantity))
        return self._cut(self.pruner, wanted)

    def one_shot_further(self, model: nn.Module, number: int) -> nn.Module:
        """A copy of what earlier cuts left, cut to the budget of the next of ``--cut-steps``.

        Args:
            model: The pruned model as it is now.
            number: Number of this cut, from 2 on.

        Raises:
            PruningError: The model can't be cut to the budget.
        """
        dense_cost, _ = model.pruning_plan.cost[budget(self.args).quantity]
        return self._cut(self._pruner(model), self._budget_of_step(number, dense_cost))

    def _cut(self, pruner: Pruner, wanted: Budget) -> nn.Module:
        with one_line('--method none can\'t cut'):
            return pruner(wanted, compensate=self.args.compensate, **self._one_shot_options())

    def _budget_of_step(self, number: int, dense_cost: float) -> Budget:
        """What one of ``--cut-steps`` may leave, as a count. What is removed of the cost grows on a cubic schedule.

        Zhu and Gupta, To prune, or not to prune, 2017, equation 1: most goes early, while there is much to spare.
        """
        final = budget(self.args)
        share = final.share(dense_cost)
        left = share + (1 - share) * (1 - number / self.args.cut_steps) ** 3
        return Budget(**{final.quantity: left * dense_cost})

    def _one_shot_options(self) -> Dict[str, Any]:
        _, options = cut_options(self.args)
        return {'criterion': self.args.criterion or 'l2', 'seed': self.args.seed, **options}

    def _check_one_shot(self) -> None:
        if self.args.distributed:
            self._check_processes_agree()
        with one_line('--method none can\'t cut'):
            self.pruner.check(budget(self.args), **self._one_shot_options())

    def _check_processes_agree(self) -> None:
        """Raise ``PruningError`` if each process of a distributed run would find its own one-shot cut."""
        criterion = CRITERIA.get(self.args.criterion)
        _, options = cut_options(self.args)
        if criterion is not None and criterion.needs:
            cause = f'--criterion {self.args.criterion} scores units on data'
        elif options.get('widths') == 'sensitivity':
            cause = '--widths sensitivity measures on data'
        elif self.args.latency is not None:
            cause = '--latency with --method none measures time'
        elif options.get('round_to') == 'auto':
            cause = '--round-to auto with --method none measures time'
        else:
            return
        raise PruningError(f'{cause}, and each process would get its own result; run it in one process')
