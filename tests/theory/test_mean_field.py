"""Fixed points and depth scales against tables, plain iteration and real networks."""

import inspect
import math

import pytest
import torch
from torch import nn

from ntk_callbacks.theory import (
    c_map,
    mean_field,
    moment,
    phase_diagram,
    q_map,
    signal_trajectory,
)

ROOT = 0.05**0.5
# σ_w, q*, χ, c*, slope of the c-map at c*, ξ_q, ξ_c of tanh at σ_b² = 0.05: an
# independent numpy/scipy implementation, quadrature and plain iteration.
TANH = """
1.0 0.19359252024529772 0.7590316471853928 1.0 1.7476262429019958 3.626975618052957
1.2 0.3857459868907243 0.922422501556989 1.0 1.7181062833536178 12.38360713461642
1.3 0.5270871078692367 0.9845121931730271 1.0 1.5644387267986595 64.06562026464097
1.5 0.8894249172824917 1.092337929486261 0.5672249267602613 1.2729746682703649 15.11708645289285
2.0 2.1954939280344874 1.3424024144451918 0.16506496202287407 0.8732933719602869 6.98027353297959
3.0 6.367052031368878 1.8512579962763174 0.039257678599176456 0.5980996501452148 4.488751615099052
"""  # noqa: E501
# The same implementation, to six digits.
ROUNDED = """
tanh 1.4 0.695716 1.04009 0.779793 1.408675 29.166898
erf 1.0 0.288427 0.867595 1.0 1.673746 7.040729
erf 1.5 1.157266 1.207465 0.339135 0.990302 8.549691
erf 2.0 2.578178 1.514212 0.113089 0.712967 5.401898
"""


def rows(table):
    return [line.split() for line in table.strip().splitlines()]


def plain_tanh_maps(sigma_w, sigma_b):
    """q-map and c-map of tanh by sums on a grid of independent z₁, z₂."""
    z = torch.arange(-9, 9.05, 0.1, dtype=torch.float64)
    density = 0.1 * (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)

    def variance(q):
        return sigma_w**2 * (density * (q**0.5 * z).tanh() ** 2).sum() + sigma_b**2

    def correlation(c, q):
        u = q**0.5 * z[:, None].expand(-1, len(z))
        v = q**0.5 * (c * z[:, None] + (1 - c**2) ** 0.5 * z)
        mean = (density[:, None] * density * u.tanh() * v.tanh()).sum()
        return (sigma_w**2 * mean + sigma_b**2) / variance(q)

    return variance, correlation


# Tables.


@pytest.mark.parametrize("row", rows(TANH), ids=lambda row: row[0])
def test_fixed_points_of_tanh_are_those_of_the_table(row):
    sigma_w, q, chi, c, xi_q, xi_c = map(float, row)
    found = mean_field("tanh", sigma_w, ROOT)
    assert found.q.item() == pytest.approx(q, rel=1e-12)
    assert found.chi.item() == pytest.approx(chi, rel=1e-12)
    assert found.c.item() == pytest.approx(c, abs=1e-11)
    assert found.xi_q.item() == pytest.approx(xi_q, rel=1e-11)
    assert found.xi_c.item() == pytest.approx(xi_c, rel=1e-10)
    assert found.is_chaotic.item() == (sigma_w > 1.32)


@pytest.mark.parametrize("row", rows(ROUNDED), ids=lambda row: "-".join(row[:2]))
def test_fixed_points_are_those_of_the_rounded_table(row):
    sigma_w, *expected = map(float, row[1:])
    found = mean_field(row[0], sigma_w, ROOT)
    values = (found.q, found.chi, found.c, found.xi_q, found.xi_c)
    assert [v.item() for v in values] == pytest.approx(expected, abs=1.01e-6)


