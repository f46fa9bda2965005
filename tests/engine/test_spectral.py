"""Spectra of matrices whose spectra are known."""

import pytest
import torch

from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.spectral import kernel_eigenvalues, singular_values

SPECTRUM = torch.tensor([5.0, 2.0, 1.0, 0.25], dtype=torch.float64)


def rotation(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def test_eigenvalues_of_a_rotated_spectrum_largest_first():
    q = rotation(4)
    matrix = q @ torch.diag(SPECTRUM) @ q.mT
    # Round-off of a product of 4×4 matrices.
    assert torch.allclose(kernel_eigenvalues(matrix), SPECTRUM, rtol=0, atol=1e-13)


def test_eigenvalues_are_taken_in_float64():
    matrix = torch.diag(torch.tensor([1.0, 1e-12]))
    eigenvalues = kernel_eigenvalues(matrix)
    assert eigenvalues.dtype == torch.float64
    # In float32 the small one would drown in 1e-7 of round-off.
    assert eigenvalues[1].item() == pytest.approx(1e-12, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_eigenvalues_of_a_broken_kernel_are_nan(value):
    matrix = torch.eye(3)
    matrix[0, 1] = value
    assert kernel_eigenvalues(matrix).isnan().all()


def test_singular_values_of_rotated_spectra():
    wide = rotation(4) @ torch.diag(SPECTRUM) @ rotation(6)[:4]
    values = singular_values(torch.stack([wide, 2 * wide]))
    assert torch.allclose(values[0], SPECTRUM, rtol=0, atol=1e-13)
    assert torch.allclose(values[1], 2 * SPECTRUM, rtol=0, atol=1e-13)
    assert torch.allclose(singular_values(wide.mT[None])[0], SPECTRUM, atol=1e-13)


def test_squared_singular_values_are_eigenvalues_of_the_gram_matrix():
    jacobian = torch.randn(5, 7, dtype=torch.float64)
    squares = singular_values(jacobian[None])[0] ** 2
    assert torch.allclose(squares, kernel_eigenvalues(jacobian @ jacobian.mT))


def test_singular_values_of_broken_jacobians_are_nan_for_those_examples():
    jacobian = torch.eye(2).repeat(3, 1, 1)
    jacobian[1, 0, 0] = torch.nan
    values = singular_values(jacobian)
    assert torch.equal(values[0], torch.ones(2, dtype=torch.float64))
    assert torch.equal(values[2], torch.ones(2, dtype=torch.float64))
    assert values[1].isnan().all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100", 100),
        ("100 B", 100),
        ("2kB", 2000),
        ("1.5MB", 1_500_000),
        ("1 KiB", 1024),
        (" 2GiB ", 2 * 2**30),
        (12345, 12345),
    ],
)
def test_memory_in_bytes_or_words(text, expected):
    assert memory_bytes(text, torch.device("cpu")) == expected


@pytest.mark.parametrize("text", ["", "GiB", "2 gib", "-1GiB", "1e9", "2 GiB free"])
def test_memory_in_words_that_are_not_understood(text):
    with pytest.raises(ValueError, match="not understood"):
        memory_bytes(text, torch.device("cpu"))


@pytest.mark.parametrize("budget", [0, -5, "0", "0.1"])
def test_memory_has_to_be_positive(budget):
    with pytest.raises(ValueError, match="positive"):
        memory_bytes(budget, torch.device("cpu"))


def test_the_default_memory_is_some_of_what_is_free():
    assert 2**20 < memory_bytes(None, torch.device("cpu")) < 2**45
