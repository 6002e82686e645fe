"""timm's tasks with a learner: the penalty in the loss, the learner's state in checkpoints."""
from typing import Any, Dict, Optional

import torch
from timm.task import ClassificationTask
from torch import nn

from ..learn import Learner

__all__ = ['PruningTask', 'PruningTaskMixin']


class PruningTaskMixin:
    """Adds a learner to a class of ``timm.task``.

    ::

        class PruningDistillation(PruningTaskMixin, timm.task.LogitDistillationTask):
            pass

    The checkpoints that timm writes of the task hold the learner's state, too. Resume with a task that was made in the
    same way: its model has the learner's masks on it by then.

    Args:
        *args: The task's own arguments.
        learner: A learner of the task's model.
        **kwargs: The task's own arguments.
    """

    def __init__(self, *args: Any, learner: Learner, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.learner = learner

    def step(self) -> None:
        """Move the masks. Call it once for each step of the optimizer, as ``Learner.step``."""
        self.learner.step()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The task's losses and output. ``'loss'`` includes the learner's penalty, which is ``'penalty'``."""
        result = super().forward(input, target)
        penalty = self.learner.penalty(target)
        return {**result, 'loss': result['loss'] + penalty, 'penalty': penalty}

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        """The task's state, and the learner's. Averaged weights share the learner's masks and add none."""
        state = super().get_task_state(module, ema)
        return state if ema else {**state, 'learner': self.learner.state_dict()}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        """Resume where ``get_task_state`` was called."""
        rest = dict(state or {})
        if 'learner' in rest:
            self.learner.load_state_dict(rest.pop('learner'))
        super().load_task_state(rest, strict, module, ema)


class PruningTask(PruningTaskMixin, ClassificationTask):
    """timm's ``ClassificationTask`` with a learner.

    ::

        learner = timm_epfs.EPFS(model, macs=0.5, steps=5000)
        task = PruningTask(model, criterion_kwargs={'smoothing': 0.1}, learner=learner)
        for images, target in loader:
            task(images, target)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.step()
        slim = learner.export()
    """
