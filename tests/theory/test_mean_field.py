"""Fixed points and depth scales against tables, plain iteration and real networks."""

import inspect
import math

import pytest
import torch
from fixed_point_tables import ROOT, ROUNDED, TANH, rows
from torch import nn

from ntk_callbacks.theory import (
    c_map,
    mean_field,
    moment,
    phase_diagram,
    q_map,
    signal_trajectory,
)


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
