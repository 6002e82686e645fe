"""Center Loss on the classifier's input (Wen et al., A Discriminative Feature Learning Approach, ECCV 2016)."""
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import nn

from ..core import PruningError, kind_of, one_line, returned_tensors
from ..trace import Forward, isolated, quiet, tensors_in

__all__ = ['CenterLoss', 'FeatureHook', 'drop_hooks', 'find_classifier', 'names_no_class']

# Autograd's names of what makes scores of the same classes out of scores: views, scales, casts and softmaxes.
_KEEPS_CLASSES = frozenset({
    'Alias', 'Clone', 'Div', 'LogSigmoid', 'LogSoftmax', 'Mul', 'ReshapeAlias', 'Sigmoid', 'Softmax', 'Squeeze',
    'ToCopy', 'UnsafeView', 'Unsqueeze', 'View',
})


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
        self._range_checked = False

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
            raise PruningError(
                f'Center Loss needs class indices, found {kind_of(target)}; give the hard labels to penalty(), or '
                f'switch Center Loss off with center=0')
        if len(target) != len(features):
            raise PruningError(
                f'penalty() got {len(target)} targets, but the last forward had {len(features)} images; call penalty() '
                f'once after each forward')
        # On other devices, reading the range would wait for the device in every step.
        check_range = len(target) and (target.device.type == 'cpu' or not self._range_checked)
        if check_range and not 0 <= target.min() <= target.max() < len(self.centers):
            raise PruningError(
                f'the targets range from {target.min()} to {target.max()}, but the model has {len(self.centers)} '
                f'classes; create it with num_classes={target.max() + 1}, or switch Center Loss off with center=0')
        self._range_checked = True

    def _to(self, device: torch.device) -> None:
        if self.centers.device != device:
            self.centers, self._sums = self.centers.to(device), self._sums.to(device)

    def state_dict(self) -> Dict[str, torch.Tensor]:
        """The centres, and the sums for the next update."""
        return {'centers': self.centers.clone(), 'sums': self._sums.clone()}

    def load_state_dict(self, state: Dict[str, torch.Tensor]) -> None:
        """Resume where ``state_dict`` was called."""
        self.centers, self._sums = state['centers'].clone(), state['sums'].clone()


def names_no_class(target: Any) -> bool:
    """Whether a target has no classes in it: there is none, or it has real numbers, and they aren't soft labels.

    >>> names_no_class(torch.tensor([[0.5, 12.0]])), names_no_class(torch.tensor([[0.1, 0.9]]))
    (True, False)

    Args:
        target: Anything.
    """
    if not isinstance(target, torch.Tensor) or not target.is_floating_point():
        return target is None
    is_soft = target.ndim == 2 and bool((target >= 0).all()) and bool((target.sum(1) - 1).abs().max() < 0.01)
    return not is_soft


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


@torch.inference_mode(False)  # autograd says what an output was computed from
def find_classifier(model: nn.Module, args: Tuple, kwargs: Dict[str, Any]) -> Tuple[str, int, int]:
    """Find the layer that computes the logits, by a forward in evaluation mode.

    It is the linear layer, or the convolution at a single position, whose output of shape (batch, classes) the model
    returns: alone or in a tuple, a list or a dict; as it is, scaled or through a softmax. Of a timm model, it is what
    ``get_classifier`` returns. A layer further inside, such as that of a time embedding, is none, and neither is one
    that scores pixels, tokens or boxes.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.fc, self.gate = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(8, 6)
    ...     def forward(self, x):
    ...         return {'scores': self.fc(self.body(x) * self.gate(x)).log_softmax(1)}
    >>> find_classifier(Net(), (torch.empty(1, 8, device='meta'),), {})
    ('fc', 6, 3)

    Args:
        model: The model.
        args: Positional arguments of its forward, on the meta device.
        kwargs: Keyword arguments of its forward.

    Returns:
        Name of the layer, length of its input, number of classes.

    Raises:
        PruningError: There is no such layer; there are several, and none of them reads what the others compute; or the
            forward fails.
    """
    try:
        copy, runs, output = isolated(model, partial(_run, Forward.without_data(model, args, kwargs)))
    except Exception:
        with one_line('no classifier is known, as the forward fails (center=0 switches Center Loss off)'):
            copy, runs, output = isolated(model, partial(_run, Forward.on_numbers(model, args, kwargs)))
    scores = _scores(output, tensors_in((args, kwargs)))
    if hasattr(copy, 'get_classifier'):
        found = [run for run in runs if any(run.scores_as(tensor) for tensor in scores)]
    else:
        found = _last([run for tensor in scores for run in _behind(tensor, runs)])
    names = list(dict.fromkeys(run.name for run in found))
    if len(names) == 1:
        return names[0], found[0].features, found[0].classes
    what = f'{" and ".join(names)} compute outputs of shape (batch, classes), and Center Loss needs one layer that does'
    if not names:
        what = f'no linear layer of this {type(model).__name__} computes an output of shape (batch, classes)'
    raise PruningError(f'{what}; center=0 switches Center Loss off')


