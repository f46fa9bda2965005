"""Critical points against tables, closed forms, and the fixed points they stand for."""

import pytest
import torch
from fixed_point_tables import rows
from torch import nn

from ntk_callbacks.theory import (
    critical_line,
    critical_point,
    critical_sigma_w,
    mean_field,
    moment,
)

# Activation, σ_b², σ_w², q*, μ₂/μ₁² − 1: an independent numpy/scipy implementation.
TABLE = """
tanh 0.0001 1.08602629 0.04570908 0.011463
tanh 0.01 1.42420529 0.27330091 0.152540
tanh 0.05 1.76095464 0.57004788 0.342256
tanh 0.1 1.98607264 0.80579918 0.479012
tanh 0.25 2.40148924 1.31793900 0.741561
tanh 1.0 3.44321091 3.03639639 1.425778
erf 0.0001 0.85258761 0.04460376 0.011662
erf 0.01 1.11428006 0.25320966 0.157171
erf 0.05 1.37583901 0.51717684 0.353889
erf 0.1 1.55211786 0.72635923 0.496471
erf 0.25 1.88054726 1.18327244 0.772126
erf 1.0 2.71838135 2.74489093 1.500134
hard_tanh 0.0001 1.00121110 0.09546017 0.001211
hard_tanh 0.01 1.05206121 0.25914622 0.052061
hard_tanh 0.05 1.16554469 0.46386397 0.165545
hard_tanh 0.1 1.26340593 0.63215546 0.263406
hard_tanh 0.25 1.47172770 1.01337966 0.471728
hard_tanh 1.0 2.07270860 2.38780978 1.072709
"""
# Activation, σ_b², σ_w², q*, to more digits; and by 300-point Gauss-Legendre.
LONG = """
tanh 0.01 1.4242052904885947 0.27330091345823077
tanh 0.05 1.7609546396067386 0.5700478816407638
tanh 0.1 1.9860726411358647 0.8057991819134879
tanh 0.25 2.40148923510837 1.3179389989721488
erf 0.01 1.1142800634037773 0.253209656331142
erf 0.05 1.3758390073466802 0.5171768379805644
erf 0.1 1.5521178553336425 0.7263592293849607
erf 0.25 1.880547258837297 1.1832724388953773
hard_tanh 0.01 1.0520612094112798 0.2591462203334814
hard_tanh 0.05 1.1655446896358799 0.46386396943200475
hard_tanh 0.1 1.2634059323861389 0.6321554645483021
hard_tanh 0.25 1.4717276991547092 1.013379661734532
tanh 0.2 2.2851524737 1.1644962875
erf 0.2 1.7881797673 1.0459331500
"""


def identity(row):
    return "-".join(row[:2])


@pytest.mark.parametrize("row", rows(TABLE), ids=identity)
def test_critical_points_are_those_of_the_table(row):
    b2, w2, q, spread = map(float, row[1:])
    found = critical_point(row[0], b2**0.5)
    assert found.sigma_w.item() ** 2 == pytest.approx(w2, abs=6e-9)
    assert found.q.item() == pytest.approx(q, abs=6e-9)
    mu1, mu2 = (moment(row[0], found.q, power=k, derivative=1) for k in (2, 4))
    assert (mu2 / mu1**2 - 1).item() == pytest.approx(spread, abs=6e-7)


@pytest.mark.parametrize("row", rows(LONG), ids=identity)
def test_critical_points_to_more_digits(row):
    b2, w2, q = map(float, row[1:])
    found = critical_point(row[0], b2**0.5)
    assert found.sigma_w.item() ** 2 == pytest.approx(w2, rel=5e-11)
    assert found.q.item() == pytest.approx(q, rel=5e-11)


@pytest.mark.parametrize("name", ["tanh", "erf", "hard_tanh", "sin", "elu", "sigmoid"])
@pytest.mark.parametrize("sigma_b", [1e-4, 0.3, 2.0])
def test_chi_is_one_at_the_fixed_point_of_a_critical_network(name, sigma_b):
    point = critical_point(name, sigma_b)
    field = mean_field(name, point.sigma_w, sigma_b, q0=point.q.item() * 1.05)
    assert field.q.item() == pytest.approx(point.q.item(), rel=1e-6)
    assert field.chi.item() == pytest.approx(1, abs=1e-9)
    # On either side of it there is order and chaos.
    wider = mean_field(name, point.sigma_w * 1.01, sigma_b, q0=point.q.item())
    narrower = mean_field(name, point.sigma_w * 0.99, sigma_b, q0=point.q.item())
    assert narrower.chi < 1 < wider.chi


@pytest.mark.parametrize(
    ("activation", "sigma_w"),
    [
        ("relu", 2**0.5),
        (nn.ReLU(), 2**0.5),
        ("leaky_relu", (2 / (1 + 1e-4)) ** 0.5),
        (nn.LeakyReLU(0.2), (2 / 1.04) ** 0.5),
        ("linear", 1.0),
        ("abs", 1.0),
    ],
)
def test_piecewise_linear_activations_have_one_point(activation, sigma_w):
    found = critical_point(activation, 0.0)
    assert found.sigma_w.item() == pytest.approx(sigma_w, rel=1e-12)
    line = critical_line(activation, torch.tensor([0.1, 1.0, 30.0]))
    assert torch.allclose(line.sigma_w, found.sigma_w.expand(3), rtol=1e-12)
    assert (line.sigma_b == 0).all()
    for sigma_b in (1e-6, 0.1, 1.0):
        with pytest.raises(ValueError, match="critical at sigma_b=0 only"):
            critical_sigma_w(activation, sigma_b)


def test_odd_activations_start_at_their_slope():
    assert critical_sigma_w("tanh", 0.0).item() == pytest.approx(1)
    assert critical_sigma_w("erf", 0.0).item() == pytest.approx(torch.pi**0.5 / 2)
    assert critical_point("tanh", 0.0).q == 0


def test_line_of_an_unstable_variance_is_refused_and_said_to_be():
    """GELU: at small variances χ = 1 only where the q-map repels."""
    line = critical_line("gelu", 0.1)
    below, above = (
        mean_field("gelu", line.sigma_w, line.sigma_b, q0=q0).q.item()
        for q0 in (0.099, 0.101)
    )
    assert below < 0.0999
    assert above > 0.1001
    with pytest.raises(ValueError, match=r"unstable ones: 0\.1"):
        critical_point("gelu", line.sigma_b.item())
    stable = critical_point("gelu", 1.0)
    assert stable.q.item() == pytest.approx(82.3128, rel=1e-5)


def test_no_bias_reaches_some_variances():
    """Softplus: E φ² outgrows q, σ_b² would have to be negative."""
    assert critical_line("softplus", 1.0).sigma_b.isnan()
    with pytest.raises(ValueError, match="no critical point: 'softplus'"):
        critical_sigma_w("softplus", 0.1)


@pytest.mark.parametrize("sigma_b", [-0.1, float("nan"), float("inf")])
def test_bad_scales_are_refused(sigma_b):
    with pytest.raises(ValueError, match="sigma_b is"):
        critical_sigma_w("tanh", sigma_b)


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        critical_sigma_w("tan", 0.0)
