"""Proximal steps on masks: small functions and two accelerated iterations on plain tensors.

None of it knows of networks: the gradient comes in as a tensor, so that the same code solves a Lasso.
"""
from typing import Callable, Dict, Optional, Union

import torch

__all__ = ['soft_threshold', 'prox_elastic', 'prox_norm', 'Fista', 'Apg']

Tensor = torch.Tensor
Prox = Callable[[Tensor, Union[float, Tensor]], Tensor]


def soft_threshold(x: Tensor, threshold: Union[float, Tensor]) -> Tensor:
    """``S_a(x) = sign(x) · max(|x| − a, 0)``, the proximal map of ``a‖x‖₁``.

    >>> soft_threshold(torch.tensor([-2.0, 0.5, 2.0]), 1.0)
    tensor([-1.,  0.,  1.])
    """
    return torch.sign(x) * (x.abs() - threshold).clamp(min=0)


def prox_elastic(v: Tensor, l1: Union[float, Tensor], l2: Union[float, Tensor], nonnegative: bool = True) -> Tensor:
    """Minimiser of ``½‖m − v‖² + Σ l1·|m| + (l2/2)·‖m‖²``, over ``m ≥ 0`` if so asked.

    >>> prox_elastic(torch.tensor([-2.0, 0.5, 2.0]), 1.0, 1.0)
    tensor([0.0000, 0.0000, 0.5000])
    """
    shrunk = (v - l1).clamp(min=0) if nonnegative else soft_threshold(v, l1)
    return shrunk / (1 + l2)


def prox_norm(
        v: Tensor,
        l1: Union[float, Tensor],
        l2: Union[float, Tensor],
        owner: Tensor,
        radius: Tensor,
) -> Tensor:
    """Minimiser over ``m ≥ 0`` of ``½‖m − v‖² + Σ l1·m + Σ_layers (l2/2)·(‖m_layer‖ − radius)²``.

    The exact proximal map, in closed form: for a given norm of a layer the best direction is that of
    ``u = max(v − l1, 0)``, and the best norm is ``(‖u‖ + l2·radius) / (1 + l2)``. Where ``u = 0``, the best direction
    is the largest entry of ``v − l1`` alone.

    Args:
        v: Where from, shape (units,).
        l1: Threshold, a number or shape (units,).
        l2: Weight of the norm's term, a number or shape (layers,).
        owner: Number of the layer of each unit, shape (units,).
        radius: The norm that each layer is held at, shape (layers,).
    """
    u = (v - l1).clamp(min=0)
    norm = torch.zeros_like(radius).index_add_(0, owner, u.square()).sqrt()
    scale = torch.where(norm > 0, (norm + l2 * radius) / (1 + l2) / norm.clamp(min=1e-30), 0.0)
    out = u * scale[owner]
    for layer in (norm == 0).nonzero().flatten().tolist():
        at = torch.where(owner == layer, v - l1, -torch.inf).argmax()
        pull = (l2 * torch.ones_like(radius))[layer]
        out[at] = (((v - l1)[at] + pull * radius[layer]) / (1 + pull)).clamp(min=0)
    return out


class Fista:
    """FISTA (Beck and Teboulle, 2009): ``x`` is the solution so far, ``y`` the extrapolated point.

    ``x⁺ = prox(y − η∇f(y))``, ``t⁺ = (1 + √(1 + 4t²))/2``, ``y⁺ = x⁺ + (t − 1)/t⁺ · (x⁺ − x)``. The gradient is taken
    at ``y``.

    Args:
        start: Where to start.
        restart: Drop the momentum when the step disagrees with it, ``(y − x⁺)·(x⁺ − x) > 0`` (O'Donoghue and Candès,
            2015, the gradient scheme).
        momentum: Upper bound on ``(t − 1)/t⁺``, which tends to 1: with noisy gradients something must bound it.
    """

    def __init__(self, start: Tensor, restart: bool = True, momentum: float = 1.0):
        self.x, self.y, self.t = start.clone(), start.clone(), 1.0
        self.restart, self.momentum = restart, momentum
        self.restarts = 0

    def step(self, grad: Tensor, step_size: Union[float, Tensor], prox: Prox) -> None:
        """One iteration.

        Args:
            grad: Gradient of the smooth part at ``y``.
            step_size: η, a number or one an entry.
            prox: Proximal map of the rest, ``prox(v, η)``.
        """
        x = prox(self.y - step_size * grad, step_size)
        if self.restart and torch.dot((self.y - x).flatten(), (x - self.x).flatten()) > 0:
            self.t = 1.0
            self.restarts += 1
        t = (1 + (1 + 4 * self.t ** 2) ** 0.5) / 2
        self.y = x + min((self.t - 1) / t, self.momentum) * (x - self.x)
        self.x, self.t = x, t

    def hold(self, entries: Tensor, value: Tensor) -> None:
        """Put some entries at a value, without momentum."""
        self.x = torch.where(entries, value, self.x)
        self.y = torch.where(entries, value, self.y)

    def state_dict(self) -> Dict[str, Union[Tensor, float, int]]:
        """Both points, and the momentum."""
        return {'x': self.x.clone(), 'y': self.y.clone(), 't': self.t, 'restarts': self.restarts}

    def load_state_dict(self, state: Dict[str, Union[Tensor, float, int]]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.x, self.y = state['x'].clone(), state['y'].clone()
        self.t, self.restarts = float(state['t']), int(state['restarts'])


class Apg:
    """The modified accelerated proximal gradient of SSS (Huang and Wang, ECCV 2018), as in the authors' released code.

    ``z = S_{ηγ}(x − η∇f(x))``, ``v⁺ = z − x + μv``, ``x⁺ = max(0, z + μv⁺)``. The gradient is taken at ``x``, which is
    also the solution so far.

    Args:
        start: Where to start.
        momentum: μ.
    """

    def __init__(self, start: Tensor, momentum: float = 0.9):
        self.x, self.v = start.clone(), torch.zeros_like(start)
        self.momentum = momentum

    @property
    def y(self) -> Tensor:
        """Where the gradient is taken: at the solution."""
        return self.x

    def step(self, grad: Tensor, step_size: float, threshold: Optional[Union[float, Tensor]]) -> None:
        """One iteration.

        Args:
            grad: Gradient of the smooth part at ``x``.
            step_size: η.
            threshold: γ, a number or one an entry.
        """
        z = soft_threshold(self.x - step_size * grad, step_size * threshold)
        self.v = z - self.x + self.momentum * self.v
        self.x = (z + self.momentum * self.v).clamp(min=0)

    def hold(self, entries: Tensor, value: Tensor) -> None:
        """Put some entries at a value, without momentum."""
        self.x = torch.where(entries, value, self.x)
        self.v = torch.where(entries, torch.zeros_like(self.v), self.v)

    def state_dict(self) -> Dict[str, Tensor]:
        """The solution, and the velocity."""
        return {'x': self.x.clone(), 'v': self.v.clone()}

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.x, self.v = state['x'].clone(), state['v'].clone()
