"""Layer-wise reconstruction: weights with which a cut model's layers give the outputs of the dense model's layers.

Dense and cut model run side by side over all images, layer by layer (``Lockstep``); through layers that read large
maps, first over as many images as memory holds. At a linear layer or convolution, the weights are changed so that from
what the *cut* model passes on to it, it gives what the layer of the *dense* model gives, as nearly as a linear layer
can. So a layer also makes up for what the layers before it couldn't. With X̂ the layer's inputs in the cut model as
rows, Y the outputs of the dense layer, and W the weights that are there,

    W' = W + (X̂ᵀX̂ + ρI)⁻¹ X̂ᵀ (Y − X̂ W),

ridge regression towards W, with intercept where there is a bias or a BatchNorm behind it. Rows of an eighth of the
images are held out: ρ is chosen on them, and a layer that isn't better on them stays as it is.

BatchNorm's statistics are changed by what the cut changes on these images: mean + (cut − dense), variance
× cut / dense. Statistics estimated from a few hundred images alone would be noise; their difference isn't, as both
models see the same images (control variates).

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1, for the least
squares. Ridge towards the weights that are there, the held-out rows and the control variates are our reading.
"""
from bisect import bisect_right
from typing import Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import (
    Call,
    LinearCall,
    Lockstep,
    NormCall,
    Sums,
    Watch,
    list_readers,
    places_to_join,
    sample_positions,
    solve_ridge,
)
from ..core import progress, summed

__all__ = ['Reconstruction']

HELD_OUT = 8  # every eighth image
EXACT = 1e-9  # residuals with a smaller share of the outputs' energy are rounding errors: nothing before was cut


