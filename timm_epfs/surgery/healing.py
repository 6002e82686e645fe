"""``heal``: a short distillation of a cut model from its dense model, on a few hundred images without labels."""
from dataclasses import replace
from typing import Any, Callable, List, Optional

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from ..activations import divergence, fast_format, image_batches, output_tensors
from ..core import PruningError, eval_mode, one_line, progress, summed, warn, world_size
from .compensation import kept_entries, plan_of
from .tensors import unchanged_on_error

__all__ = ['heal']

BATCH = 32  # images of a step
VECTOR_RATE, RATE = 1e-3, 3e-4  # learning rates of biases and the weights of norms, and of all other weights
TEMPERATURE = 2.0
HELD_OUT = 8  # every eighth image


def heal(
        model: nn.Module,
        dense: nn.Module,
        images: Any,
        steps: int = 200,
        num_images: Optional[int] = None,
        seed: int = 0,
) -> nn.Module:
    """Train a cut model for a few hundred steps, in place, to give the outputs of its dense model.

    Each step takes 32 images, crops and flips them at random, and lowers the divergence of the outputs from those of
    the dense model on the same crops (knowledge distillation, no labels). In the first half of the steps, only biases
    and the weights of norms are trained: they are few, so a few hundred images suffice. Then all parameters are.
    BatchNorm's statistics stay as they are. An eighth of the images is held out: each half counts only if it brings
    the outputs for these nearer to the dense model's.

    Call it after ``compensate``, which does most of the work in less time.

    Under ``torch.distributed``, each process gives its own images, and all get the same weights.

    >>> import timm, timm_epfs
    >>> dense, images = timm.create_model('resnet20_cifar'), torch.randn(16, 3, 32, 32)
    >>> slim = timm_epfs.prune(dense, macs=0.7, criterion='l2', data=images)
    >>> slim = timm_epfs.heal(slim, dense, images, steps=10)

    Args:
        model: A cut model with its ``pruning_plan``, in single or double precision, on any device.
        dense: The dense model, with the weights that the cut model had before.
        images: As in ``compensate``.
        steps: Number of steps.
        num_images: As in ``compensate``.
        seed: Seed of the choice of images and crops.

    Returns:
        The same model. The recipe of its plan says in how many steps and with how many images it was healed.

    Raises:
        PruningError: The model wasn't cut by timm_epfs, or from another dense model; it can't be trained; or the images
            can't be used. The model is as it was.

    Warns:
        UserWarning: The outputs didn't come nearer to the dense model's, so the model is as it was.

    Source:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. Cropping the same images over and over, the
        same crop for both models: Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR
        2022.
    """
    plan = plan_of(model)
    kept_entries(model, dense, plan)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise PruningError(f'heal in steps={steps!r} was asked for; give a whole number of at least 1')
    low = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    if low:
        raise PruningError(f'heal trains in single precision, the model has {low[0]}; convert it after healing')
    pool = [image for batch in image_batches(images, model, num_images) for image in batch]
    with torch.inference_mode(False), torch.random.fork_rng(), unchanged_on_error(model), \
            eval_mode(model), eval_mode(dense), one_line('the model can\'t be healed'):
        torch.manual_seed(seed)
        kept = _Healing(model, dense, pool).run(steps)
    if not kept:
        warn(
            'heal: outputs for images that were held out didn\'t come nearer to the dense model\'s, so the model stays '
            'as it was; give more images')
        return model
    model.pruning_plan = replace(plan, recipe={**plan.recipe, 'healed': {'steps': kept, 'images': len(pool)}})
    return model


class _Healing:
    """Steps of distillation.

    Args:
        model: The cut model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        pool: Images.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, pool: List[Tensor]):
        self._model, self._dense = model, dense
        self._held_out = pool[HELD_OUT - 1::HELD_OUT] or pool
        self._pool = [image for i, image in enumerate(pool) if i % HELD_OUT != HELD_OUT - 1]
        self._format = fast_format(pool[0][None], model, dense)
        self._transform = _crops(pool[0])

    def run(self, steps: int) -> int:
        """Train in two halves. Returns the number of steps of those that were kept."""
        parameters = [p for p in self._model.parameters() if p.is_floating_point()]
        vectors, others = ([p for p in parameters if (p.ndim < 2) == few] for few in (True, False))
        trainable = [p.requires_grad for p in parameters]
        first = steps // 2 if vectors else 0
        lowest, kept = self._error(), 0
        try:
            with progress(None, 'healing', steps) as self._bar:
                for slow, count in (([], first), (others, steps - first)):
                    before = [p.detach().clone() for p in parameters]
                    self._train(vectors, slow, count)
                    error = self._error()
                    if error < lowest:
                        lowest, kept = error, kept + count
                    else:
                        torch._foreach_copy_([p.detach() for p in parameters], before)
        finally:
            for parameter, was_trainable in zip(parameters, trainable):
                parameter.requires_grad_(was_trainable).grad = None
        return kept

    def _train(self, fast: List[nn.Parameter], slow: List[nn.Parameter], steps: int) -> None:
        parameters = [*fast, *slow]
        if not (parameters and steps):
            return
        self._model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [{'params': fast, 'lr': VECTOR_RATE}, {'params': slow, 'lr': RATE}], weight_decay=0)
        schedule = OneCycleLR(
            optimizer, [VECTOR_RATE, RATE], total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)
        for _ in range(steps):
            self._step(parameters)
            optimizer.step()
            schedule.step()
            self._bar.update()

    def _step(self, parameters: List[nn.Parameter]) -> None:
        """Give the parameters their gradients."""
        chosen = torch.randint(len(self._pool), (BATCH,)).tolist()
        loss = self._divergence(self._batch([self._transform(self._pool[i]) for i in chosen]), TEMPERATURE)
        if not loss.isfinite():
            raise PruningError('the outputs stopped being finite while the model was healed; heal in fewer steps')
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        for parameter in parameters:
            if parameter.grad is not None:
                summed(parameter.grad.div_(world_size()))

    def _error(self) -> float:
        """Divergence of the outputs for the images that were held out."""
        total, count = 0.0, len(self._held_out)
        with torch.no_grad():
            for first in range(0, count, BATCH):
                images = self._held_out[first:first + BATCH]
                total += len(images) * float(self._divergence(self._batch(images)))
        sums = summed(torch.tensor([total, count], dtype=torch.float64, device=self._held_out[0].device))
        return float(sums[0] / sums[1])

    def _divergence(self, images: Tensor, temperature: float = 1.0) -> Tensor:
        with torch.no_grad():
            targets = output_tensors(self._dense(images))
        return divergence(output_tensors(self._model(images)), targets, temperature)

    def _batch(self, images: List[Tensor]) -> Tensor:
        return torch.stack(images).contiguous(memory_format=self._format)


def _crops(image: Tensor) -> Callable[[Tensor], Tensor]:
    """Random shifts by up to an eighth of an image, and flips. Inputs that aren't images stay as they are."""
    if image.ndim != 3 or min(image.shape[1:]) < 8:
        return lambda image: image
    from torchvision.transforms import v2  # here, as importing it takes a while
    height, width = image.shape[1:]
    return v2.Compose([
        v2.RandomCrop((height, width), padding=(width // 8, height // 8), padding_mode='reflect'),
        v2.RandomHorizontalFlip(),
    ])
