"""Curvature-weighted kernels against autograd Hessians and the Gauss-Newton matrix."""

import pytest
import torch
from oracles import jacobian_by_loop
from torch import nn
from torch.nn.functional import cross_entropy

from ntk_callbacks.dynamics.gauss_newton import curvature_factor, loss_weighted_kernel
from ntk_callbacks.engine.kernel import empirical_ntk

N, C = 5, 3


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C)).double()


def hessian(f, loss):
    """By autograd, of one example at a time."""
    functions = {
        "mse": lambda z: (z - 1).square().sum() / 2,
        "cross_entropy": lambda z: cross_entropy(z[None], torch.tensor([1])),
    }
    return torch.stack(
        [torch.autograd.functional.hessian(functions[loss], z) for z in f]
    )


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_factor_of_the_hessian(loss):
    f = 3 * torch.randn(N, C, dtype=torch.float64)
    b = curvature_factor(f, loss=loss)
    assert torch.allclose(b @ b.mT, hessian(f, loss), atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_spectrum_is_that_of_the_gauss_newton_matrix(loss):
    model, x = net(), torch.randn(N, 4, dtype=torch.float64)
    with torch.no_grad():
        f = 2 * model(x)
    parts = jacobian_by_loop(model, x).values()
    j = torch.cat([part.reshape(N, C, -1) for part in parts], -1)
    matrix = torch.einsum("nap,nab,nbq->pq", j, hessian(f, loss), j)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[: N * C].clamp(min=0)
    kernel = loss_weighted_kernel(empirical_ntk(model, x), f, loss=loss)
    found = torch.linalg.eigvalsh(kernel).flip(0)
    assert torch.allclose(found, expected, atol=1e-10 * expected[0])
    assert torch.equal(kernel, kernel.mT)


def test_confident_outputs_have_no_curvature():
    f = torch.tensor([[800.0, 0.0, 0.0]])
    b = curvature_factor(f, loss="cross_entropy")
    assert b.isfinite().all()
    assert (b @ b.mT).abs().max() < 1e-12


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"\(2, 2\) for outputs \(2, 3\).*\(2, 2, 3"):
        loss_weighted_kernel(torch.eye(2), torch.ones(2, 3))
