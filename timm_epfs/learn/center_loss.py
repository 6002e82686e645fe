"""Center Loss on the classifier's input (Wen et al., A Discriminative Feature Learning Approach, ECCV 2016)."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from ..core import PruningError
from ..trace import isolated, meta_copy, quiet

__all__ = ['CenterLoss', 'FeatureHook', 'drop_hooks', 'find_classifier']


class CenterLoss:
    """``½ mean_i ‖φ(x_i) − c_{y_i}‖²``: pulls the features φ of each class towards the centre c of that class.

    The centres have an update rule of their own (Wen et al., equations 3 and 4):
    ``Δc_j = Σ_i 1[y_i=j](c_j − φ_i) / (1 + Σ_i 1[y_i=j])``, then ``c_j ← c_j − α Δc_j``. The paper leaves two things
    open. Here the centres start at zero, and the loss is the mean over the batch, like the cross-entropy that it is
    added to.

    >>> loss = CenterLoss(classes=2, features=1)
    >>> loss(torch.tensor([[4.0], [2.0]]), torch.tensor([0, 1]))
    tensor(5.)
    >>> loss.update()
    >>> loss.centers
    tensor([[1.0000],
            [0.5000]])

    Args:
        classes: Number of classes.
        features: Length of a feature φ.
        alpha: α, the step size of the centres.
    """

    def __init__(self, classes: int, features: int, alpha: float = 0.5):
        self.alpha = alpha
        self.centers = torch.zeros(classes, features)
        self._sums = torch.zeros(classes, features + 1)  # by class, since the last update: Σ(c − φ), number of images

    def __call__(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar, float32. The next ``update`` takes the batch into account.

        Args:
            features: φ, shape (batch, features).
            target: Class indices, shape (batch,), int64.

        Raises:
            PruningError: The targets aren't class indices, or they don't belong to this batch.
        """
        self._check(features, target)
        features = features.float()
        self._to(features.device)
        difference = self.centers[target] - features
        with torch.no_grad():
            ones = difference.new_ones(len(difference), 1)
            self._sums.index_add_(0, target, torch.cat([difference, ones], 1))
        return 0.5 * difference.square().sum() / len(difference)

    def update(self) -> None:
        """Move the centres by all batches since the last update, on all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        differences, counts = self._sums[:, :-1], self._sums[:, -1:]
        delta = differences / (1 + counts)
        if bool(delta.isfinite().all()):  # a batch that overflows in float16 must not spoil the centres
            self.centers = self.centers - self.alpha * delta
        self._sums.zero_()

    def _check(self, features: torch.Tensor, target: Any) -> None:
        if not (isinstance(target, torch.Tensor) and target.ndim == 1 and target.dtype == torch.int64):
            found = type(target).__name__
            if isinstance(target, torch.Tensor):
                found = f'{target.dtype} of shape {tuple(target.shape)}'
            raise PruningError(
                f'center loss needs class indices, found {found}; give the hard labels to penalty(), or switch center '
                f'loss off with center=0')
        if len(target) != len(features):
            raise PruningError(
                f'penalty() got {len(target)} targets, but the last forward had {len(features)} images; call penalty() '
                f'once after each forward')
        # On other devices, reading the range would wait for the device in every step.
        if target.device.type == 'cpu' and len(target) and not 0 <= target.min() <= target.max() < len(self.centers):
            raise PruningError(
                f'the targets range from {target.min()} to {target.max()}, but the model has {len(self.centers)} '
                f'classes; create it with num_classes={target.max() + 1}')

    def _to(self, device: torch.device) -> None:
        if self.centers.device != device:
            self.centers, self._sums = self.centers.to(device), self._sums.to(device)

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """The centres, and the sums for the next update."""
        return {'centers': self.centers.clone(), 'sums': self._sums.clone()}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        """Resume where ``state_dict`` was called."""
        self.centers, self._sums = state['centers'].clone(), state['sums'].clone()


class FeatureHook:
    """Keeps the input of a module from the last forward in training mode. In copies of the model it does nothing."""

    def __init__(self, module: nn.Module):
        self.value: Optional[torch.Tensor] = None
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if module.training:
            self.value = args[0]

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'FeatureHook':
        return _NoHook()

    def take(self) -> torch.Tensor:
        """The input, flattened to shape (batch, features). Each input can be taken once.

        Raises:
            PruningError: There was no forward in training mode since the last call.
        """
        value, self.value = self.value, None
        if value is None:
            raise PruningError('penalty() was called before any forward in training mode; call model(images) first')
        return value.flatten(1)

    def remove(self) -> None:
        """Remove the hook from the module."""
        self._handle.remove()


class _NoHook:
    """Takes the place of a ``FeatureHook`` in a copy of the model."""

    def __call__(self, module: nn.Module, args: Tuple) -> None:
        return None


def drop_hooks(model: nn.Module) -> None:
    """Remove what is left of ``FeatureHook`` from a copy of a model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _NoHook)]:
            del module._forward_pre_hooks[key]


def find_classifier(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[str, int, int]:
    """Find the layer that computes the logits: timm's ``get_classifier``, or the last linear layer that a forward runs.

    Args:
        model: The model.
        args: Positional arguments of its forward, on the meta device.
        kwargs: Keyword arguments of its forward.

    Returns:
        Name of the layer, length of its input, number of classes.

    Raises:
        PruningError: There is no such layer.
    """
    copy = meta_copy(model).eval()
    names = {id(module): name for name, module in copy.named_modules()}
    ran: List[Tuple[str, torch.Size, torch.Size]] = []

    def note_shapes(module, inputs, out):
        ran.append((names[id(module)], inputs[0].shape, out.shape))

    for module in _candidates(copy):
        module.register_forward_hook(note_shapes)
    with isolated(model, args, kwargs), quiet():
        copy(*args, **kwargs)
    if not ran:
        raise PruningError(
            f'center loss needs a classifier, but the forward of this {type(model).__name__} runs none; create the '
            f'model with num_classes=, or switch center loss off with center=0')
    name, input_shape, output_shape = ran[-1]
    return name, int(input_shape[1:].numel()), int(output_shape[1])


def _candidates(model: nn.Module) -> List[nn.Module]:
    """timm's classifier; of a model that isn't timm's, every linear layer."""
    if not hasattr(model, 'get_classifier'):
        return [module for module in model.modules() if isinstance(module, nn.Linear)]
    classifier = model.get_classifier()
    if isinstance(classifier, (tuple, list, nn.ModuleList)) and len(classifier):  # distilled models have two heads
        classifier = classifier[0]
    has_parameters = isinstance(classifier, nn.Module) and any(True for _ in classifier.parameters())
    return [classifier] if has_parameters else []
