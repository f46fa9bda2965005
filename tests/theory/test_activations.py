"""Gaussian expectations against closed forms, tables, and sums one can check by eye."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ntk_callbacks.theory import (
    PiecewiseLinear,
    curvature_moment,
    moment,
    pair_moment,
)
from ntk_callbacks.theory.activations import ACTIVATIONS, elementwise
from ntk_callbacks.theory.correlated import Plane
from ntk_callbacks.theory.pieces import legendre_rule, smooth_pieces
from ntk_callbacks.theory.quadrature import line_expectation

# The same functions under names that bring no closed form.
TWINS = {
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "abs": lambda x: x.abs(),
    "linear": lambda x: 1.0 * x,
    "erf": lambda x: torch.erf(x),
    "sin": lambda x: torch.sin(x),
}
SMOOTH = ["tanh", "gelu", "sigmoid", "silu", "softplus"]
VARIANCES = torch.tensor([1e-6, 0.05, 0.7, 3.0, 40.0], dtype=torch.float64)
COSINES = torch.tensor(
    [-1, -1 + 1e-9, -0.999, -0.6, 0, 0.3, 0.95, 0.9999, 1 - 1e-7, 1 - 1e-12, 1],
    dtype=torch.float64,
)


def trapezoid(function, step=0.02):
    """E function(z), z standard normal: exponentially exact for analytic functions."""
    z = torch.arange(-12, 12 + step / 2, step, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    return (step * density * function(z)).sum().item()


def plane(function, q1, q2, q12, step=0.05):
    """E function(u, v) on a square grid of independent z₁, z₂."""
    z = torch.arange(-9, 9 + step / 2, step, dtype=torch.float64)
    density = step * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    u = math.sqrt(q1) * z[:, None]
    v = q12 / q1 * u + math.sqrt(q2 - q12**2 / q1) * z
    return (density[:, None] * density * function(u, v)).sum().item()


def slope(phi):
    def derivative(x):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(phi(x).sum(), x)[0]

    return derivative


# One argument.


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


# Two arguments.


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("derivative", [0, 1])
@pytest.mark.parametrize("variances", [(1.0, 1.0), (0.3, 1.7), (30.0, 12.0)])
def test_closed_pairs_are_what_quadrature_finds(name, derivative, variances):
    q1, q2 = variances
    q12 = COSINES * math.sqrt(q1 * q2)
    closed, found = (
        pair_moment(a, q1, q2, q12, derivative=derivative) for a in (name, TWINS[name])
    )
    size = math.sqrt(
        moment(name, q1, derivative=derivative)
        * moment(name, q2, derivative=derivative)
    )
    assert torch.allclose(closed, found, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.5, 0.97])
def test_smooth_pairs_are_sums_on_a_grid(name, cosine):
    q1, q2 = 0.8, 1.5
    q12 = cosine * math.sqrt(q1 * q2)
    phi = ACTIVATIONS[name]
    expected = plane(lambda u, v: phi(u) * phi(v), q1, q2, q12)
    assert pair_moment(name, q1, q2, q12).item() == pytest.approx(expected, abs=1e-11)
    expected = plane(lambda u, v: slope(phi)(u) * slope(phi)(v), q1, q2, q12)
    found = pair_moment(name, q1, q2, q12, derivative=1).item()
    assert found == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("cosine", [-0.99999, -0.5, 0.3, 0.95, 0.9999, 1 - 1e-8])
@pytest.mark.parametrize(("q1", "q2"), [(1.0, 1.0), (0.4, 5.0)])
def test_kinked_pairs_are_probabilities(cosine, q1, q2):
    """E φ'(u) φ'(v) of hard tanh is P(|u| < 1, |v| < 1): one integral over u."""
    count = 4_000_000
    edge = 1 / math.sqrt(q1)
    z = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 * edge - edge
    rest = math.sqrt(q2 * (1 - cosine) * (1 + cosine))
    center = cosine * math.sqrt(q2) * z
    inside = torch.special.ndtr((1 - center) / rest) - torch.special.ndtr(
        (-1 - center) / rest
    )
    density = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    expected = (inside * density).mean().item() * 2 * edge
    q12 = cosine * math.sqrt(q1 * q2)
    found = pair_moment("hard_tanh", q1, q2, q12, derivative=1).item()
    # The midpoint rule is off by (width/count)²/24 times a slope of at most 1/rest.
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("gap", [1e-4, 1e-8, 1e-12, 1e-14])
def test_no_digits_are_lost_near_parallel_arguments(gap):
    """The angle is 2 arcsin √(gap/2); arccos(1 − gap) keeps half of its digits."""
    q12 = 1 - gap
    angle = 2 * math.asin(math.sqrt((1 - q12) / 2))
    found = pair_moment("relu", 1.0, 1.0, q12, derivative=1).item()
    assert found == pytest.approx((math.pi - angle) / (2 * math.pi), abs=1e-15)
    found = pair_moment("relu", 1.0, 1.0, -q12, derivative=1).item()
    assert found == pytest.approx(angle / (2 * math.pi), abs=1e-15)
    assert pair_moment("relu", 1.0, 1.0, 1.0, derivative=1).item() == 0.5


@pytest.mark.parametrize("activation", ["relu", "tanh", "hard_tanh", "erf", "sin"])
def test_pairs_are_symmetric_and_end_at_the_moment(activation):
    q = torch.rand(6, dtype=torch.float64) * 3 + 0.1
    factor = torch.randn(6, 9, dtype=torch.float64)
    factor = functional.normalize(factor, dim=1) * q[:, None].sqrt()
    q12 = factor @ factor.mT
    q12 = (q12 + q12.mT) / 2
    q12.diagonal().copy_(q)
    for derivative in (0, 1):
        pairs = pair_moment(activation, q[:, None], q[None], q12, derivative=derivative)
        assert torch.equal(pairs, pairs.mT)
        diagonal = moment(activation, q, derivative=derivative)
        assert torch.allclose(pairs.diagonal(), diagonal, rtol=0, atol=1e-10)
        assert torch.linalg.eigvalsh(pairs)[0] > 0


def test_shapes_are_broadcast_and_kept():
    assert moment("tanh", torch.ones(2, 3)).shape == (2, 3)
    assert moment("tanh", torch.ones(0)).shape == (0,)
    q = torch.ones(2, 1, 3)
    for activation in ("relu", "tanh"):
        pairs = pair_moment(activation, q, torch.ones(4, 1), torch.zeros(()))
        assert pairs.shape == (2, 4, 3)
        assert pairs.dtype == torch.float64


# Callables.


def test_torch_functions_and_modules_bring_their_closed_forms():
    assert elementwise(torch.relu) == elementwise(nn.ReLU()) == elementwise("relu")
    assert elementwise(functional.leaky_relu) == PiecewiseLinear(1.0, 0.01)
    assert elementwise(nn.LeakyReLU(0.3)) == PiecewiseLinear(1.0, 0.3)
    assert elementwise(torch.erf) == elementwise("erf")
    for name, twin in TWINS.items():
        x = torch.linspace(-3, 3, 13, dtype=torch.float64)
        assert torch.allclose(ACTIVATIONS[name](x), twin(x))


class Shifted(nn.Module):
    """ReLU with a kink that can be moved."""

    def __init__(self):
        super().__init__()
        self.kink = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return torch.relu(x - self.kink)


def test_a_module_with_parameters_is_read_afresh():
    module = Shifted()
    for kink in (0.3, -1.1):
        module.kink.data.fill_(kink)
        for derivative in (0, 1):
            found = moment(module, VARIANCES, derivative=derivative)
            expected = moment(
                lambda x, t=kink: torch.relu(x - t), VARIANCES, derivative=derivative
            )
            assert torch.equal(found, expected)


@pytest.mark.parametrize("inplace", [nn.ELU(inplace=True), nn.Hardtanh(inplace=True)])
def test_activations_that_work_in_place(inplace):
    name = "elu" if isinstance(inplace, nn.ELU) else "hard_tanh"
    assert torch.equal(moment(inplace, VARIANCES), moment(name, VARIANCES))


@pytest.mark.parametrize("place", [0.3, -1.7, 1 / 3])
def test_kinks_are_found_where_they_are(place):
    """E max(u − t, 0)² = (q + t²) Φ(−t/√q) − t √q φ(t/√q)."""
    q = 2.0
    above = math.erfc(place / math.sqrt(2 * q)) / 2
    density = math.exp(-(place**2) / (2 * q)) / math.sqrt(2 * math.pi)
    expected = (q + place**2) * above - place * math.sqrt(q) * density
    found = moment(lambda x: functional.relu(x - place), q).item()
    assert found == pytest.approx(expected, rel=1e-12)
    cuts = smooth_pieces(lambda x: functional.relu(x - place), 16.0)
    assert (cuts - place).abs().min() < 1e-13
    assert len(cuts) == 4  # both ends, 0 and the kink


def test_a_narrow_step_and_a_fast_oscillation():
    assert moment(lambda x: torch.tanh(1e4 * x), 1.0).item() == pytest.approx(
        trapezoid(lambda z: torch.tanh(1e4 * z) ** 2, step=2e-6), abs=1e-9
    )
    found = moment(lambda x: torch.sin(60 * x), 4.0, derivative=1).item()
    assert found == pytest.approx(1800, rel=1e-9)


@pytest.mark.parametrize("q", [1e-6, 1.0, 9.0])
def test_activations_that_are_round_off_near_zero(q):
    """log(1 + eˣ) − log 2 loses digits near 0, yet is smooth."""
    shifted = lambda x: functional.softplus(x) - math.log(2)  # noqa: E731
    root = math.sqrt(q)
    expected = trapezoid(lambda z: shifted(root * z) ** 2)
    assert moment(shifted, q).item() == pytest.approx(expected, rel=1e-9)
    assert len(smooth_pieces(shifted, 16.0)) < 40


def test_expectations_work_where_gradients_are_off():
    expected = pair_moment("tanh", 1.0, 1.0, 0.5, derivative=1)
    with torch.inference_mode():
        found = pair_moment("tanh", 1.0, 1.0, 0.5, derivative=1)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("count", [12, 16, 17])
def test_quadrature_rules_integrate_polynomials(count):
    nodes, weights = legendre_rule(count)
    for degree in range(2 * count):
        exact = 0 if degree % 2 else 2 / (degree + 1)
        assert (weights * nodes**degree).sum().item() == pytest.approx(exact, abs=1e-14)


def test_panels_are_halved_until_two_rules_agree():
    """No cuts tell of these oscillations: ½ + ½ cos 2az, and cos au cos av."""
    one = torch.ones(1, 1, dtype=torch.float64)
    cuts = torch.zeros(1, dtype=torch.float64)
    found = line_expectation(lambda z, _: torch.cos(50 * z) ** 2, one, cuts)
    assert found.item() == pytest.approx(0.5, abs=1e-9)
    with pytest.raises(ValueError, match="expected 1e-09 or less"):
        line_expectation(lambda z, _: torch.cos(1e4 * z) ** 2, one, cuts)

    angle = [1 - 1e-3, math.sqrt(2e-3 - 1e-6)]
    pair = torch.tensor([1, 1, *angle, 0.5], dtype=torch.float64)[:, None]
    found = Plane(lambda x: torch.cos(40 * x), 0, cuts).expectation(*pair)
    assert found.item() == pytest.approx(math.exp(-1.6) / 2, abs=1e-9)
    with pytest.raises(ValueError, match=r"correlation 0\.999 is not found to 1e-09"):
        Plane(lambda x: torch.cos(1e4 * x), 0, cuts).expectation(*pair)


# What is refused.


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("swosh", "expected one of relu, leaky_relu"),
        (torch.sign, "jumps by 2 at 0"),
        (lambda x: torch.floor(x + 0.25), "jumps by 1"),
        (lambda x: torch.softmax(x, 0), "not elementwise"),
        (lambda x: functional.dropout(x), "not elementwise"),
        (lambda x: torch.tanh(x.float()), "keeps shape and float64"),
        (lambda x: torch.tanh(x.float()).double(), "not piecewise smooth"),
        (lambda x: x.sum(), "keeps shape and float64"),
        (torch.log, "not finite at -"),
        (lambda x: torch.exp(x**2 / 3), "grows too fast"),
    ],
)
def test_activations_without_a_limit_are_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        moment(activation, 1.0, derivative=1)
    with pytest.raises(ValueError, match=message):
        pair_moment(activation, 1.0, 1.0, 0.5, derivative=1)


def test_numbers_that_are_no_covariances_are_refused():
    with pytest.raises(ValueError, match="q holds -1"):
        moment("relu", -1.0)
    with pytest.raises(ValueError, match="q holds nan"):
        curvature_moment("tanh", torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="q2 holds inf"):
        pair_moment("tanh", 1.0, torch.inf, 0.0)
    with pytest.raises(ValueError, match="exceeds √"):
        pair_moment("relu", 1.0, 2.0, torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match="exceeds √"):
        pair_moment("relu", 1.0, 2.0, torch.nan)
    with pytest.raises(ValueError, match="derivative 0 or 1"):
        moment("relu", 1.0, derivative=2)
    with pytest.raises(ValueError, match="power of at least 1"):
        moment("relu", 1.0, power=0)
    with pytest.raises(ValueError, match="expected 0 or 1"):
        pair_moment("relu", 1.0, 1.0, 0.0, derivative=-1)
