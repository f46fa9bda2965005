"""Functions and modules as activations: closed forms, kinks, and quadrature."""

import math

import pytest
import torch
from gaussian_sums import TWINS, VARIANCES, trapezoid
from torch import nn
from torch.nn import functional

from ntk_callbacks.theory import PiecewiseLinear, moment, pair_moment
from ntk_callbacks.theory.activations import ACTIVATIONS, elementwise
from ntk_callbacks.theory.correlated import Plane
from ntk_callbacks.theory.pieces import legendre_rule, smooth_pieces
from ntk_callbacks.theory.quadrature import line_expectation


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