# σ_w², q*, χ and ξ_c, with c* in the chaotic phase: tanh, σ_b² = 0.05, by 300-point
# Gauss-Legendre quadrature on [−10, 10].
@pytest.mark.parametrize(
    ("w2", "q", "chi", "c", "xi_c"),
    [
        (1.3, 0.31531648, 0.88016351, 1.0, 7.834069),
        (2.5, 1.06395838, 1.13351570, 0.44680423, 11.795598),
        (4.0, 2.19549393, 1.34240241, 0.16506496, 6.980274),
    ],
)
def test_fixed_points_by_another_quadrature(w2, q, chi, c, xi_c):
    found = mean_field("tanh", w2**0.5, ROOT)
    values = [v.item() for v in (found.q, found.chi, found.c)]
    assert values == pytest.approx([q, chi, c], abs=1e-8)
    assert found.xi_c.item() == pytest.approx(xi_c, abs=1e-6)


# Plain iteration and finite differences.


@pytest.mark.parametrize(("sigma_w", "sigma_b"), [(1.0, 0.3), (1.7, 0.1), (2.5, 0.0)])
def test_fixed_points_are_where_iteration_leads(sigma_w, sigma_b):
    variance, correlation = plain_tanh_maps(sigma_w, sigma_b)
    q = torch.tensor(1.0, dtype=torch.float64)
    c = torch.tensor(0.9, dtype=torch.float64)
    for _ in range(300):
        q = variance(q)
    for _ in range(600):
        c = correlation(c, q).clamp(max=1)
    found = mean_field("tanh", sigma_w, sigma_b)
    assert found.q.item() == pytest.approx(q.item(), rel=1e-9)
    assert found.c.item() == pytest.approx(c.item(), abs=1e-7)
    step = 1e-4
    slope_q = (variance(q + step) - variance(q - step)) / (2 * step)
    assert found.xi_q.item() == pytest.approx(-1 / math.log(slope_q), rel=1e-6)
    if found.c < 1:
        slope_c = (correlation(c + step, q) - correlation(c - step, q)) / (2 * step)
        assert found.xi_c.item() == pytest.approx(-1 / math.log(slope_c), rel=1e-6)


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "elu", "sigmoid", "sin"])
def test_fixed_points_reproduce_themselves(name):
    found = mean_field(name, 1.3, 0.2)
    assert found.q.isfinite()
    again = q_map(name, found.q, 1.3, 0.2)
    assert again.item() == pytest.approx(found.q.item(), rel=1e-12)
    corrected = c_map(name, found.c, found.q, 1.3, 0.2)
    assert corrected.item() == pytest.approx(found.c.item(), abs=1e-11)


def test_of_several_fixed_points_it_is_the_one_next_to_the_start():
    """φ = 6 tanh(x)/(1 + exp(4 − x²)): weak signals die, strong ones live."""

    def switch(x):
        return 6 * x.tanh() * torch.sigmoid(x**2 - 4)

    ends = []
    for q0 in (0.05, 3.0, 100.0):
        q = torch.tensor(q0, dtype=torch.float64)
        for _ in range(60):
            q = q_map(switch, q, 0.8, 0.1)
        ends.append(mean_field(switch, 0.8, 0.1, q0=q0).q.item())
        assert ends[-1] == pytest.approx(q.item(), rel=1e-9)
    assert ends[0] < 0.1 < 5 < ends[1]
    assert ends[1] == pytest.approx(ends[2], rel=1e-12)


def test_decreasing_map_has_its_fixed_point_found():
    """E cos² = (1 + exp(−2q))/2 falls with q."""
    found = mean_field(torch.cos, 0.8, 0.1)
    q = found.q.item()
    assert q == pytest.approx(0.64 * (1 + math.exp(-2 * q)) / 2 + 0.01, rel=1e-12)
    slope = 0.64 * math.exp(-2 * q)
    assert found.xi_q.item() == pytest.approx(-1 / math.log(slope), rel=1e-9)


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


# Grids.


