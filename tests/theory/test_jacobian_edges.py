"""Edges of the spectra of input-output Jacobians, against closed forms."""

from itertools import pairwise

import pytest
import torch
from jacobian_spectra import bernoulli_edge

from ntk_callbacks.theory import critical_point, jacobian_moments

# s_max² of ReLU with orthogonal weights and of hard tanh, depth 16, at σ_b² = 0.05.
ORTHOGONAL_EDGES = {
    4: 9.481481481481481,
    8: 20.371997576325686,
    16: 42.1260594836467,
}


@pytest.mark.parametrize("depth", ORTHOGONAL_EDGES)
def test_edge_of_orthogonal_relu_networks(depth):
    found = jacobian_moments("relu", 2**0.5, 0.0, depth, "orthogonal").maximum
    assert found.item() == pytest.approx(ORTHOGONAL_EDGES[depth], rel=1e-12)
    assert found.item() == pytest.approx(bernoulli_edge(0.5, depth), rel=1e-12)


def test_edge_of_32_orthogonal_relu_layers():
    found = jacobian_moments("relu", 2**0.5, 0.0, 32, "orthogonal").maximum
    assert found.item() == pytest.approx(85.622282, abs=6e-7)


def test_edge_of_orthogonal_hard_tanh_networks():
    point = critical_point("hard_tanh", 0.05**0.5)
    sigma_w = point.sigma_w.item()
    found = jacobian_moments("hard_tanh", sigma_w, 0.05**0.5, 16, "orthogonal").maximum
    assert found.item() == pytest.approx(6.9737, abs=5e-5)
    edge = bernoulli_edge(1 / sigma_w**2, 16)
    assert found.item() == pytest.approx(edge, rel=1e-9)


@pytest.mark.parametrize("p", [0.75, 0.9])
def test_edge_where_a_share_of_units_is_let_through(p):
    """Hard tanh at the variance where P(|u| < 1) = p; σ_w scales s² by σ_w^{2L}."""
    root = torch.tensor(0.5 + p / 2, dtype=torch.float64)
    q = 1 / (2**0.5 * torch.erfinv(2 * root - 1)) ** 2
    sigma_w = p**-0.5
    from ntk_callbacks.theory import critical_line

    line = critical_line("hard_tanh", q)
    assert line.sigma_w.item() == pytest.approx(sigma_w, rel=1e-9)
    # Depth and s_max² of an independent implementation.
    table = {
        0.75: {8: 6.790666, 16: 14.04202, 32: 28.540761},
        0.9: {16: 4.680673, 32: 9.513587},
    }
    for depth, edge in table[p].items():
        found = jacobian_moments(
            "hard_tanh", sigma_w, line.sigma_b.item(), depth, "orthogonal"
        )
        assert found.maximum.item() == pytest.approx(edge, rel=1e-5)


def test_edge_of_one_layer_is_its_steepest_unit():
    for name, slope in [
        ("tanh", 1.0),
        ("hard_tanh", 1.0),
        ("relu", 1.0),
        ("gelu", 1.2740),
    ]:
        found = jacobian_moments(name, 1.1, 0.3, 1, "orthogonal").maximum
        assert found.item() == pytest.approx(1.21 * slope, rel=1e-3)


def test_edge_when_most_units_let_everything_through():
    """A share p > 1 − 1/L of units leaves directions that no layer touches."""
    found = jacobian_moments("hard_tanh", 0.8, 0.2, 3, "orthogonal").maximum
    assert found.item() == pytest.approx(0.8**6, rel=1e-9)


def test_edge_of_unbounded_slopes_is_infinite():
    assert jacobian_moments(lambda x: x**3, 0.1, 0.1, 2).maximum == torch.inf
    assert jacobian_moments("softplus", 0.5, 0.1, 2).maximum.isfinite()


@pytest.mark.parametrize("weights", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "hard_tanh"])
def test_edge_bounds_the_moments_and_grows_with_depth(name, weights):
    """s_max² ≥ m₂/m₁, and does not depend on how φ' is sampled."""
    edges = []
    for depth in (1, 2, 5, 20):
        found = jacobian_moments(name, 1.0, 0.2, depth, weights)
        second = found.variance + found.mean**2
        assert found.maximum >= second / found.mean * (1 - 1e-12)
        edges.append(found.maximum / found.mean)
    assert all(a < b for a, b in pairwise(edges))


def test_edge_of_rescaled_activations():
    """c φ with σ_w/c is the same layer."""
    for weights in ("gaussian", "orthogonal"):
        one = jacobian_moments("tanh", 1.4, 0.2, 5, weights)
        other = jacobian_moments(lambda x: 4 * x.tanh(), 0.35, 0.2, 5, weights)
        for part in ("mean", "variance", "maximum"):
            assert getattr(one, part).item() == pytest.approx(
                getattr(other, part).item(), rel=1e-9
            )
