"""Layouts of kernels, and what makes them symmetric to the last bit."""

import pytest
import torch

from ntk_callbacks.layout import as_matrix, mirror_, symmetric, symmetric_

SHAPES = [(5, 5), (5, 5, 3), (5, 5, 3, 3), (1, 1, 2, 2), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_lower_triangle_becomes_the_mirror_of_the_upper(shape):
    kernel = torch.randn(shape)
    before = kernel.clone()
    matrix = as_matrix(kernel)
    expected = matrix.triu() + matrix.triu(1).mT
    assert torch.equal(as_matrix(symmetric(kernel)), expected)
    assert torch.equal(kernel, before)  # a new one


@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_where_the_kernel_lies_as_its_matrix(shape):
    kernel = torch.randn(shape)
    if len(shape) == 4:
        kernel = kernel.transpose(1, 2).contiguous().transpose(1, 2)
    expected = symmetric(kernel)
    assert symmetric_(kernel) is kernel
    assert torch.equal(kernel, expected)


def test_a_kernel_that_lies_otherwise_is_not_left_as_it_is_in_silence():
    with pytest.raises(RuntimeError):
        symmetric_(torch.randn(3, 3, 2, 2))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_blocks_of_any_size(size):
    matrix = torch.randn(2, 7, 7)
    expected = matrix.triu() + matrix.triu(1).mT
    mirror_(matrix, size)
    assert torch.equal(matrix, expected)
