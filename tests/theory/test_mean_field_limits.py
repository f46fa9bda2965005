"""Fixed points where they are known: of ReLU and its kin, and near criticality."""

import math

import pytest
import torch
from fixed_point_tables import ROOT

from ntk_callbacks.theory import mean_field, signal_trajectory

# ReLU and its kin, known in closed form.


def test_relu_below_its_critical_point():
    found = mean_field("relu", 1.2, 0.3)
    assert found.q.item() == pytest.approx(0.09 / (1 - 0.72), rel=1e-12)
    assert found.chi.item() == pytest.approx(0.72, rel=1e-12)
    assert found.xi_q.item() == found.xi_c.item() == pytest.approx(-1 / math.log(0.72))


def test_relu_at_its_critical_point_keeps_every_variance():
    for q0 in (0.1, 1.0, 20.0):
        found = mean_field("relu", 2**0.5, 0.0, q0=q0)
        assert found.q.item() == q0
        assert found.chi.item() == pytest.approx(1, abs=1e-15)
        assert found.xi_q == found.xi_c == torch.inf
        assert not found.is_chaotic


@pytest.mark.parametrize(
    ("sigma_w", "sigma_b"), [(2**0.5, 0.1), (1.5, 0.0), (3.0, 1.0)]
)
def test_relu_above_it_diverges(sigma_w, sigma_b):
    found = mean_field("relu", sigma_w, sigma_b)
    assert found.q == found.xi_q == torch.inf
    assert found.c.isnan()
    assert found.xi_c.isnan()
    assert found.chi.item() == pytest.approx(sigma_w**2 / 2)


@pytest.mark.parametrize(
    ("depth", "ratio", "tolerance"),
    [
        (10, 0.2304567663463576, 1e-12),
        (100, 0.7761853687507205, 1e-11),
        (1000, 0.9671903996127637, 2e-9),
        # A number c near 1 has lost nine digits of 1 − c, layer after layer.
        pytest.param(10_000, 0.9959613541258204, 2e-6, marks=pytest.mark.slow),
    ],
)
def test_relu_correlations_approach_one_as_a_power(depth, ratio, tolerance):
    """1 − c_l → 9π²/(2 l²); the ratios are those of an independent recursion."""
    c = signal_trajectory("relu", 2**0.5, 0.0, depth=depth, q=1.0, c=0.5).c
    found = (1 - c[-1].item()) * 2 * depth**2 / (9 * math.pi**2)
    assert found == pytest.approx(ratio, rel=tolerance)


# Near criticality, where iteration takes forever.


@pytest.mark.parametrize("excess", [1e-2, 1e-4, 1e-6])
def test_small_signals_near_criticality_follow_the_expansion(excess):
    """Tanh, σ_b = 0: V(q) = σ_w² (q − 2q² + 17/3 q³ − …)."""
    w2 = 1 + 2 * excess
    found = mean_field("tanh", w2**0.5, 0.0).q.item()
    assert found == pytest.approx(excess, rel=3 * excess + 1e-9)
    # Second order: 1 − 2q + 17/3 q² = 1/σ_w².
    root = (2 - math.sqrt(4 - 4 * 17 / 3 * (1 - 1 / w2))) / (2 * 17 / 3)
    assert found == pytest.approx(root, rel=20 * excess**2 + 1e-9)


def test_signals_that_die_have_variance_zero():
    for sigma_w in (0.3, 1.0):
        found = mean_field("tanh", sigma_w, 0.0)
        assert found.q == 0
        assert found.c == 1
        assert found.chi.item() == pytest.approx(sigma_w**2)


def test_correlation_of_an_odd_activation_without_bias_goes_to_zero():
    found = mean_field("erf", 1.5, 0.0)
    assert found.c.item() == pytest.approx(0, abs=1e-12)


def test_correlation_just_inside_the_chaotic_phase():
    """1 − c* ≈ 2 (χ − 1)/C''(1), with C''(1) = σ_w² q E φ''²."""
    from ntk_callbacks.theory import critical_point

    point = critical_point("tanh", ROOT)
    field = mean_field("tanh", point.sigma_w * (1 + 1e-5), ROOT)
    z = torch.arange(-9, 9.01, 0.01, dtype=torch.float64)
    t = (field.q.sqrt() * z).tanh()
    density = 0.01 * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)
    bend = point.sigma_w**2 * field.q * (density * (2 * t * (1 - t**2)) ** 2).sum()
    expected = 2 * (field.chi - 1) / bend
    assert (1 - field.c).item() == pytest.approx(expected.item(), rel=1e-3)
    assert field.xi_c.item() == pytest.approx(1 / (field.chi.item() - 1), rel=1e-3)
