"""Moments of input-output Jacobians: tables, closed forms, sampling."""

import math

import pytest
import torch

from ntk_callbacks.theory import (
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

# Depth: m₁ … m₄, exact E (1/n) tr (J Jᵀ)² at n = 64, 100 and 256.
LINEAR = {
    1: ([1, 2, 5, 14], [2.015625, 2.010000, 2.003906]),
    2: ([1, 3, 12, 55], [3.047607, 3.030300, 3.011765]),
    4: ([1, 5, 35, 285], [5.163670, 5.103025, 5.039522]),
    8: ([1, 9, 117, 1785], [9.626511, 9.385844, 9.144508]),
    16: ([1, 17, 425, 12529], [19.672754, 18.576608, 17.563103]),
}


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