def _run(forward: Forward) -> Tuple[nn.Module, List['_Run'], Any]:
    """Run a forward. Returns the copy that ran, the runs of layers that may be the classifier, and the output."""
    copy, runs = forward.copy(), []
    args, kwargs = forward.inputs()
    for name, layer in _candidates(copy).items():
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        layer.register_forward_hook(lambda layer, inputs, out, name=name: _note(runs, name, layer, inputs, out))
    with quiet(), torch.enable_grad():
        return copy, runs, copy(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Run:
    """A run of a layer.

    Attributes:
        name: Name of the layer.
        features: Length of its input.
        classes: Number of its output features or channels.
        length: Number of entries of its output.
        node: Autograd's node of its output.
    """
    name: str
    features: int
    classes: int
    length: int
    node: Any

    def scores_as(self, tensor: torch.Tensor) -> bool:
        """Whether its output has one score for each entry of a tensor of shape (batch, classes)."""
        return (self.length, self.classes) == (tensor.numel(), tensor.shape[1])


def _note(runs: List[_Run], name: str, layer: nn.Module, inputs: Tuple, out: Any) -> None:
    """Add the run, if it took a tensor and gave one."""
    if inputs and all(isinstance(value, torch.Tensor) and value.ndim > 1 for value in (inputs[0], out)):
        classes = out.shape[1 if isinstance(layer, nn.modules.conv._ConvNd) else -1]
        runs.append(_Run(name, inputs[0].shape[1:].numel(), classes, out.numel(), out.grad_fn))


def _candidates(model: nn.Module) -> Dict[str, nn.Module]:
    """timm's classifier by name; of a model that isn't timm's, every linear layer and convolution."""
    if not hasattr(model, 'get_classifier'):
        return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    classifier = model.get_classifier()
    if isinstance(classifier, (tuple, list, nn.ModuleList)) and len(classifier):  # distilled models have two heads
        classifier = classifier[0]
    has_parameters = isinstance(classifier, nn.Module) and any(True for _ in classifier.parameters())
    return {name: m for name, m in model.named_modules() if m is classifier} if has_parameters else {}


def _scores(output: Any, inputs: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """The tensors that a model returned of shape (batch, two or more)."""
    batches = {1, *(len(tensor) for tensor in inputs if tensor.ndim)}  # not the number of boxes or tokens
    return [t for t in returned_tensors(output) if t.ndim == 2 and len(t) in batches and t.shape[1] > 1]


def _behind(scores: torch.Tensor, runs: Sequence[_Run]) -> List[_Run]:
    """The runs of layers whose outputs these scores are."""
    by_node = {run.node: run for run in runs if run.scores_as(scores)}
    nodes, found = [scores.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node in by_node:
            found.append(by_node[node])
        elif node is not None and node.name().partition('Backward')[0] in _KEEPS_CLASSES:
            nodes += [earlier for earlier, _ in node.next_functions]
    return found


def _last(runs: Sequence[_Run]) -> List[_Run]:
    """The runs whose outputs no other one reads."""
    read: Set[Any] = set()
    for run in runs:
        nodes = [earlier for earlier, _ in run.node.next_functions]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in read:
                read.add(node)
                nodes += [earlier for earlier, _ in node.next_functions]
    return [run for run in runs if run.node not in read]
