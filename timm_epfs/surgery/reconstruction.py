"""Layer-wise reconstruction: weights with which a cut model's layers give the outputs of the dense model's layers.

Dense and cut model run side by side over all images, layer by layer (``Lockstep``). At a linear layer or convolution,
the weights are changed so that from what the *cut* model passes on to it, it gives what the layer of the *dense* model
gives, as nearly as a linear layer can. So a layer also makes up for what the layers before it couldn't. With X̂ the
layer's inputs in the cut model as rows, Y the outputs of the dense layer, and W the weights that are there,

    W' = W + (X̂ᵀX̂ + ρI)⁻¹ X̂ᵀ (Y − X̂ W),

ridge regression towards W, with intercept where there is a bias or a BatchNorm behind it. Rows of an eighth of the
images are held out: ρ is chosen on them, and a layer that isn't better on them stays as it is.

At a BatchNorm layer, the statistics are changed by what the cut changes on these images: mean + (cut − dense), variance
× cut / dense. Statistics estimated from a few hundred images alone would be noise; their difference isn't, as both
models see the same images (control variates).

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1, for the least
squares. Ridge towards the weights that are there, the held-out rows and the control variates are our reading.
"""
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from ..activations import (
    Call, LinearCall, Lockstep, NormCall, Sums, Watch, list_readers, sample_positions, solve_ridge,
)
from ..core.processes import summed

__all__ = ['Reconstruction']

HELD_OUT = 8  # every eighth image


class Reconstruction:
    """Reconstructs the layers of a cut model, in place.

    Args:
        model: The cut model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        kept: Entries of the dense model's dims that the cut model has, by tensor and dim. None where it has all.
        batches: Batches of images.
        weights: Whether to change weights. Otherwise only BatchNorm statistics are changed.

    Attributes:
        solved: Names of the weights that were changed.
        scarce: Names of the weights with more inputs than rows.
        shared: Names of weights and statistics that several places of the forward use. They are left alone.
    """

    def __init__(
            self,
            model: nn.Module,
            dense: nn.Module,
            kept: Mapping[Tuple[str, int], np.ndarray],
            batches: Sequence[Tensor],
            weights: bool = True,
    ):
        self._model, self._dense, self._kept, self._batches = model, dense, kept, batches
        counts = torch.tensor(float(sum(map(len, batches))), device=batches[0].device)
        self._images = int(summed(counts))
        self._first = np.cumsum([0, *map(len, batches)])
        self.solved: List[str] = []
        self.scarce: List[str] = []
        readers, self.shared = list_readers(model, batches[0][:1])
        self._layers = {name: reader for name, reader in readers.items() if weights or reader.is_norm}
        self._lockstep = Lockstep(self._reconstruct)
        self._targets: Dict[int, Tuple[Tensor, Tensor]] = {}  # by batch: positions, and the dense layer's outputs there
        self._moments: Tuple[List[Tensor], List[Tensor]] = ([], [])  # of a BatchNorm's inputs, dense and cut
        self._sums = Sums(), Sums()  # of the rows to fit on and of those held out
        self._call: Call

    def run(self) -> None:
        """Reconstruct all layers.

        Raises:
            PruningError: The forward takes different ways for different images or in the two models.
        """
        count = len(self._batches)
        if self._layers:
            self._lockstep.run([self._run_dense] * count + [self._run_cut] * count)

    def _run_dense(self, number: int) -> None:
        batch = self._batches[number]

        def handle(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            if name not in self._layers:
                return run()
            output = run()
            if isinstance(call, NormCall):
                self._moments[0].append(_moments(call.input))
            else:
                at = sample_positions(name, call.positions, self._images, self._features(name)).to(output.device)
                self._targets[number] = at, call.outputs(output, at, self._kept_outputs(name, call))
            self._lockstep.meet(number, name)
            return output

        with torch.no_grad(), Watch(self._dense, len(batch), handle):
            self._dense(batch)

    def _run_cut(self, number: int) -> None:
        index = number - len(self._batches)
        batch = self._batches[index]

        def handle(name: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
            if name in self._layers:
                if isinstance(call, NormCall):
                    self._moments[1].append(_moments(call.input))
                else:
                    self._add_rows(index, call)
                self._call = call
                self._lockstep.meet(number, name)
            return run()

        with torch.no_grad(), Watch(self._model, len(batch), handle):
            self._model(batch)

    def _features(self, name: str) -> int:
        call = self._layers[name].call
        return call.matrix(call.weight).shape[1]

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

    def _add_rows(self, index: int, call: LinearCall) -> None:
        at, targets = self._targets.pop(index)
        rows = call.rows(at).float()
        predicted = rows @ call.matrix(call.weight).float()[:, None]
        if call.bias is not None:
            predicted = predicted + call.bias.float().view(call.groups, 1, 1, -1)
        residuals = call.grouped(targets.float()) - predicted
        _, images, positions, _ = rows.shape
        numbers = torch.arange(images * positions, device=rows.device)
        if self._images >= HELD_OUT and images == len(self._batches[index]):
            numbers = numbers // positions + int(self._first[index])
        held_out = numbers % HELD_OUT == HELD_OUT - 1
        for sums, chosen in zip(self._sums, (~held_out, held_out)):
            sums.add(rows.flatten(1, 2)[:, chosen], residuals.flatten(1, 2)[:, chosen])

    def _reconstruct(self, name: str) -> None:
        if isinstance(self._call, NormCall):
            _correct(self._call, *(_pool(moments) for moments in self._moments), self._kept.get((name, 0)))
        else:
            self._solve(name, self._call)
        self._moments, self._sums = ([], []), (Sums(), Sums())

    def _solve(self, name: str, call: LinearCall) -> None:
        fit, held_out = (sums.over_processes() for sums in self._sums)
        if fit.count + held_out.count < self._features(name):
            self.scarce.append(name)
        solution = solve_ridge(fit, held_out, call.bias is not None or bool(self._layers[name].norm))
        if solution is None:
            return
        matrix, intercept = solution
        call.weight.add_(call.weight_of(matrix).to(call.weight))
        if call.bias is not None:
            call.bias.add_(intercept.flatten().to(call.bias))
        self.solved.append(name)


def _moments(inputs: Tensor) -> Tensor:
    """Number of values, their mean and the mean of their squares by channel, shape (3, channels)."""
    dims, count = [0, *range(2, inputs.ndim)], inputs.numel() // inputs.shape[1]
    mean = inputs.mean(dims)
    square = torch.linalg.vector_norm(inputs, dim=dims).square() / count  # var_mean takes six times as long
    return torch.stack([torch.full_like(mean, count), mean, square]).double()


def _pool(moments: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
    """Mean and variance by channel, of all batches and processes."""
    count, mean, square = torch.stack(list(moments)).unbind(1)
    total = summed(torch.stack([count.sum(0), (count * mean).sum(0), (count * square).sum(0)]))
    mean = total[1] / total[0]
    return mean, total[2] / total[0] - mean.square()


def _correct(
        call: NormCall,
        dense: Tuple[Tensor, Tensor],
        cut: Tuple[Tensor, Tensor],
        kept: Optional[np.ndarray],
) -> None:
    """Change BatchNorm's statistics by what the cut changes of them."""
    mean, variance = dense if kept is None else (values[torch.from_numpy(kept).to(values.device)] for values in dense)
    ratio = torch.where((variance > 0) & (cut[1] > 0), cut[1] / variance, 1.0)
    call.running_mean.add_((cut[0] - mean).to(call.running_mean))
    call.running_var.mul_(ratio.to(call.running_var))
