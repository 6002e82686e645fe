"""Center Loss (Wen et al., A Discriminative Feature Learning Approach, ECCV 2016) on what enters the classifier."""
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from ..core import PruningError
from ..trace import meta_copy

__all__ = ['CenterLoss', 'FeatureHook', 'drop_hooks', 'find_classifier']


class CenterLoss:
    """``½ mean_i ‖φ(x_i) − c_{y_i}‖²``, with centres that follow their class by a rule of their own.

    ``Δc_j = Σ_i 1[y_i=j](c_j − φ_i) / (1 + Σ_i 1[y_i=j])``, ``c_j ← c_j − α Δc_j``. Our reading: the centres start at
    zero, and the loss is the mean over the batch, as the cross-entropy that it is added to.

    Args:
        classes: Number of classes.
        features: Length of φ.
        alpha: α.
    """

    def __init__(self, classes: int, features: int, alpha: float = 0.5):
        self.alpha = alpha
        self.centers = torch.zeros(classes, features)
        self._sums = torch.zeros(classes, features + 1)  # Σ(c − φ) and the count, since the last update

    def __call__(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar; the batch is remembered for the update.

        Args:
            features: φ, shape (batch, features).
            target: Class indices, shape (batch,), int64.

        Raises:
            PruningError: The targets aren't class indices of this batch.
        """
        self._check(features, target)
        features = features.float()
        self._to(features.device)
        away = self.centers[target] - features
        with torch.no_grad():
            ones = away.new_ones(len(away), 1)
            self._sums.index_add_(0, target, torch.cat([away, ones], 1))
        return 0.5 * away.square().sum() / len(away)

    def update(self) -> None:
        """Move the centres by what was seen since the last update, on all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        delta = self._sums[:, :-1] / (1 + self._sums[:, -1:])
        if bool(delta.isfinite().all()):  # an overflow under fp16 is no reason to lose the centres
            self.centers = self.centers - self.alpha * delta
        self._sums.zero_()

    def _check(self, features: torch.Tensor, target: Any) -> None:
        indices = isinstance(target, torch.Tensor) and target.ndim == 1 and target.dtype == torch.int64
        if not indices:
            found = f'{target.dtype} of shape {tuple(target.shape)}' if isinstance(target, torch.Tensor) \
                else type(target).__name__
            raise PruningError(
                f'center loss needs class indices, found {found}; give the hard labels to penalty(), or switch it off '
                f'by center=0')
        if len(target) != len(features):
            raise PruningError(
                f'penalty() got {len(target)} targets, the last forward had {len(features)} images; call it once after '
                f'each forward')
        if target.device.type == 'cpu' and len(target) and not 0 <= target.min() <= target.max() < len(self.centers):
            raise PruningError(
                f'the targets go from {target.min()} to {target.max()}, the model has {len(self.centers)} classes; '
                f'create it with num_classes={target.max() + 1}')

    def _to(self, device: torch.device) -> None:
        if self.centers.device != device:
            self.centers, self._sums = self.centers.to(device), self._sums.to(device)

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """The centres, and what the next update has gathered so far."""
        return {'centers': self.centers.clone(), 'sums': self._sums.clone()}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.centers, self._sums = state['centers'].clone(), state['sums'].clone()


class FeatureHook:
    """Keeps what entered a module in the last training forward. Dead in copies of the model."""

    def __init__(self, module: nn.Module):
        self.value: Optional[torch.Tensor] = None
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: Tuple[torch.Tensor, ...]) -> None:
        if module.training:
            self.value = args[0]

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'FeatureHook':
        return _Dead()

    def take(self) -> torch.Tensor:
        """The feature, shape (batch, features), once.

        Raises:
            PruningError: There was no forward in training mode since the last call.
        """
        value, self.value = self.value, None
        if value is None:
            raise PruningError('penalty() was called before any forward in training mode; call model(images) first')
        return value.flatten(1)

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()


class _Dead:
    """What becomes of a hook in a copy of the model."""

    def __call__(self, module: nn.Module, args: Tuple) -> None:
        return None


def drop_hooks(model: nn.Module) -> None:
    """Take dead hooks off a copy."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Dead)]:
            del module._forward_pre_hooks[key]


def find_classifier(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[str, int, int]:
    """Name of the layer that makes the logits, length of what enters it, number of classes.

    timm's ``get_classifier``, or the last linear layer that a forward runs.

    Raises:
        PruningError: There is none.
    """
    copy = meta_copy(model).eval()
    names = {id(module): name for name, module in copy.named_modules()}
    ran: List[Tuple[str, torch.Size, torch.Size]] = []

    def see(module, inputs, out):
        ran.append((names[id(module)], inputs[0].shape, out.shape))

    for module in _candidates(copy):
        module.register_forward_hook(see)
    with torch.no_grad():
        copy(*args, **kwargs)
    if not ran:
        raise PruningError(
            f'center loss needs a classifier, {type(model).__name__} has none that its forward runs; create it with '
            f'num_classes=, or switch center loss off by center=0')
    name, entered, left = ran[-1]
    return name, int(entered[1:].numel()), int(left[1])


def _candidates(model: nn.Module) -> List[nn.Module]:
    """timm's classifier, or every linear layer."""
    if not hasattr(model, 'get_classifier'):
        return [module for module in model.modules() if isinstance(module, nn.Linear)]
    found = model.get_classifier()
    found = found[0] if isinstance(found, (tuple, list, nn.ModuleList)) and len(found) else found
    return [found] if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else []
