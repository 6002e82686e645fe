"""Ridge regression from sums over rows, with its penalty chosen on rows that were held out."""
from dataclasses import dataclass
from math import inf
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from ..core import summed, world_size

__all__ = ['Sums', 'solve_ridge']

# Penalties are powers of ten, as shares of the mean of the Gram matrix's diagonal.
FIRST, SMALLEST, LARGEST = -3, -9, 1


@dataclass
class Sums:
    """Sums over rows x (features) and r (outputs), one set per group, float64.

    Attributes:
        count: Number of rows.
        x, r: Sums of the rows, shapes (groups, features) and (groups, outputs).
        xx: Sum of xᵀx, shape (groups, features, features).
        xr: Sum of xᵀr, shape (groups, features, outputs).
        rr: Sum of r², shape (groups, outputs).
    """
    count: int = 0
    x: Optional[Tensor] = None
    r: Optional[Tensor] = None
    xx: Optional[Tensor] = None
    xr: Optional[Tensor] = None
    rr: Optional[Tensor] = None

    def add(self, x: Tensor, r: Tensor) -> None:
        """Add rows, shapes (groups, rows, features) and (groups, rows, outputs)."""
        x, r, count = x.float(), r.float(), x.shape[1]
        if not count:
            if self.xx is None:  # other processes may have rows
                self._set_zero(x, r)
            return
        # Products of centred rows lose no digits to the means, which are added in double precision.
        x_mean, r_mean = x.mean(1, keepdim=True), r.mean(1, keepdim=True)
        x, r = x - x_mean, r - r_mean
        x_mean, r_mean = x_mean.double(), r_mean.double()
        products = {
            'x': count * x_mean[:, 0],
            'r': count * r_mean[:, 0],
            'xx': (x.transpose(1, 2) @ x).double() + count * x_mean.transpose(1, 2) * x_mean,
            'xr': (x.transpose(1, 2) @ r).double() + count * x_mean.transpose(1, 2) * r_mean,
            'rr': r.square().sum(1).double() + count * r_mean[:, 0].square(),
        }
        self.count += count
        for name, product in products.items():
            total = getattr(self, name)
            setattr(self, name, product if total is None else total.add_(product))

    def _set_zero(self, x: Tensor, r: Tensor) -> None:
        groups, features, outputs = len(x), x.shape[-1], r.shape[-1]
        shapes = {'x': (features,), 'r': (outputs,), 'xx': (features, features), 'xr': (features, outputs),
                  'rr': (outputs,)}
        for name, shape in shapes.items():
            setattr(self, name, x.new_zeros((groups, *shape), dtype=torch.float64))

    def over_processes(self) -> 'Sums':
        """The sums over all processes that work together."""
        if world_size() == 1:
            return self
        count = int(summed(torch.tensor(float(self.count), device=self.xx.device)))
        return Sums(count, *(summed(total) for total in (self.x, self.r, self.xx, self.xr, self.rr)))

    def __add__(self, other: 'Sums') -> 'Sums':
        if not other.count or not self.count:
            return self if self.count else other
        names = ('count', 'x', 'r', 'xx', 'xr', 'rr')
        return Sums(*(getattr(self, name) + getattr(other, name) for name in names))

    def centred(self) -> 'Sums':
        """Sums of the rows minus their means."""
        x, r, n = self.x, self.r, self.count
        return Sums(
            n, torch.zeros_like(x), torch.zeros_like(r), self.xx - x[:, :, None] * x[:, None] / n,
            self.xr - x[:, :, None] * r[:, None] / n, self.rr - r.square() / n)

    def error(self, change: Tensor) -> float:
        """Sum of (r - x · change)², for a change of shape (groups, features, outputs)."""
        explained = 2 * (change * self.xr).sum() - (change * (self.xx @ change)).sum()
        return float(self.rr.sum() - explained)


def solve_ridge(fit: Sums, held_out: Sums, centred: bool) -> Optional[Tuple[Tensor, Tensor]]:
    """The matrix that predicts r from x best, with a ridge penalty towards zero.

    Args:
        fit: Sums over the rows to fit on.
        held_out: Sums over other rows, on which the penalty is chosen.
        centred: Whether there is an intercept.

    Returns:
        Matrix, shape (groups, features, outputs), and intercept, shape (groups, outputs), fitted on all rows. None
        where no penalty predicts r better than zero does, or no rows are held out.
    """
    if not fit.count or not held_out.count:
        return None
    train, test = (fit.centred(), held_out.centred()) if centred else (fit, held_out)
    errors: Dict[int, float] = {}

    def error(power: int) -> float:
        if power not in errors:
            errors[power] = test.error(_solve(train, 10.0 ** power)) if SMALLEST <= power <= LARGEST else inf
        return errors[power]

    best, better = FIRST, min(FIRST - 1, FIRST + 1, key=error)
    while error(better) < error(best):
        best, better = better, 2 * better - best
    if not error(best) < test.error(torch.zeros_like(test.xr)):
        return None
    whole = fit + held_out
    matrix = _solve(whole.centred() if centred else whole, 10.0 ** best)
    intercept = (whole.r - torch.einsum('gf,gfo->go', whole.x, matrix)) / whole.count
    return matrix, intercept if centred else torch.zeros_like(intercept)


def _solve(sums: Sums, penalty: float) -> Tensor:
    size = sums.xx.shape[-1]
    diagonal = sums.xx.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (penalty * diagonal).clamp_min(torch.finfo(torch.float64).tiny)
    matrix = sums.xx + ridge[:, None, None] * torch.eye(size, dtype=sums.xx.dtype, device=sums.xx.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(sums.xr, factor)
    return torch.where((info == 0)[:, None, None], solution, torch.zeros_like(solution))
