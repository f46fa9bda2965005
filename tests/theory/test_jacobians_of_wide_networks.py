"""Input-output Jacobians of real networks, n = 400, against theory."""

import pytest
import torch
from jacobian_spectra import measured, network
from torch import nn

from ntk_callbacks import input_singular_values
from ntk_callbacks.theory import (
    CriticalPoint,
    critical_point,
    gaussian_second_moment,
    jacobian_moments,
    mean_field,
)


class Erf(nn.Module):
    def forward(self, x):
        return x.erf()


CASES = [
    ("tanh", nn.Tanh, 0.01, 4),
    ("tanh", nn.Tanh, 0.01, 16),
    ("erf", Erf, 0.01, 4),
    ("erf", Erf, 0.01, 16),
    ("hard_tanh", nn.Hardtanh, 0.05, 4),
    ("hard_tanh", nn.Hardtanh, 0.05, 16),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
def test_spectra_of_wide_networks(case, weights):
    name, module, b2, depth = case
    point = critical_point(name, b2**0.5)
    expected = jacobian_moments(name, point.sigma_w.item(), b2**0.5, depth, weights)
    found = measured(depth, module, point, weights)
    scatter = (1.2 if weights == "gaussian" else 0.5) * (depth / 400) ** 0.5
    mean, spread, largest = found.mean(0)
    assert abs(mean - expected.mean) < 4 * scatter / 6**0.5
    assert spread.item() == pytest.approx(expected.variance.item(), rel=0.1)
    # The mean scatters from draw to draw, and the largest value with it. What the
    # width takes off the edge grows with L/n; it is least for orthogonal weights.
    allowed = 0.2 if (weights, depth) == ("gaussian", 16) else 0.08
    edge = expected.maximum.item()
    assert (largest / mean).item() == pytest.approx(edge, rel=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("sigma_w", [1.2, 2.0])
@pytest.mark.parametrize("depth", [5, 10])
def test_mean_of_wide_networks_off_criticality(sigma_w, depth):
    """χ^L in the ordered and in the chaotic phase, n = 400, 6 seeds."""
    field = mean_field("tanh", sigma_w, 0.05**0.5)
    point = CriticalPoint(torch.tensor(sigma_w), torch.tensor(0.05**0.5), field.q)
    expected = jacobian_moments("tanh", sigma_w, 0.05**0.5, depth).mean
    found = measured(depth, nn.Tanh, point, "gaussian")[:, 0].mean()
    scatter = 1.2 * (depth / 400) ** 0.5
    assert abs(found / expected - 1) < 4 * scatter / 6**0.5


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 4, 16])
def test_spectra_of_wide_linear_networks(depth):
    point = critical_point("linear", 0.0)
    found = measured(depth, nn.Identity, point, "gaussian")
    expected = jacobian_moments("linear", 1.0, 0.0, depth)
    assert abs(found[:, 0].mean() - 1) < 4 * 1.2 * (depth / 400) ** 0.5 / 6**0.5
    # Finite width takes 12 % off the edge at depth 16 and n = 400, 4 % at depth 4.
    edge = found[:, 2].mean().item()
    assert edge == pytest.approx(
        expected.maximum.item(), rel=0.2 if depth > 4 else 0.06
    )
    exact = gaussian_second_moment(400, depth) - 1
    assert found[:, 1].mean().item() == pytest.approx(exact, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "n"), [(4, 400), (8, 800)])
def test_edge_of_wide_orthogonal_relu_networks(depth, n):
    """Within 5 %. At n = 400 and depth 8 finite width takes off 4.7 % (40 seeds)."""
    point = critical_point("relu", 0.0)
    found = measured(depth, nn.ReLU, point, "orthogonal", n=n)
    mean, spread, largest = found.mean(0)
    expected = jacobian_moments("relu", 2**0.5, 0.0, depth, "orthogonal")
    assert largest / mean == pytest.approx(expected.maximum.item(), rel=0.05)
    assert spread == pytest.approx(expected.variance.item(), rel=0.1)
    # s_max² itself scatters with the mean, by √(L/n) from draw to draw.
    if depth == 4:
        assert largest == pytest.approx(expected.maximum.item(), rel=0.05)


def test_orthogonal_linear_networks_are_isometries():
    point = critical_point("linear", 0.0)
    generator = torch.Generator().manual_seed(0)
    net = network(32, 400, nn.Identity, point, "orthogonal", generator)
    s = input_singular_values(net, torch.zeros(1, 400, dtype=torch.float64))
    assert (s - 1).abs().max() < 1e-12
