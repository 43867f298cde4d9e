"""Whichever library computes products, they are float32's."""

import pytest
import torch

from learners import products


@pytest.fixture
def fresh():
    before = torch.backends.mkldnn.matmul.fp32_precision
    products._is_exact.cache_clear()
    yield before
    torch.backends.mkldnn.matmul.fp32_precision = before
    products._is_exact.cache_clear()


@pytest.mark.parametrize("shape", [(1, 7, 3), (300, 128, 352), (33, 4096, 65)])
def test_products_are_exact(fresh, shape):
    products.use_fastest_products()
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = left.double() @ right.double()
    for found in (left @ right, (right.T @ left.T).T, torch.bmm(left[None], right[None])[0]):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_products_that_round_their_factors_are_not_used(fresh, monkeypatch):
    monkeypatch.setattr(products, "_error", lambda *_: 2e-3)  # as with matrix tiles
    assert not products.use_fastest_products()
    assert torch.backends.mkldnn.matmul.fp32_precision == fresh