class Reconstruction:
    """Reconstructs the layers of a cut model, in place.

    Args:
        model: The cut model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        kept: Entries of the dense model's dims that the cut model has, by tensor and dim. None where it has all.
        batches: Batches of images.
        weights: Whether to change weights. Otherwise only BatchNorm statistics are changed.

    Attributes:
        scarce: Names of the weights with more inputs than rows.
    """

    def __init__(
            self,
            model: nn.Module,
            dense: nn.Module,
            kept: Mapping[Tuple[str, int], np.ndarray],
            batches: Sequence[Tensor],
            weights: bool = True,
    ):
        self._model, self._dense, self._kept = model, dense, kept
        self.scarce: List[str] = []
        readers, _ = list_readers(model, batches[0][:1])
        in_dense, _ = list_readers(dense, batches[0][:1])
        # BatchNorm right behind a layer that is reconstructed is corrected together with it.
        solved = {name: reader for name, reader in readers.items() if weights and _may_change(reader.call)}
        behind = {reader.norm for reader in solved.values()}
        self._norms = {name: readers[name].call for name in behind if name in readers}
        self._layers = {
            name: reader for name, reader in readers.items()
            if name in solved or reader.is_norm and name not in behind
        }
        self._numbers = {name: number for number, name in enumerate(self._layers)}
        held = [reader.held + (in_dense[name].held if name in in_dense else 0) for name, reader in self._layers.items()]
        self._joins_at = places_to_join(held, list(map(len, batches)))
        self._batches = batches[:len(self._joins_at)]
        self._first = np.cumsum([0, *map(len, self._batches)])
        self._joined = [bisect_right(self._joins_at, number) for number in range(len(self._layers))]
        self._images = summed(torch.tensor(self._first[self._joined], device=batches[0].device)).tolist()  # by layer
        self._lockstep = Lockstep(self._reconstruct)
        self._targets: Dict[int, Tuple[Tensor, Tensor]] = {}  # by batch: positions, and the dense layer's outputs there
        self._moments: Tuple[List[Tensor], List[Tensor]] = ([], [])  # of what BatchNorm reads, dense and cut
        self._sums = Sums(), Sums()  # of the rows to fit on and of those held out
        self._call: Call

    @property
    def images(self) -> int:
        """Number of images that are used."""
        return int(self._first[-1])

    def run(self) -> None:
        """Reconstruct all layers.

        Raises:
            PruningError: The forward takes different ways for different images or in the two models.
        """
        if self._layers:
            with progress(None, 'compensating', len(self._layers)) as self._bar:
                self._lockstep.run([self._run_batch] * (2 * len(self._batches)), joined=2 * self._joined[0])

    def _run_batch(self, number: int) -> None:
        """Run a batch: through the dense model for even numbers, through the cut one for odd numbers."""
        index, is_cut = divmod(number, 2)
        model, note = (self._model, self._note_cut) if is_cut else (self._dense, self._note_dense)
        batch = self._batches[index]

        def handle(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            if self._numbers.get(name, -1) >= self._joins_at[index]:
                note(index, name, call)
                self._lockstep.meet(number, name)
            return run()

        with torch.no_grad(), Watch(model, len(batch), handle):
            model(batch)

    def _note_dense(self, index: int, name: str, call: Call) -> None:
        if isinstance(call, NormCall):
            self._moments[0].append(_moments(call.input))
            return
        groups, features, _ = self._shape(name)
        at = sample_positions(name, call.positions, self._images_at(name), groups, features).to(call.input.device)
        self._targets[index] = at, call.outputs(call.rows(at))[..., self._kept_outputs(name, call)].float()

    def _note_cut(self, index: int, name: str, call: Call) -> None:
        if isinstance(call, NormCall):
            self._moments[1].append(_moments(call.input))
        else:
            self._add_rows(index, name, call)
        self._call = call

    def _images_at(self, name: str) -> int:
        """Number of images that a layer is reconstructed from, over all processes."""
        return self._images[self._numbers[name]]

    def _shape(self, name: str) -> Tuple[int, int, int]:
        """Groups, features and outputs of a group of a layer of the cut model."""
        call = self._layers[name].call
        return tuple(call.matrix(call.weight).shape)

    def _kept_outputs(self, name: str, call: LinearCall) -> Tensor:
        """Output channels of a dense layer that the cut layer has."""
        shape = call.weight.shape
        if not call.transposed:
            channels = self._kept.get((name, 0), np.arange(shape[0]))
        else:
            in_group = shape[0] // call.groups
            groups = np.unique(self._kept.get((name, 0), np.arange(shape[0])) // in_group)
            channels = groups[:, None] * shape[1] + self._kept.get((name, 1), np.arange(shape[1]))
        return torch.from_numpy(channels.ravel()).to(call.weight.device)

    def _add_rows(self, index: int, name: str, call: LinearCall) -> None:
        at, targets = self._targets.pop(index)
        rows = call.rows(at)
        residuals = call.grouped(targets - call.outputs(rows))
        self._moments[0].append(_moments(targets.flatten(0, 1)))
        _, images, positions, _ = rows.shape
        numbers = torch.arange(images * positions, device=rows.device)
        if self._images_at(name) >= HELD_OUT and images == len(self._batches[index]):
            numbers = numbers // positions + int(self._first[index])
        held_out = numbers % HELD_OUT == HELD_OUT - 1
        for sums, chosen in zip(self._sums, (~held_out, held_out)):
            sums.add(rows.flatten(1, 2)[:, chosen], residuals.flatten(1, 2)[:, chosen])

    def _reconstruct(self, name: str) -> None:
        dense = _pool(self._moments[0])
        if isinstance(self._call, NormCall):
            kept = self._kept.get((name, 0))
            if kept is not None:
                dense = dense[:, torch.from_numpy(kept).to(dense.device)]
            _correct(self._call, dense, _pool(self._moments[1]))
        else:
            self._solve(name, self._call, dense)
        self._moments, self._sums = ([], []), (Sums(), Sums())
        following = self._numbers[name] + 1
        if following < len(self._layers):
            self._lockstep.join(2 * self._joined[following])
        self._bar.update()

    def _solve(self, name: str, call: LinearCall, dense: Tensor) -> None:
        """Give a layer the weights that reconstruct it, and correct the BatchNorm behind it.

        Args:
            name: Name of its weight.
            call: Its call.
            dense: Mean and variance of the dense layer's outputs, shape (2, channels).
        """
        fit, held_out = (sums.over_processes() for sums in self._sums)
        whole = fit + held_out
        if float(whole.rr.sum()) <= EXACT * whole.count * float(dense[0].square().sum() + dense[1].sum()):
            return
        if whole.count < self._shape(name)[1]:
            self.scarce.append(name)
        reader = self._layers[name]
        solution = solve_ridge(fit, held_out, reader.has_intercept)
        if solution is not None:
            matrix, intercept = solution
            call.weight.add_(call.weight_of(matrix).to(call.weight))
            if reader.bias:
                call.bias.add_(intercept.flatten().to(call.bias))
        norm = self._norms.get(reader.norm)
        if norm is not None:
            _correct(norm, dense, _output_moments(call, whole))


def _may_change(call: Call) -> bool:
    """Whether it is a layer that could make up for anything: a depthwise convolution reads one channel per output."""
    return isinstance(call, LinearCall) and not 1 < call.groups == call.channels


def _moments(inputs: Tensor) -> Tensor:
    """Number of values, their mean and the mean of their squares by channel, shape (3, channels)."""
    dims, count = [0, *range(2, inputs.ndim)], inputs.numel() // inputs.shape[1]
    mean = inputs.mean(dims)
    square = torch.linalg.vector_norm(inputs, dim=dims).square() / count  # var_mean takes six times as long
    return torch.stack([torch.full_like(mean, count), mean, square]).double()


def _pool(moments: Sequence[Tensor]) -> Tensor:
    """Mean and variance by channel, of all batches and processes, shape (2, channels)."""
    count, mean, square = torch.stack(list(moments)).unbind(1)
    total = summed(torch.stack([count.sum(0), (count * mean).sum(0), (count * square).sum(0)]))
    mean = total[1] / total[0]
    return torch.stack([mean, total[2] / total[0] - mean.square()])


def _output_moments(call: LinearCall, sums: Sums) -> Tensor:
    """Mean and variance of what a layer now returns for the rows of some sums, shape (2, channels)."""
    matrix, mean = call.matrix(call.weight).double(), sums.x / sums.count
    outputs = torch.einsum('gf,gfo->go', mean, matrix).flatten()
    variance = (matrix * (sums.centred().xx / sums.count @ matrix)).sum(1).flatten()
    return torch.stack([outputs if call.bias is None else outputs + call.bias.double(), variance])


def _correct(call: NormCall, dense: Tensor, cut: Tensor) -> None:
    """Change BatchNorm's statistics by what the cut changes of them.

    Args:
        call: BatchNorm of the cut model.
        dense: Mean and variance of what it reads in the dense model, shape (2, channels).
        cut: The same in the cut model.
    """
    ratio = torch.where((dense[1] > 0) & (cut[1] > 0), cut[1] / dense[1], 1.0)
    call.running_mean.add_((cut[0] - dense[0]).to(call.running_mean))
    call.running_var.mul_(ratio.to(call.running_var))
