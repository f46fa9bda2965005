"""Eigenpairs of a kernel from products alone, against dense answers."""

import pytest
import torch
from networks import mlp
from operators import MODELS, kernel_and_operator, moments, operator_of, power_law
from oracles import ntk_by_loop, relative_error
from torch import nn

from ntk_callbacks import as_matrix
from ntk_callbacks.engine.density import spectral_density
from ntk_callbacks.engine.matrix_free import top_eigenpairs, trace_estimate
from ntk_callbacks.engine.products import TangentOperator


class Counted:
    """An operator that counts the products taken with it."""

    def __init__(self, operator):
        self.operator, self.columns = operator, 0
        whole = operator.ntk_vp

        def counted(u):
            self.columns += 1 if u.ndim == 1 else u.shape[1]
            return whole(u)

        operator.ntk_vp = counted


@pytest.mark.parametrize("name", MODELS)
def test_eigenpairs_are_those_of_the_kernel(name):
    kernel, operator = kernel_and_operator(name)
    expected = torch.linalg.eigvalsh(kernel).flip(0)
    for k in (1, 3, len(kernel)):
        found = top_eigenpairs(operator, k, tolerance=1e-9)
        assert found.converged
        # Round-off is relative to the largest one.
        assert (found.eigenvalues - expected[:k]).abs().max() < 1e-9 * expected[0]
        error = kernel @ found.eigenvectors - found.eigenvectors * found.eigenvalues
        assert error.norm(dim=0).max() < 2e-9 * expected[0]
        assert torch.allclose(found.residuals, error.norm(dim=0), atol=1e-12)
        gram = found.eigenvectors.mT @ found.eigenvectors
        assert torch.allclose(gram, torch.eye(k).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_spectra_from_fewer_products_than_columns(exponent, k, dtype):
    spectrum = power_law(200, exponent)
    operator = operator_of(spectrum, dtype=dtype)
    count = Counted(operator)
    found = top_eigenpairs(operator, k)
    assert found.converged
    # The tolerance bounds the residual; the error of λ is of second order in it. Below,
    # round-off of the largest eigenvalue.
    allowed = 1e-5 * spectrum[:k] + 8 * torch.finfo(dtype).eps * spectrum[0]
    assert ((found.eigenvalues - spectrum[:k]).abs() < allowed).all()
    assert found.eigenvalues.dtype == torch.float64
    assert found.eigenvectors.dtype == dtype
    assert count.columns <= 10 * k


@pytest.mark.parametrize("k", [1, 5, 12, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_copy_of_a_multiple_eigenvalue_is_missed(k, dtype):
    # Θ = X Xᵀ ⊗ I: every eigenvalue ten times. Iterations on one vector find some of
    # the copies and go on to smaller eigenvalues.
    spectrum = power_law(20, 1.0)
    found = top_eigenpairs(operator_of(spectrum, c=10, dtype=dtype), k)
    expected = spectrum.repeat_interleave(10)[:k]
    assert found.converged
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "spectrum",
    [[5.0] * 6, [3.0] + [0.0] * 5, [0.0] * 6],
    ids=["identity", "rank one", "zero"],
)
def test_degenerate_kernels(spectrum):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    found = top_eigenpairs(operator_of(spectrum), 4)
    assert found.converged
    assert torch.allclose(found.eigenvalues, spectrum[:4], rtol=0, atol=1e-12)
    gram = found.eigenvectors.mT @ found.eigenvectors
    assert torch.allclose(gram, torch.eye(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-4, 0.0])
@pytest.mark.parametrize(
    "spectrum",
    [[5.0, 4.0, 3.0, 2.0, 1.0] + [1e-3] * 35, [100 * 2.0**-i for i in range(40)]],
    ids=["cluster", "geometric"],
)
def test_vectors_stay_orthonormal_when_residuals_are_dependent(spectrum, tolerance):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    found = top_eigenpairs(operator_of(spectrum), 4, tolerance=tolerance)
    assert found.converged
    assert torch.allclose(found.eigenvalues, spectrum[:4], rtol=1e-7)
    gram = found.eigenvectors.mT @ found.eigenvectors
    assert torch.allclose(gram, torch.eye(4).double(), rtol=0, atol=1e-13)


def test_a_kernel_of_one_number():
    operator = TangentOperator(nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]]))
    found = top_eigenpairs(operator, 1)
    assert found.eigenvalues.item() == pytest.approx(25)
    assert found.eigenvectors.abs().item() == pytest.approx(1)
    assert found.converged


def test_too_few_products_are_said_not_to_converge():
    spectrum = power_law(200, 0.5)
    operator = operator_of(spectrum)
    count = Counted(operator)
    found = top_eigenpairs(operator, 4, max_products=10)
    assert count.columns == 10
    assert not found.converged
    assert found.residuals.max() > 1e-4 * spectrum[0]
    # The residual still bounds the distance to some eigenvalue.
    for value, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert (spectrum - value).abs().min() <= residual


def test_a_tighter_tolerance_gives_smaller_residuals():
    operator = operator_of(power_law(100, 0.5))
    loose = top_eigenpairs(operator, 3, tolerance=1e-2)
    tight = top_eigenpairs(operator, 3, tolerance=1e-8)
    assert tight.residuals.max() < 1e-8 * tight.eigenvalues[0]
    assert loose.residuals.max() > 1e-6 * loose.eigenvalues[0]


@pytest.mark.slow
def test_scaling_is_part_of_the_kernel():
    net, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    scaling = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    kernel = as_matrix(ntk_by_loop(net, x, scaling=scaling))
    operator = TangentOperator(net, x, scaling=scaling)
    top = top_eigenpairs(operator, 1, tolerance=1e-9).eigenvalues[0]
    assert relative_error(top, torch.linalg.eigvalsh(kernel)[-1]) < 1e-9
    assert trace_estimate(operator).value == pytest.approx(kernel.trace().item())
    density = spectral_density(operator, samples=64)
    spread = 2 * ((kernel**2).sum() - (kernel.diag() ** 2).sum())
    error = (spread / 64).sqrt().item() / 10
    assert abs(moments(density, [1])[0] - kernel.trace().item() / 10) < 4 * error
    assert error < 0.1 * kernel.trace().item() / 10