def test_grid_agrees_with_its_cells_one_by_one():
    sigma_w = torch.tensor([0.0, 0.9, 1.6, 3.0], dtype=torch.float64)
    sigma_b = torch.tensor([0.0, 0.4], dtype=torch.float64)
    for name in ("tanh", "relu"):
        grid = phase_diagram(name, sigma_w, sigma_b)
        assert grid.q.shape == (2, 4)
        for i, b in enumerate(sigma_b):
            for j, w in enumerate(sigma_w):
                cell = mean_field(name, w.item(), b.item())
                for part in ("q", "c", "chi", "xi_q", "xi_c"):
                    found = getattr(grid, part)[i, j]
                    expected = getattr(cell, part)
                    close = torch.allclose(
                        found, expected, rtol=1e-9, atol=1e-12, equal_nan=True
                    )
                    assert close, (name, part, i, j)


# Finite networks.


@pytest.mark.slow
def test_wide_tanh_networks_propagate_as_predicted():
    """n = 1000, 10 seeds, 20 layers: q within 5 %, c within 0.06."""
    n, depth, seeds, sigma_w = 1000, 20, 10, 1.5
    x = torch.zeros(2, n, dtype=torch.float64)
    x[0, 0], x[1, 0], x[1, 1] = 1.0, 0.6, 0.8
    x = x * n**0.5  # |x|²/n = 1, correlation 0.6
    q = torch.zeros(depth, dtype=torch.float64)
    c = torch.zeros(depth, dtype=torch.float64)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        a = x
        for layer in range(depth):
            w = torch.randn(n, n, dtype=torch.float64, generator=generator)
            b = torch.randn(n, dtype=torch.float64, generator=generator)
            h = sigma_w / n**0.5 * a @ w.T + ROOT * b
            gram = h @ h.T / n
            q[layer] += gram.diagonal().mean() / seeds
            c[layer] += gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt() / seeds
            a = h.tanh()
    start_q = sigma_w**2 + ROOT**2
    start_c = (0.6 * sigma_w**2 + ROOT**2) / start_q
    expected = signal_trajectory(
        "tanh", sigma_w, ROOT, depth=depth - 1, q=start_q, c=start_c
    )
    # The same recursion, by an independent implementation.
    for layer, (q_l, c_l) in {
        1: (2.3, 0.60870),
        2: (1.27505, 0.57235),
        3: (1.03697, 0.55959),
        5: (0.91708, 0.55333),
        10: (0.88996, 0.55581),
        20: (0.88943, 0.56136),
    }.items():
        assert expected.q[layer - 1].item() == pytest.approx(q_l, abs=6e-6)
        assert expected.c[layer - 1].item() == pytest.approx(c_l, abs=6e-6)
    assert ((q / expected.q - 1).abs() < 0.05).all()
    assert ((c - expected.c).abs() < 0.06).all()


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tanh", -1.0, 0.0), "sigma_w is -1.0"),
        (("tanh", 1.0, -0.1), "sigma_b is -0.1"),
        (("tanh", math.nan, 0.0), "sigma_w is nan"),
        (("tanh", math.inf, 0.0), "sigma_w is inf"),
        (("tangent", 1.0, 0.0), "activation is 'tangent', expected one of"),
        ((nn.Softmax(0), 1.0, 0.0), "not elementwise"),
        ((torch.exp, 1.0, 0.0), "grows too fast"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_field(*arguments)


def test_diagrams_take_lists_and_numbers_are_real():
    bare = inspect.unwrap(phase_diagram)
    line = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"sigma_b has shape \(\), expected a list"):
        bare("tanh", line, torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"sigma_w has shape \(1, 2\)"):
        bare("tanh", line[None], line)
    with pytest.raises(ValueError, match="sigma_w is complex, expected real numbers"):
        inspect.unwrap(mean_field)("tanh", line * 1j, 0.1)
    with pytest.raises(ValueError, match="q is complex"):
        inspect.unwrap(moment)("tanh", line * 1j)
    with pytest.raises(ValueError, match="c is complex"):
        inspect.unwrap(c_map)("tanh", line * 1j, 1.0, 1.0, 0.0)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="q0 is 0"):
        mean_field("tanh", 1.0, 0.0, q0=0.0)
    with pytest.raises(ValueError, match="between -1 and 1"):
        c_map("tanh", 1.5, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="depth is -1"):
        signal_trajectory("tanh", 1.0, 0.0, depth=-1, q=1.0)
