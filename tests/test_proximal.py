"""The accelerated iterations on problems with a known answer, and the proximal maps against brute force."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso

from timm_epfs.learn.solvers import Apg, Fista, prox_elastic, prox_norm, soft_threshold

ROWS, COLUMNS = 60, 40


@pytest.fixture(scope='module')
def problem():
    """A badly conditioned regression with a sparse answer: A, b, and 1/L."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(ROWS, COLUMNS)) @ np.diag(np.logspace(0, -1.2, COLUMNS)) \
        + 0.3 * rng.normal(size=(ROWS, 1))
    answer = np.where(np.arange(COLUMNS) % 4 == 0, rng.normal(size=COLUMNS) + 2, 0.0)
    b = a @ answer + 0.01 * rng.normal(size=ROWS)
    return torch.from_numpy(a), torch.from_numpy(b), ROWS / np.linalg.norm(a, 2) ** 2


def objective(problem, x, l1, l2):
    a, b, _ = problem
    return float(((a @ x - b) ** 2).sum() / (2 * ROWS) + l1 * x.abs().sum() + l2 / 2 * (x ** 2).sum())


def solve(problem, l1, l2, steps, nonnegative=False, until=None, **options):
    """The last iterate, and the number of steps to ``until`` if that's given."""
    a, b, size = problem
    solver = Fista(torch.zeros(COLUMNS, dtype=torch.float64), **options)

    def prox(v, step_size):
        return prox_elastic(v, step_size * l1, step_size * l2, nonnegative)

    for step in range(1, steps + 1):
        solver.step(a.T @ (a @ solver.y - b) / ROWS, size, prox)
        if until is not None and objective(problem, solver.x, l1, l2) <= until:
            return solver.x, step
    return solver.x, steps


def reference(problem, l1, l2, positive=False):
    a, b, _ = problem
    options = dict(fit_intercept=False, tol=1e-14, max_iter=1_000_000, positive=positive)
    if l2:
        model = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), **options)
    else:
        model = Lasso(alpha=l1, **options)
    return torch.from_numpy(model.fit(a.numpy(), b.numpy()).coef_)


@pytest.mark.parametrize('positive', [False, True])
@pytest.mark.parametrize('l1, l2', [(0.01, 0.0), (0.01, 0.05)])
def test_fista_finds_what_scikit_learn_finds(problem, l1, l2, positive):
    x, _ = solve(problem, l1, l2, 5000, positive)
    best = reference(problem, l1, l2, positive)
    assert 0 < int((best == 0).sum()) < COLUMNS
    assert abs(objective(problem, x, l1, l2) - objective(problem, best, l1, l2)) < 1e-6
    assert torch.equal(x == 0, best == 0)
    assert (x - best).abs().max() < 1e-4


@pytest.mark.parametrize('l1, l2', [(0.01, 0.0), (0.003, 0.001)])
def test_fista_needs_fewer_steps_than_ista(problem, l1, l2):
    goal = objective(problem, reference(problem, l1, l2), l1, l2) + 1e-4
    _, plain = solve(problem, l1, l2, 20_000, until=goal, momentum=0.0)
    _, fista = solve(problem, l1, l2, 20_000, until=goal, restart=False)
    _, restarted = solve(problem, l1, l2, 20_000, until=goal)
    _, capped = solve(problem, l1, l2, 20_000, until=goal, momentum=0.9)
    assert restarted < plain / 3 and fista < plain / 3 and capped < plain / 3


def test_apg_solves_the_lasso(problem):
    a, b, size = problem
    solver = Apg(torch.zeros(COLUMNS, dtype=torch.float64))
    for _ in range(5000):
        solver.step(a.T @ (a @ solver.x - b) / ROWS, 0.2 * size, 0.01)
    best = reference(problem, 0.01, 0.0, positive=True)
    assert abs(objective(problem, solver.x, 0.01, 0) - objective(problem, best, 0.01, 0)) < 1e-6
    assert torch.equal(solver.x == 0, best == 0)


def apg_by_fractions(steps):
    """The factor after each step, in exact arithmetic: η = 0.1, γ = 0.01, μ = 0.9, no gradient."""
    x, v, mu, threshold = Fraction(1), Fraction(0), Fraction(9, 10), Fraction(1, 1000)
    for _ in range(steps):
        z = max(x - threshold, Fraction(0))
        v = z - x + mu * v
        x = max(Fraction(0), z + mu * v)
        yield x


