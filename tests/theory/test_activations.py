"""Gaussian expectations of one argument against closed forms, tables and sums."""

import math

import pytest
import torch
from gaussian_sums import SMOOTH, TWINS, VARIANCES, slope, trapezoid

from ntk_callbacks.theory import curvature_moment, moment, pair_moment
from ntk_callbacks.theory.activations import ACTIVATIONS


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("derivative", [0, 1])
@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_closed_moments_are_what_quadrature_finds(name, power, derivative):
    closed = moment(name, VARIANCES, power=power, derivative=derivative)
    found = moment(TWINS[name], VARIANCES, power=power, derivative=derivative)
    size = moment(TWINS[name], VARIANCES, power=2 * power, derivative=derivative)
    assert ((closed - found).abs() <= 1e-12 * size.sqrt()).all()


@pytest.mark.parametrize("name", TWINS)
def test_closed_curvatures_are_what_integration_by_parts_finds(name):
    closed, found = (curvature_moment(a, VARIANCES[1:]) for a in (name, TWINS[name]))
    assert torch.allclose(closed, found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("q", [0.05, 0.7, 3.0])
def test_smooth_moments_are_sums_on_a_grid(name, q):
    phi, root = ACTIVATIONS[name], math.sqrt(q)
    for power in (1, 2, 4):
        expected = trapezoid(lambda z, p=power: phi(root * z) ** p)
        assert moment(name, q, power=power).item() == pytest.approx(expected, rel=1e-12)
        expected = trapezoid(lambda z, p=power: slope(phi)(root * z) ** p)
        found = moment(name, q, power=power, derivative=1).item()
        assert found == pytest.approx(expected, rel=1e-12)
    curvature = trapezoid(lambda z: phi(root * z) * slope(slope_of(phi))(root * z))
    assert curvature_moment(name, q).item() == pytest.approx(curvature, abs=1e-11)


def slope_of(phi):
    """φ' as a function that can be differentiated again."""

    def derivative(x):
        return torch.autograd.grad(phi(x).sum(), x, create_graph=True)[0]

    return derivative


@pytest.mark.parametrize("q", [1e-4, 0.3, 1.0, 25.0, 1e4])
def test_hard_tanh(q):
    """Truncated Gaussian moments, by hand."""
    inside = math.erf(1 / math.sqrt(2 * q))
    density = math.exp(-1 / (2 * q)) / math.sqrt(2 * math.pi * q)
    square = q * inside - 2 * q * density + 1 - inside
    assert moment("hard_tanh", q).item() == pytest.approx(square, rel=1e-10)
    for power in (1, 2, 4):
        found = moment("hard_tanh", q, power=power, derivative=1).item()
        assert found == pytest.approx(inside, rel=1e-12)
    # φ'' is a point mass −1 at 1 and +1 at −1, where φ is ±1.
    found = curvature_moment("hard_tanh", q).item()
    assert found == pytest.approx(-2 * density, abs=1e-12)


# numpy quadrature, 6 to 8 digits: σ_b², critical σ_w², q*, E φ'⁴/(E φ'²)² − 1.
CRITICAL = """
tanh 0.0001 1.08602629 0.04570908 0.011463
tanh 0.05 1.76095464 0.57004788 0.342256
tanh 0.25 2.40148924 1.31793900 0.741561
tanh 1.0 3.44321091 3.03639639 1.425778
erf 0.0001 0.85258761 0.04460376 0.011662
erf 0.05 1.37583901 0.51717684 0.353889
erf 1.0 2.71838135 2.74489093 1.500134
hard_tanh 0.0001 1.00121110 0.09546017 0.001211
hard_tanh 0.05 1.16554469 0.46386397 0.165545
hard_tanh 1.0 2.07270860 2.38780978 1.072709
"""


@pytest.mark.parametrize("row", CRITICAL.split("\n")[1:-1])
def test_critical_line_tables(row):
    name, *numbers = row.split()
    sigma_b2, sigma_w2, q, spread = map(float, numbers)
    slope2 = moment(name, q, derivative=1).item()
    assert sigma_w2 * slope2 == pytest.approx(1, abs=1e-7)
    assert sigma_w2 * moment(name, q).item() + sigma_b2 == pytest.approx(q, abs=1e-7)
    fourth = moment(name, q, power=4, derivative=1).item()
    assert fourth / slope2**2 - 1 == pytest.approx(spread, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "sigma_w", "q", "expected"),
    [  # slope of the variance map at its fixed point, σ_b² = 0.05, numpy quadrature
        ("tanh", 1.0, 0.193593, 0.56428),
        ("tanh", 1.5, 0.889425, 0.455864),
        ("tanh", 3.0, 6.367052, 0.187878),
        ("erf", 1.5, 1.157266, 0.364294),
        ("erf", 2.0, 2.578178, 0.245959),
    ],
)
def test_slope_of_the_variance_map(name, sigma_w, q, expected):
    found = moment(name, q, derivative=1) + curvature_moment(name, q)
    assert sigma_w**2 * found.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", [*ACTIVATIONS, TWINS["relu"]])
def test_variance_zero_is_the_limit_of_small_variances(name):
    small = torch.tensor([0.0, 1e-14], dtype=torch.float64)
    for derivative in (0, 1):
        value, limit = moment(name, small, derivative=derivative)
        assert value.item() == pytest.approx(limit.item(), abs=1e-7)
        value = pair_moment(name, small, small, small, derivative=derivative)
        assert value[0].item() == pytest.approx(limit.item(), abs=1e-7)
