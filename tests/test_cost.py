import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_epfs.core import QUANTITIES, CostModel, Size
from timm_epfs.report import count_macs

NAMES = ('a', 'b', 'c')

sizes = st.builds(
    Size,
    const=st.integers(0, 9),
    coefs=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 4)), max_size=3).map(tuple),
)
# One to four factors: a linear layer has two free dims, an attention product three or four.
terms = st.lists(
    st.tuples(st.sampled_from(QUANTITIES), st.integers(1, 50).map(float), st.lists(sizes, max_size=4).map(tuple)),
    max_size=8,
)
counts = st.lists(st.integers(1, 64), min_size=len(NAMES), max_size=len(NAMES)).map(np.array)


def brute_force(terms, quantity, left):
    total = 0
    for term_quantity, coef, factors in terms:
        product = coef
        for size in factors:
            product *= size(left)
        total += product * (term_quantity == quantity)
    return total


@settings(derandomize=True, deadline=None)
@given(terms=terms, counts=counts)
def test_cost_is_the_sum_over_terms(terms, counts):
    cost = CostModel(NAMES, terms)
    for quantity in QUANTITIES:
        expected = brute_force(terms, quantity, dict(zip(NAMES, counts.tolist())))
        assert cost(quantity, counts) == pytest.approx(expected, rel=1e-12)


@settings(derandomize=True, deadline=None)
@given(terms=terms, counts=counts)
def test_gradient_is_the_finite_difference(terms, counts):
    cost = CostModel(NAMES, terms)
    h = 1e-3
    for quantity in QUANTITIES:
        gradient = cost.gradient(quantity, counts)
        difference = [(cost(quantity, counts + h * e) - cost(quantity, counts - h * e)) / (2 * h) for e in np.eye(3)]
        # Rounding of a difference of two costs divided by 2h.
        rounding = 1e-12 * cost(quantity, counts) / h
        assert gradient == pytest.approx(np.array(difference), rel=1e-5, abs=max(rounding, 1e-9))


def test_convolution_by_hand():
    # 3x3 convolution from a (16) to b (32) on 8x8, then a classifier with bias on b.
    a, b = Size(0, (('a', 1),)), Size(0, (('b', 1),))
    cost = CostModel(['b', 'a'], [
        ('macs', 8 * 8 * 9.0, (a, b)), ('params', 9.0, (a, b)),
        ('macs', 1.0, (b, Size(10))), ('params', 1.0, (b, Size(10))), ('params', 1.0, (Size(10),)),
    ])
    dense = cost.counts({'a': 16, 'b': 32})
    assert dense.tolist() == [32, 16]
    assert cost('macs', dense) == 8 * 8 * 9 * 16 * 32 + 32 * 10
    assert cost('params', dense) == 9 * 16 * 32 + 32 * 10 + 10
    assert cost('activations', dense) == 0
    assert cost.gradient('macs', dense).tolist() == [8 * 8 * 9 * 16 + 10, 8 * 8 * 9 * 32]


class Called(nn.Module):
    """Calls a module with a view of a parameter, as class attention does with its token."""

    def __init__(self):
        super().__init__()
        self.queries, self.fixed = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(1), requires_grad=False)
        self.layer = nn.Linear(8, 5)

    def forward(self, images, scale=1.0):
        return images @ self.layer(self.queries.expand(3, -1)).T * scale


def test_macs_that_torch_counts_and_what_needs_gradients_is_left_so():
    model = Called()
    assert count_macs(model, (torch.ones(2, 5),), {'scale': 2.0}) == 3 * 8 * 5 + 2 * 5 * 3
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        'queries': True, 'fixed': False, 'layer.weight': True, 'layer.bias': True}