def test_apg_takes_a_factor_to_zero_at_step_108():
    """Counted from step 0; plain proximal steps of 0.001 take 1000 of them."""
    one = torch.ones(1, dtype=torch.float64)
    solver = Apg(one)
    exact = list(apg_by_fractions(110))
    assert exact.index(0) == 108
    for step, x in enumerate(exact):
        solver.step(torch.zeros(1, dtype=torch.float64), 0.1, 0.01)
        assert float(solver.x) == pytest.approx(float(x), abs=1e-12)
        assert (solver.x == 0) == (step >= 108)
    plain = Fista(one, momentum=0.0)
    for _ in range(999):
        plain.step(torch.zeros(1, dtype=torch.float64), 0.1, lambda v, eta: soft_threshold(v, eta * 0.01))
    assert 0 < plain.x < 0.0015


def test_apg_gives_the_same_numbers_as_a_loop():
    rng = np.random.default_rng(0)
    solver = Apg(torch.ones(5, dtype=torch.float64), momentum=0.8)
    x, v = np.ones(5), np.zeros(5)
    for _ in range(20):
        grad = rng.normal(size=5)
        solver.step(torch.from_numpy(grad), 0.05, 0.3)
        for i in range(5):
            moved = x[i] - 0.05 * grad[i]
            z = np.sign(moved) * max(abs(moved) - 0.05 * 0.3, 0)
            v[i] = z - x[i] + 0.8 * v[i]
            x[i] = max(0, z + 0.8 * v[i])
    np.testing.assert_allclose(solver.x.numpy(), x, atol=1e-12)


def test_soft_threshold_is_the_proximal_map_of_l1():
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for v in (-2.3, -0.4, 0.0, 0.7, 3.1):
        best = grid[(0.5 * (grid - v) ** 2 + 0.7 * grid.abs()).argmin()]
        assert abs(soft_threshold(torch.tensor(v, dtype=torch.float64), 0.7) - best) < 1e-3


def test_prox_norm_is_a_proximal_map():
    """Nothing near its answer is better, nor is anything that many random starts descend to."""
    rng = torch.Generator().manual_seed(0)
    owner = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    radius = torch.tensor([2.0, 3 ** 0.5], dtype=torch.float64)
    l1, l2 = 0.15, 0.4

    def value(m, v):
        """Of each row."""
        norms = torch.zeros(len(m), 2, dtype=torch.float64).index_add(1, owner, m.square()).clamp(min=1e-30).sqrt()
        return 0.5 * (m - v).square().sum(1) + l1 * m.sum(1) + l2 / 2 * (norms - radius).square().sum(1)

    for _ in range(10):
        v = torch.rand(7, generator=rng, dtype=torch.float64) * 1.5 - 0.3
        best = value(prox_norm(v, l1, l2, owner, radius)[None], v)
        m = torch.rand(20, 7, generator=rng, dtype=torch.float64).requires_grad_()
        for _ in range(400):
            slope, = torch.autograd.grad(value(m, v).sum(), m)
            m = (m - 0.2 * slope).clamp(min=0).detach().requires_grad_()
        assert (best <= value(m, v).detach() + 1e-9).all()


def test_prox_norm_by_hand():
    out = prox_norm(torch.tensor([-1.0, 0.1, 2.0]), 0.5, 1.0, torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0]))
    assert out.tolist() == pytest.approx([0.0, (-0.4 + 2.0) / 2, (1.5 + 1.0) / 2])


def test_momentum_stops_where_it_disagrees_with_the_step():
    """On a quadratic, FISTA without restart overshoots and ripples; with it, the objective falls at every restart."""
    curvature = torch.tensor([1.0, 0.01], dtype=torch.float64)
    runs = {}
    for restart in (False, True):
        solver = Fista(torch.ones(2, dtype=torch.float64), restart=restart)
        values = []
        for _ in range(300):
            solver.step(curvature * solver.y, 1.0, lambda v, eta: v)
            values.append(float((curvature * solver.x.square()).sum()))
        runs[restart] = values
        assert bool(solver.restarts) == restart
    assert runs[True][-1] < 1e-6 * runs[False][-1]


def test_a_saved_iteration_goes_on_as_it_was():
    grads = torch.randn(20, 4, dtype=torch.float64)
    for make, args in ((lambda: Fista(torch.ones(4, dtype=torch.float64)), (lambda v, eta: soft_threshold(v, eta),)),
                       (lambda: Apg(torch.ones(4, dtype=torch.float64)), (0.5,))):
        one, two = make(), make()
        for grad in grads[:10]:
            one.step(grad, 0.1, *args)
        two.load_state_dict(one.state_dict())
        for grad in grads[10:]:
            one.step(grad, 0.1, *args)
            two.step(grad, 0.1, *args)
        assert torch.equal(one.x, two.x) and torch.equal(one.y, two.y)
