"""``heal``: a short distillation of a cut model from its dense model, on a few hundred images without labels."""
from dataclasses import replace
from typing import Any, Callable, List, Optional

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..activations import divergence, fast_format, has_classes, image_batches, output_tensors
from ..core import PruningError, device_of, eval_mode, one_line, progress, summed, warn, world_size
from .compensation import kept_entries, plan_of
from .tensors import unchanged_on_error

__all__ = ['check_steps', 'heal']

BATCH = 32  # images of a step
LEARNING_RATE, TEMPERATURE = 1e-3, 2.0
HELD_OUT, VIEWS = 8, 2  # every eighth image, and crops of each


def heal(
        model: nn.Module,
        dense: nn.Module,
        images: Any,
        steps: int = 200,
        num_images: Optional[int] = None,
        seed: int = 0,
) -> nn.Module:
    """Train a cut model's norms and biases for a few hundred steps, in place, to give the outputs of its dense model.

    Each step takes 32 images, crops and flips them at random, and lowers the divergence of the outputs from those of
    the dense model on the same crops (knowledge distillation, no labels). Only biases and the weights of norms are
    trained, if they aren't frozen: they are few, so a few hundred images suffice. BatchNorm's statistics stay as they
    are. An eighth of the images is held out: if the outputs for crops of these don't come nearer to the dense model's,
    the model stays as it was.

    Call it after ``compensate``, which does most of the work in less time.

    Under ``torch.distributed``, each process gives its own images, and all get the same weights.

    >>> import timm, timm_epfs
    >>> dense, images = timm.create_model('resnet20_cifar'), torch.randn(16, 3, 32, 32)
    >>> slim = timm_epfs.prune(dense, macs=0.7, criterion='l2')
    >>> slim = timm_epfs.heal(slim, dense, images, steps=10)

    Args:
        model: A cut model with its ``pruning_plan``, in single or double precision, on any device.
        dense: The dense model, with the weights that the cut model had before.
        images: As in ``compensate``, all of one size. Of fewer than eight, none are held out.
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
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015. New crops of the same images, the same for
        both models: Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR 2022.
    """
    plan = plan_of(model)
    kept_entries(model, dense, plan)
    check_steps(steps, 'steps')
    vectors = [p for p in model.parameters() if p.ndim < 2 and p.is_floating_point() and p.requires_grad]
    if not vectors:
        raise PruningError('heal trains norms and biases, and the model has none that may be trained; unfreeze them')
    low = next((p.dtype for p in vectors if p.dtype.itemsize < 4), None)
    if low is not None:
        raise PruningError(f'heal trains in single precision, the model has {low}; convert it after healing')
    device = device_of(model)
    with torch.inference_mode(False), torch.random.fork_rng([device] if device.type == 'cuda' else []), \
            unchanged_on_error(model), eval_mode(model), eval_mode(dense), one_line('the model can\'t be healed'):
        torch.manual_seed(seed)
        pool = [image for batch in image_batches(images, model, num_images) for image in batch]
        sizes = sorted({tuple(image.shape) for image in pool})
        if len(sizes) > 1:
            raise PruningError(f'heal needs images of one size, found {sizes[0]} and {sizes[1]}; resize them')
        better = _Healing(model, dense, pool, vectors).run(steps)
    if not better:
        warn(
            'heal: outputs for images that were held out didn\'t come nearer to the dense model\'s, so the model stays '
            'as it was; give more images')
        return model
    model.pruning_plan = replace(plan, recipe={**plan.recipe, 'healed': {'steps': steps, 'images': len(pool)}})
    return model


def check_steps(steps: Any, name: str) -> None:
    """Raise ``PruningError`` if this can't be a number of steps."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise PruningError(f'{name}={steps!r} was given; give a whole number of at least 1')


class _Healing:
    """Steps of distillation.

    Args:
        model: The cut model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        pool: Images of one size.
        vectors: The parameters to train.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, pool: List[Tensor], vectors: List[nn.Parameter]):
        self._model, self._dense, self._vectors = model, dense, vectors
        self._has_classes = has_classes(model)
        self._format = fast_format(pool[0][None], model, dense)
        self._transform = _crops(pool[0])
        self._pool = [image for i, image in enumerate(pool) if i % HELD_OUT != HELD_OUT - 1]
        # Compensation may have seen the images that are held out, but not these crops of them.
        held_out = pool[HELD_OUT - 1::HELD_OUT] or pool
        self._held_out = [self._transform(image) for image in held_out for _ in range(VIEWS)]

    def run(self, steps: int) -> bool:
        """Train. Returns whether it helped; if it didn't, the parameters are as before."""
        optimizer = torch.optim.AdamW(self._vectors, LEARNING_RATE, weight_decay=0)
        schedule = CosineAnnealingLR(optimizer, steps)
        before = [p.detach().clone() for p in self._vectors]
        users = [p.grad for p in self._vectors]
        error = self._error()
        try:
            for _ in progress(range(steps), 'healing'):
                self._set_gradients()
                optimizer.step()
                schedule.step()
        finally:
            for parameter, gradient in zip(self._vectors, users):
                parameter.grad = gradient
        better = self._error() < error
        if not better:
            torch._foreach_copy_([p.detach() for p in self._vectors], before)
        return better

    def _set_gradients(self) -> None:
        """Give the parameters that are trained the gradients of a batch, and no other ones."""
        chosen = torch.randint(len(self._pool), (BATCH,)).tolist()
        loss = self._divergence([self._transform(self._pool[i]) for i in chosen])
        gradients = torch.autograd.grad(loss, self._vectors, allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(self._vectors, gradients):
            parameter.grad = summed(gradient.contiguous()) / world_size()

    def _error(self) -> float:
        """Divergence of the outputs for the images that were held out."""
        total, count = 0.0, len(self._held_out)
        with torch.no_grad():
            for first in range(0, count, BATCH):
                images = self._held_out[first:first + BATCH]
                total += len(images) * float(self._divergence(images))
        sums = summed(torch.tensor([total, count], dtype=torch.float64, device=self._held_out[0].device))
        error = float(sums[0] / sums[1])
        if error != error or error == float('inf'):
            raise PruningError('the outputs of the cut or of the dense model aren\'t finite; look for NaN in them')
        return error

    def _divergence(self, images: List[Tensor]) -> Tensor:
        batch = torch.stack(images).contiguous(memory_format=self._format)
        with torch.no_grad():
            targets = output_tensors(self._dense(batch))
        return divergence(output_tensors(self._model(batch)), targets, self._has_classes, TEMPERATURE)


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
