"""Proximal maps and two accelerated proximal gradient methods, on plain tensors.

Nothing here knows about networks. The gradient is a tensor that the caller computes, so the same code solves a Lasso.
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
    """The proximal map of the elastic net: minimiser over ``m`` of ``½‖m − v‖² + Σ l1·|m| + (l2/2)·‖m‖²``.

    >>> prox_elastic(torch.tensor([-2.0, 0.5, 2.0]), 1.0, 1.0)
    tensor([0.0000, 0.0000, 0.5000])

    Args:
        v: Where to start from, any shape.
        l1: Weight of ℓ1, a number or one per entry.
        l2: Weight of ℓ2, a number or one per entry.
        nonnegative: Whether only ``m ≥ 0`` is allowed.
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

    This is the exact proximal map, in closed form. For any given norm of a layer's ``m``, the best direction is that of
    ``u = max(v − l1, 0)``. The best norm then is ``(‖u‖ + l2·radius) / (1 + l2)``. Where ``u = 0``, the best ``m`` is
    zero but for the entry at which ``v − l1`` is largest.

    Below, ``u`` is (3, 0), of norm 3, and the best norm is (3 + 1·5)/(1 + 1):

    >>> layers = dict(owner=torch.tensor([0, 0]), radius=torch.tensor([5.0]))
    >>> prox_norm(torch.tensor([4.0, 0.5]), l1=1.0, l2=1.0, **layers)
    tensor([4., 0.])

    Args:
        v: Where to start from, shape (units,).
        l1: Weight of ℓ1, a number or shape (units,).
        l2: Weight of the last term, a number or shape (layers,).
        owner: Number of the layer of each unit, shape (units,).
        radius: The norm that each layer is pulled towards, shape (layers,).
    """
    u = (v - l1).clamp(min=0)
    norm = torch.zeros_like(radius).index_add_(0, owner, u.square()).sqrt()
    scale = torch.where(norm > 0, (norm + l2 * radius) / (1 + l2) / norm.clamp(min=1e-30), 0.0)
    out = u * scale[owner]
    for layer in (norm == 0).nonzero().flatten().tolist():
        largest = torch.where(owner == layer, v - l1, -torch.inf).argmax()
        weight = (l2 * torch.ones_like(radius))[layer]
        out[largest] = (((v - l1)[largest] + weight * radius[layer]) / (1 + weight)).clamp(min=0)
    return out


class Fista:
    """FISTA (Beck and Teboulle, 2009) for the sum of a smooth function f and one with a known proximal map.

    ``x⁺ = prox(y − η∇f(y))``, ``t⁺ = (1 + √(1 + 4t²))/2``, ``y⁺ = x⁺ + (t − 1)/t⁺ · (x⁺ − x)``.

    Minimise ``½(x − 3)² + |x|``, whose solution is 2:

    >>> solver = Fista(torch.zeros(1))
    >>> for _ in range(20):
    ...     solver.step(solver.y - 3, step_size=0.5, prox=soft_threshold)
    >>> round(solver.x.item(), 3)
    2.0

    Args:
        start: Where to start, any shape.
        restart: Whether to drop the momentum when the step points against it, ``(y − x⁺)·(x⁺ − x) > 0``: the gradient
            scheme of O'Donoghue and Candès, 2015.
        momentum: Upper bound on ``(t − 1)/t⁺``. Without a bound it tends to 1, which is too much for noisy gradients.

    Attributes:
        x: The solution so far.
        y: The extrapolated point, where the gradient is taken.
        restarts: How often the momentum was dropped.
    """

    def __init__(self, start: Tensor, restart: bool = True, momentum: float = 1.0):
        self.x, self.y, self.t = start.clone(), start.clone(), 1.0
        self.restart, self.momentum = restart, momentum
        self.restarts = 0

    def step(self, grad: Tensor, step_size: Union[float, Tensor], prox: Prox) -> None:
        """Make one iteration.

        Args:
            grad: ∇f(y).
            step_size: η, a number or one per entry.
            prox: Proximal map of the other function, ``prox(v, η)``.
        """
        x = prox(self.y - step_size * grad, step_size)
        if self.restart and torch.dot((self.y - x).flatten(), (x - self.x).flatten()) > 0:
            self.t = 1.0
            self.restarts += 1
        t = (1 + (1 + 4 * self.t ** 2) ** 0.5) / 2
        self.y = x + min((self.t - 1) / t, self.momentum) * (x - self.x)
        self.x, self.t = x, t

    def reset(self, entries: Tensor, value: Tensor) -> None:
        """Set some entries, and drop their momentum.

        Args:
            entries: Which ones, bool, of the shape of ``x``.
            value: What to set them to, of the shape of ``x``.
        """
        self.x = torch.where(entries, value, self.x)
        self.y = torch.where(entries, value, self.y)

    def state_dict(self) -> Dict[str, Union[Tensor, float, int]]:
        """Both points, t, and the number of restarts."""
        return {'x': self.x.clone(), 'y': self.y.clone(), 't': self.t, 'restarts': self.restarts}

    def load_state_dict(self, state: Dict[str, Union[Tensor, float, int]]) -> None:
        """Resume where ``state_dict`` was called."""
        self.x, self.y = state['x'].clone(), state['y'].clone()
        self.t, self.restarts = float(state['t']), int(state['restarts'])


class Apg:
    """The modified accelerated proximal gradient of SSS (Huang and Wang, ECCV 2018), as in the authors' released code.

    ``z = S_{ηγ}(x − η∇f(x))``, ``v⁺ = z − x + μv``, ``x⁺ = max(0, z + μv⁺)``.

    Args:
        start: Where to start, any shape.
        momentum: μ.

    Attributes:
        x: The solution so far, where the gradient is taken.
        v: The velocity.
    """

    def __init__(self, start: Tensor, momentum: float = 0.9):
        self.x, self.v = start.clone(), torch.zeros_like(start)
        self.momentum = momentum

    @property
    def y(self) -> Tensor:
        """The point where the gradient is taken, as in ``Fista``: ``x`` itself."""
        return self.x

    def step(self, grad: Tensor, step_size: float, threshold: Optional[Union[float, Tensor]]) -> None:
        """Make one iteration.

        Args:
            grad: ∇f(x).
            step_size: η.
            threshold: γ, a number or one per entry.
        """
        z = soft_threshold(self.x - step_size * grad, step_size * threshold)
        self.v = z - self.x + self.momentum * self.v
        self.x = (z + self.momentum * self.v).clamp(min=0)

    def reset(self, entries: Tensor, value: Tensor) -> None:
        """Set some entries, and drop their momentum.

        Args:
            entries: Which ones, bool, of the shape of ``x``.
            value: What to set them to, of the shape of ``x``.
        """
        self.x = torch.where(entries, value, self.x)
        self.v = torch.where(entries, torch.zeros_like(self.v), self.v)

    def state_dict(self) -> Dict[str, Tensor]:
        """The solution, and the velocity."""
        return {'x': self.x.clone(), 'v': self.v.clone()}

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        """Resume where ``state_dict`` was called."""
        self.x, self.v = state['x'].clone(), state['v'].clone()
