"""Kernel regression against least squares in the space of parameters."""

import json
from pathlib import Path

import pytest
import torch
from feature_models import features, kernel

from ntk_callbacks import as_matrix
from ntk_callbacks.dynamics import kernel_regression

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "linear_dynamics.json").read_text()
)


def problem(n=5, c=2, p=30, n_test=3):
    y = torch.randn(n, c, dtype=torch.float64)
    return features(n, c, p), features(n_test, c, p), y


def fit(phi, y, ridge):
    """θ = argmin ½‖Φθ − y‖² + ½ ridge ‖θ‖², as one stacked least-squares problem."""
    flat = phi.flatten(0, 1)
    penalty = ridge**0.5 * torch.eye(flat.shape[1], dtype=flat.dtype)
    target = torch.cat([y.flatten(), torch.zeros(flat.shape[1], dtype=flat.dtype)])
    return torch.linalg.pinv(torch.cat([flat, penalty])) @ target


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3, 100.0])
@pytest.mark.parametrize("p", [30, 6], ids=["wide", "singular"])
def test_least_squares_in_the_space_of_parameters(ridge, p):
    phi, phi_test, y = problem(p=p)
    found = kernel_regression(kernel(phi, phi), y, kernel(phi_test, phi), ridge=ridge)
    expected = phi_test @ fit(phi, y, ridge)
    # With a small ridge a singular kernel has the condition number 1e6.
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_the_limit_of_gradient_flow_in_the_table():
    ntk, y, ntk_test, f0, f0_test = (
        torch.tensor(TABLE[name], dtype=torch.float64)
        for name in ("ntk", "y", "ntk_test", "f0", "f0_test")
    )
    found = kernel_regression(ntk, y, ntk_test, f0=f0, f0_test=f0_test)
    # 0.45191617: eight decimals in the list of numbers this is taken from.
    assert found.item() == pytest.approx(0.45191617, abs=1e-8)


def test_training_points_are_fitted():
    phi, _, y = problem()
    ntk = kernel(phi, phi)
    assert torch.allclose(kernel_regression(ntk, y, ntk), y, rtol=0, atol=1e-12)


def test_layouts():
    phi, phi_test, y = problem()
    ntk, cross = kernel(phi, phi), kernel(phi_test, phi)
    full = kernel_regression(ntk, y, cross)
    assert full.shape == (3, 2)
    matrix = kernel_regression(as_matrix(ntk), y, as_matrix(cross))
    assert torch.equal(matrix, full)
    flat = kernel_regression(as_matrix(ntk), y.flatten(), as_matrix(cross))
    assert torch.equal(flat, full.flatten())
    assert torch.equal(kernel_regression(ntk, y.flatten(), cross), full.flatten())
    # One observable: a row for each, which cannot be split over two outputs.
    alone = kernel_regression(as_matrix(ntk), y, as_matrix(cross)[:3])
    assert torch.allclose(alone, full.flatten()[:3], rtol=0, atol=1e-14)
    shared = kernel_regression(ntk[:, :, 0, 0], y, cross[:, :, 0, 0])
    assert shared.shape == (3, 2)
    for k in range(2):
        one = kernel_regression(ntk[:, :, 0, 0], y[:, k], cross[:, :, 0, 0])
        assert torch.allclose(shared[:, k], one, rtol=0, atol=1e-13)
    assert kernel_regression(ntk, y, cross[:0]).shape == (0, 2)
    diagonal = ntk.diagonal(dim1=2, dim2=3)
    independent = kernel_regression(diagonal, y, cross.diagonal(dim1=2, dim2=3))
    assert independent.shape == (3, 2)
    assert torch.allclose(independent[:, 0], shared[:, 0], rtol=0, atol=1e-12)


def test_an_invisible_target_predicts_zero():
    """Two equal inputs with opposite targets: the least-norm answer is their mean."""
    ntk, y = torch.ones(2, 2).double(), torch.tensor([1.0, -1.0]).double()
    assert kernel_regression(ntk, y, ntk).abs().max() < 1e-15
    assert torch.equal(kernel_regression(ntk * 0, y, ntk), torch.zeros(2).double())


def test_a_ridge_below_round_off_is_none():
    ntk, y = torch.ones(2, 2).double(), torch.tensor([1.0, -1.0]).double()
    found = kernel_regression(ntk, y + 3, ntk, ridge=1e-20)
    assert torch.allclose(found, torch.full((2,), 3.0).double(), rtol=0, atol=1e-14)


def test_a_float32_kernel_is_singular_at_the_round_off_of_float32():
    phi, phi_test, y = problem(p=6)
    found = kernel_regression(
        kernel(phi, phi).float(), y.float(), kernel(phi_test, phi).float()
    )
    expected = phi_test @ fit(phi, y, 0.0)
    # Without a cut-off at float32 the null directions would give errors of order 1.
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)
