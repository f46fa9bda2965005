"""Moments and edges of input-output Jacobians: tables, closed forms, real networks."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from ntk_callbacks import input_singular_values
from ntk_callbacks.theory import (
    CriticalPoint,
    critical_point,
    fuss_catalan_moments,
    gaussian_second_moment,
    gaussian_squared_mean,
    jacobian_moments,
    mean_field,
)
from ntk_callbacks.theory.slopes import squared_slopes

# σ_b² at which each activation is critical here, and μ₂/μ₁² − 1 there: an independent
# numpy/scipy implementation.
SPREAD = {
    "tanh": (0.01, 0.15254),
    "erf": (0.01, 0.157171),
    "hard_tanh": (0.05, 0.165545),
}
# s_max² of ReLU with orthogonal weights and of hard tanh, depth 16, at σ_b² = 0.05.
ORTHOGONAL_EDGES = {
    4: 9.481481481481481,
    8: 20.371997576325686,
    16: 42.1260594836467,
}
# Depth: m₁ … m₄, exact E (1/n) tr (J Jᵀ)² at n = 64, 100 and 256.
LINEAR = {
    1: ([1, 2, 5, 14], [2.015625, 2.010000, 2.003906]),
    2: ([1, 3, 12, 55], [3.047607, 3.030300, 3.011765]),
    4: ([1, 5, 35, 285], [5.163670, 5.103025, 5.039522]),
    8: ([1, 9, 117, 1785], [9.626511, 9.385844, 9.144508]),
    16: ([1, 17, 425, 12529], [19.672754, 18.576608, 17.563103]),
}


def bernoulli_edge(p, depth):
    """s_max² of orthogonal layers that let a share p of units through, σ_w² p = 1."""
    z = p / (depth * (1 - p) - 1)
    return 1 / (p**depth * z * (1 + z) ** (depth - 1) / (z + p) ** depth)


def haar(gaussian):
    """A uniform orthogonal matrix: the signs that qr leaves are not uniform.

    Mezzadri 2007, arXiv:math-ph/0609050. Its diagonal would be negative on average, and
    ReLU would let fewer than half of the units through.
    """
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def network(depth, n, activation, point, weights, generator):
    """Layers φ(·) then W, b, so that the input is the first pre-activation."""
    layers = []
    for _ in range(depth):
        linear = nn.Linear(n, n, dtype=torch.float64)
        w = torch.randn(n, n, dtype=torch.float64, generator=generator)
        w = haar(w) if weights == "orthogonal" else w / n**0.5
        b = torch.randn(n, dtype=torch.float64, generator=generator)
        linear.weight.data, linear.bias.data = point.sigma_w * w, point.sigma_b * b
        layers += [activation(), linear]
    return nn.Sequential(*layers)


def measured(depth, activation, point, weights, *, n=400, seeds=6):
    """Mean, variance over mean², and largest s² of each seed."""
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        net = network(depth, n, activation, point, weights, generator)
        x = torch.randn(1, n, dtype=torch.float64, generator=generator)
        squares = input_singular_values(net, point.q.sqrt() * x)[0] ** 2
        mean = squares.mean()
        spread = squares.var(unbiased=False) / mean**2
        found.append(torch.stack([mean, spread, squares.max()]))
    return torch.stack(found)


# Products of Gaussian matrices.


@pytest.mark.parametrize("depth", LINEAR)
def test_linear_gaussian_networks(depth):
    moments, _ = LINEAR[depth]
    assert fuss_catalan_moments(depth, 4).tolist() == moments
    found = jacobian_moments("linear", 1.0, 0.0, depth)
    assert found.mean.item() == pytest.approx(1, rel=1e-12)
    assert found.variance.item() == pytest.approx(depth, rel=1e-12)
    edge = (depth + 1) ** (depth + 1) / depth**depth
    assert found.maximum.item() == pytest.approx(edge, rel=1e-12)


@pytest.mark.parametrize("depth", LINEAR)
def test_second_moment_at_finite_width(depth):
    found = [gaussian_second_moment(n, depth) for n in (64, 100, 256)]
    assert found == pytest.approx(LINEAR[depth][1], abs=6e-7)
    wide = gaussian_second_moment(10**7, depth)
    assert wide == pytest.approx(LINEAR[depth][0][1], rel=1e-5)


@pytest.mark.parametrize(
    ("depth", "at_64", "at_256"),
    [
        (1, 1.00048828125, 1.000030517578125),
        (2, 1.0014724731445312, 1.0000916719436646),
        (4, 1.0049609038978815, 1.0003063748681598),
        (8, 1.0182652559570067, 1.0011088235653387),
        (16, 1.0725071783138913, 1.0042348350217722),
    ],
)
def test_squared_mean_at_finite_width(depth, at_64, at_256):
    """How the mean square singular value itself scatters: numpy, all digits."""
    assert gaussian_squared_mean(64, depth) == pytest.approx(at_64, rel=1e-14)
    assert gaussian_squared_mean(256, depth) == pytest.approx(at_256, rel=1e-14)


def test_second_moment_of_small_products_by_sampling():
    """n = 3, L = 2: 100 000 products, within 4 standard errors."""
    w = torch.randn(2, 100_000, 3, 3, dtype=torch.float64) / 3**0.5
    j = w[0] @ w[1]
    squares = (j @ j.mT).square().sum((1, 2)) / 3
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - gaussian_second_moment(3, 2)) < 4 * error
    means = (j.square().sum((1, 2)) / 3).square()
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - gaussian_squared_mean(3, 2)) < 4 * error


# Edges.


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


# Moments.


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("depth", [4, 16])
def test_moments_at_criticality(name, depth):
    b2, spread = SPREAD[name]
    sigma_w = critical_point(name, b2**0.5).sigma_w.item()
    for weights, more in (("gaussian", 1), ("orthogonal", 0)):
        found = jacobian_moments(name, sigma_w, b2**0.5, depth, weights)
        assert found.mean.item() == pytest.approx(1, abs=1e-12)
        expected = depth * (spread + more)
        assert found.variance.item() == pytest.approx(expected, abs=6e-7 * depth)


def test_moments_off_criticality():
    """Tanh, σ_b² = 0.05: χ^L as tabulated."""
    for sigma_w, depth, mean in [
        (1.2, 5, 0.667805),
        (1.2, 10, 0.445963),
        (2.0, 5, 4.359269),
        (2.0, 10, 19.003222),
    ]:
        found = jacobian_moments("tanh", sigma_w, 0.05**0.5, depth)
        assert found.mean.item() == pytest.approx(mean, abs=1e-6 * (1 + mean))
        chi = mean_field("tanh", sigma_w, 0.05**0.5).chi
        assert found.mean.item() == pytest.approx(chi.item() ** depth, rel=1e-12)


def test_moments_of_silent_and_of_exploding_networks():
    found = jacobian_moments("tanh", 0.0, 0.1, 3)
    assert found.mean == found.variance == found.maximum == 0
    found = jacobian_moments("tanh", 2.0, 0.1, 3000)
    assert found.mean == found.maximum == torch.inf
    # The variance diverges, the slopes do not.
    assert jacobian_moments("relu", 2.0, 0.1, 2).mean.item() == pytest.approx(4)


def test_slopes_have_the_moments_of_their_activation():
    for name in ("tanh", "gelu", "hard_tanh"):
        slopes = squared_slopes(name, 0.7, panels=2)
        assert slopes.weights.sum().item() == pytest.approx(1, abs=1e-12)
        from ntk_callbacks.theory import moment

        for k in (1, 2, 3):
            expected = moment(name, 0.7, power=2 * k, derivative=1)
            assert slopes.moment(k).item() == pytest.approx(expected.item(), rel=1e-9)


# Finite networks, n = 400, 6 seeds.


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


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tanh", -1.0, 0.0, 2), "sigma_w is -1.0"),
        (("tanh", 1.0, math.nan, 2), "sigma_b is nan"),
        (("tanh", 1.0, 0.0, 0), "depth is 0, expected a whole number of at least 1"),
        (("tan", 1.0, 0.0, 2), "activation is 'tan', expected one of"),
        ((lambda x: x**2, 2.0, 0.5, 2), "diverges"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jacobian_moments(*arguments)


def test_other_bad_arguments_are_refused():
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError), match="uniform"):
        jacobian_moments("tanh", 1.0, 0.0, 2, "uniform")
    with pytest.raises(ValueError, match="depth is 0"):
        fuss_catalan_moments(0, 3)
    for function in (gaussian_second_moment, gaussian_squared_mean):
        with pytest.raises(ValueError, match="width is 0"):
            function(0, 3)
