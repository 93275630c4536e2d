"""Hadamard matrices against their definition and scipy-free oracles."""

import pytest
import torch

from octavo.errors import UserError
from octavo.numerics.hadamard import hadamard, has_hadamard, largest_block, rotate


@pytest.mark.parametrize("size", [size for size in range(1, 641) if has_hadamard(size)])
def test_rows_are_signs_and_orthogonal(size):
    matrix = hadamard(size)
    assert set(matrix.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


@pytest.mark.parametrize("size", [1, 2, 12, 16, 20, 28, 36, 40, 96, 144])
def test_the_fast_transform_is_the_matrix(size):
    x = torch.randn(3, 5, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float32)
    slow = (x.double().view(3, 5, 2, size) @ (hadamard(size).double() / size**0.5)).reshape(x.shape)
    torch.testing.assert_close(rotate(x, size).double(), slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(rotate(x, size), size, inverse=True), x, rtol=1e-5, atol=1e-5)


def test_products_of_rotated_tensors_stay():
    x, w = torch.randn(7, 384), torch.randn(5, 384)
    torch.testing.assert_close(rotate(x, 384) @ rotate(w, 384).T, x @ w.T, rtol=1e-4, atol=1e-4)


def test_an_outlier_is_spread():
    x = torch.zeros(1, 128).index_fill(1, torch.tensor([5]), 50.0)
    assert float(rotate(x, 128).abs().max()) == pytest.approx(50 / 128**0.5)


def test_sizes_that_do_not_exist_are_refused_with_those_that_do():
    assert not has_hadamard(52)
    with pytest.raises(UserError, match="2\\^k times 1, 12, 20, 28 or 36"):
        rotate(torch.zeros(2, 52), 52)
    with pytest.raises(UserError, match="do not divide 100 channels"):
        rotate(torch.zeros(2, 100), 16)
    assert largest_block(300, most=64) == 20
