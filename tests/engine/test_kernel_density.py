"""The density of eigenvalues from products alone, against dense answers."""

import math

import pytest
import torch
from one_of_a_kind import quick
from operators import kernel_and_operator, moments, operator_of, power_law
from oracles import relative_error
from torch import nn

from ntk_callbacks.engine.density import spectral_density
from ntk_callbacks.engine.products import TangentOperator


@pytest.mark.parametrize(
    "name", quick(["mlp", "resnet_train", "gru", "tied_weights"], "mlp")
)
def test_moments_are_those_of_the_eigenvalues(name):
    kernel, operator = kernel_and_operator(name)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    density = spectral_density(operator, samples=400 // len(kernel))
    assert density.weights.sum().item() == pytest.approx(1)
    # zᵀΘ^q z / m has the variance 2 (Σ_{i≠j} (Θ^q)ᵢⱼ²) / m² over random signs.
    for order, found in zip((1, 2, 3), moments(density, (1, 2, 3)), strict=True):
        power = torch.linalg.matrix_power(kernel, order)
        spread = 2 * ((power**2).sum() - (power.diag() ** 2).sum())
        error = (spread / (400 // len(kernel))).sqrt().item() / len(kernel)
        assert abs(found - (eigenvalues**order).mean().item()) < 4 * error + 1e-12


def test_moments_of_one_vector_are_exact():
    """Gauss quadrature with q nodes: 2q − 1 moments of the measure of that vector."""
    spectrum = power_law(50, 0.5)
    operator = operator_of(spectrum)
    identity = torch.eye(50, dtype=torch.float64)
    kernel = operator.ntk_vp(identity)
    density = spectral_density(operator, samples=1, steps=5, seed=3)
    generator = torch.Generator().manual_seed(3)
    z = (torch.randint(2, (50,), generator=generator) * 2 - 1).double()
    for order, found in zip(range(10), moments(density, range(10)), strict=True):
        expected = (z @ torch.linalg.matrix_power(kernel, order) @ z).item() / 50
        assert found == pytest.approx(expected, rel=1e-9)
    next_one = (z @ torch.linalg.matrix_power(kernel, 10) @ z).item() / 50
    assert moments(density, [10])[0] != pytest.approx(next_one, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0.001, 0.01, 0.2, 1.0])
def test_the_density_integrates_to_one(dtype, width):
    operator = operator_of(power_law(60, 1.0), dtype=dtype)
    density = spectral_density(operator, width=width, samples=2)
    assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1)
    assert (density.density >= 0).all()
    assert density.grid.diff().min() > 0
    assert density.nodes.diff().min() >= 0
    # Smoothing keeps the mean and adds the variance of a Gaussian.
    first, second = (
        torch.trapezoid(density.density * density.grid**order, density.grid).item()
        for order in (1, 2)
    )
    mean, square = moments(density, [1, 2])
    added = (width * (density.nodes[-1] - density.nodes[0]).item()) ** 2
    assert first == pytest.approx(mean, rel=1e-3)
    assert second == pytest.approx(square + added, rel=1e-3)
    assert second - first**2 - (square - mean**2) == pytest.approx(added, rel=0.05)


def test_clusters_have_their_shares():
    spectrum = torch.tensor([10.0] * 5 + [4.0] * 15 + [1.0] * 30)
    density = spectral_density(operator_of(spectrum), samples=64, width=0.02)
    step = (density.grid[1] - density.grid[0]).item()
    for value, share in ((10, 0.1), (4, 0.3), (1, 0.6)):
        near = (density.grid - value).abs() < 1
        # The share of a cluster of r of m has the variance 2 r/m² at most, for each of
        # the 64 vectors: a standard error below 0.02.
        assert density.density[near].sum().item() * step == pytest.approx(
            share, abs=0.05
        )
        heavy = (density.nodes - value).abs() < 1e-6
        assert density.weights[heavy].sum().item() == pytest.approx(share, abs=0.05)
    between = (density.grid - 7).abs() < 1
    assert density.density[between].max() < 1e-6


@pytest.mark.slow
def test_a_semicircle_like_bulk_is_seen():
    """Marchenko–Pastur: the spectrum of X Xᵀ for random X is known in closed form."""
    n, d = 300, 600
    model = nn.Linear(d, 1, bias=False).double()
    x = torch.randn(n, d, dtype=torch.float64) / math.sqrt(d)
    density = spectral_density(
        TangentOperator(model, x), samples=10, steps=40, width=0.03
    )
    ratio = n / d
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    inside = (density.grid > low + 0.2) & (density.grid < high - 0.3)
    grid = density.grid[inside]
    root = ((high - grid) * (grid - low)).sqrt()
    expected = root / (2 * math.pi * ratio * grid)
    # Ten vectors and a finite matrix: a few per cent.
    assert relative_error(density.density[inside], expected) < 0.08


@pytest.mark.parametrize(
    ("spectrum", "mean"), [([3.0] * 4, 3), ([0.0] * 4, 0), ([2.0], 2)]
)
def test_densities_of_a_single_eigenvalue(spectrum, mean):
    density = spectral_density(operator_of(torch.tensor(spectrum)))
    assert torch.allclose(density.nodes, torch.full_like(density.nodes, mean))
    assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1)
    assert density.grid[density.density.argmax()].item() == pytest.approx(mean, abs=0.1)
