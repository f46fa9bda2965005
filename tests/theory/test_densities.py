"""Spectral densities: mass, moments and edges, closed forms, and a histogram."""

import inspect
import math

import pytest
import torch
from one_of_a_kind import quick
from torch import nn

from ntk_callbacks.theory import (
    PiecewiseLinear,
    fuss_catalan_density,
    fuss_catalan_moments,
    jacobian_density,
    jacobian_moments,
)
from ntk_callbacks.theory.pieces import legendre_rule

ROOT = 0.05**0.5


def integrals(density, edge, power, powers=4):
    """∫ density(x) xᵏ dx from 0 to an edge with a root, x^(1/power − 1) at 0."""
    nodes, weights = legendre_rule(120)
    t = (nodes + 1) / 2
    base = 1 - (1 - t) ** 2
    x = edge * base**power
    measure = weights / 2 * edge * power * base ** (power - 1) * 2 * (1 - t)
    kept = x > 1e-200
    terms = measure[kept] * density(x[kept])
    return [(terms * x[kept] ** k).sum().item() for k in range(powers)]


# Products of Gaussian matrices.


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_gaussian_law_has_its_mass_and_moments(depth):
    edge = (depth + 1) ** (depth + 1) / depth**depth
    found = integrals(lambda x: fuss_catalan_density(x, depth), edge, 2 * depth + 2)
    expected = [1, *fuss_catalan_moments(depth, 3).tolist()]
    assert found == pytest.approx(expected, rel=1e-9)
    outside = torch.tensor([edge * 1.0001, 1e6], dtype=torch.float64)
    assert (fuss_catalan_density(outside, depth) == 0).all()


def test_one_gaussian_matrix_has_the_law_of_marchenko_and_pastur():
    x = torch.tensor([1e-6, 0.3, 2.0, 3.999], dtype=torch.float64)
    expected = ((4 - x) / x).sqrt() / (2 * math.pi)
    for found in (
        fuss_catalan_density(x, 1),
        jacobian_density("linear", 1.0, 0.0, 1, "gaussian", x).density,
    ):
        assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 20])
def test_branch_that_is_followed_is_the_parametric_law(depth):
    edge = (depth + 1) ** (depth + 1) / depth**depth
    x = edge * torch.tensor(
        [1e-8, 1e-3, 0.05, 0.5, 0.99, 1.01, 50], dtype=torch.float64
    )
    found = jacobian_density("linear", 1.0, 0.0, depth, "gaussian", x).density
    assert torch.allclose(found, fuss_catalan_density(x, depth), rtol=1e-8, atol=0)


# Piecewise linear networks.


def test_two_orthogonal_relu_layers_have_the_arcsine_law():
    """Two free projections of rank 1/2: λ = s²/4 ~ arcsine on [0, 1], and half 0."""
    x = torch.tensor([0.01, 0.5, 2.0, 3.9, 4.1], dtype=torch.float64)
    found = jacobian_density("relu", 2**0.5, 0.0, 2, "orthogonal", x)
    inside = x < 4
    expected = torch.zeros_like(x)
    expected[inside] = 0.5 / (math.pi * (x * (4 - x))[inside].sqrt())
    assert torch.allclose(found.density, expected, rtol=1e-8, atol=0)
    assert found.atoms.tolist() == [0]
    assert found.masses.tolist() == [0.5]


CASES = [
    ("relu", 2**0.5, 0.0, 4, "orthogonal"),
    ("relu", 2**0.5, 0.0, 8, "orthogonal"),
    ("relu", 2**0.5, 0.0, 4, "gaussian"),
    ("relu", 0.7, 0.3, 3, "gaussian"),
    ("hard_tanh", 1.2, ROOT, 16, "orthogonal"),
    ("hard_tanh", 1.4, ROOT, 5, "orthogonal"),
    ("hard_tanh", 1.4, ROOT, 5, "gaussian"),
    ("tanh", 1.3, ROOT, 4, "gaussian"),
    ("tanh", 1.3, ROOT, 4, "orthogonal"),
]


@pytest.mark.parametrize(
    "case",
    quick(
        CASES,
        "relu-0.7-3-gaussian",
        "relu-1.4-8-orthogonal",
        "tanh-1.3-4-gaussian",
        ids=lambda c: f"{c[0]}-{c[1]:.2g}-{c[3]}-{c[4]}",
    ),
)
def test_mass_moments_and_edge(case):
    *network, depth, weights = case
    expected = jacobian_moments(*network, depth, weights)
    edge = expected.maximum.item()
    seen = []

    def density(x):
        seen.append(jacobian_density(*network, depth, weights, x))
        return seen[-1].density

    found = integrals(density, edge, 2 * depth + 2)
    atoms = seen[0]
    for k in range(4):
        found[k] += (atoms.masses * atoms.atoms**k).sum().item()
    second = (expected.variance + expected.mean**2).item()
    assert found[0] == pytest.approx(1, abs=2e-6)
    assert found[1] == pytest.approx(expected.mean.item(), rel=1e-8)
    assert found[2] == pytest.approx(second, rel=1e-8)
    near = edge * torch.tensor([0.999, 1.001], dtype=torch.float64)
    inside, outside = jacobian_density(*network, depth, weights, near).density
    assert inside > 0
    assert outside == 0


def test_leaky_slopes_leave_a_gap_at_zero():
    """s is at least (σ_w a)^L; log-spaced, the whole mass is in between."""
    x = torch.logspace(-4, 1, 4000, dtype=torch.float64)
    found = jacobian_density(nn.LeakyReLU(0.3), 1.2, 0.1, 3, "orthogonal", x)
    assert len(found.atoms) == 0
    mass = torch.trapezoid(found.density * x, x.log())
    assert mass.item() == pytest.approx(1, abs=1e-3)
    seen = x[found.density > 0]
    assert seen.min() > (1.2 * 0.3) ** 6
    edge = jacobian_moments(nn.LeakyReLU(0.3), 1.2, 0.1, 3, "orthogonal").maximum
    assert seen.max().item() == pytest.approx(edge.item(), rel=3e-3)  # the grid


@pytest.mark.slow
def test_atoms_where_most_units_let_everything_through():
    """Hard tanh with P(|u| < 1) = p: mass 1 − p at 0, and L p − (L − 1) at σ_w^{2L}."""
    from ntk_callbacks.theory import mean_field, moment

    p = moment("hard_tanh", mean_field("hard_tanh", 1.1, ROOT).q, derivative=1).item()
    x = torch.logspace(-14, 0.3, 4000, dtype=torch.float64)
    found = jacobian_density("hard_tanh", 1.1, ROOT, 2, "orthogonal", x)
    assert found.atoms.tolist() == pytest.approx([0, 1.1**4])
    assert found.masses.tolist() == pytest.approx([1 - p, 2 * p - 1])
    mass = torch.trapezoid(found.density * x, x.log()) + found.masses.sum()
    assert mass.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("activation", "atoms", "masses"),
    [
        ("linear", [1.5**4], [1.0]),
        ("abs", [1.5**4], [1.0]),
        (PiecewiseLinear(0.5, 0.5), [0.75**4], [1.0]),
    ],
)
def test_isometries_are_one_atom(activation, atoms, masses):
    x = torch.tensor([1.0], dtype=torch.float64)
    found = jacobian_density(activation, 1.5, 0.0, 2, "orthogonal", x)
    assert found.density.item() == 0
    assert found.atoms.tolist() == pytest.approx(atoms)
    assert found.masses.tolist() == masses


def test_one_orthogonal_layer_has_the_slopes_of_its_units():
    x = torch.tensor([1.0], dtype=torch.float64)
    found = jacobian_density("leaky_relu", 1.0, 0.1, 1, "orthogonal", x)
    assert found.atoms.tolist() == pytest.approx([1e-4, 1.0])
    assert found.masses.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("weights", quick(["gaussian", "orthogonal"], "gaussian"))
def test_histogram_of_a_wide_relu_network(weights):
    """Eight seeds of n = 300: shares of s² in five bins."""
    n, depth, counts = 300, 3, torch.zeros(5, dtype=torch.float64)
    bins = torch.tensor([1e-4, 0.1, 0.7, 2.0, 4.0, 30.0], dtype=torch.float64)
    for _ in range(8):
        j = torch.eye(n, dtype=torch.float64)
        for _ in range(depth):
            w = torch.randn(n, n, dtype=torch.float64) / n**0.5
            w = torch.linalg.qr(w)[0] if weights == "orthogonal" else w
            mask = torch.rand(n, dtype=torch.float64) < 0.5
            j = mask[:, None] * (2**0.5 * w @ j)
        squares = torch.linalg.svdvals(j) ** 2
        counts += torch.histogram(squares, bins).hist / (8 * n)
    for k in range(5):
        x = torch.logspace(bins[k].log10().item(), bins[k + 1].log10().item(), 600)
        x = x.double()
        found = jacobian_density("relu", 2**0.5, 0.0, depth, weights, x).density
        mass = torch.trapezoid(found * x, x.log())
        assert mass.item() == pytest.approx(counts[k].item(), abs=0.012)


def test_bad_arguments_are_refused():
    for bad in (0.0, -1.0, math.nan, math.inf):
        x = torch.tensor([1.0, bad])
        with pytest.raises(ValueError, match="expected s² > 0"):
            fuss_catalan_density(x, 2)
        with pytest.raises(ValueError, match="expected s² > 0"):
            jacobian_density("relu", 1.0, 0.0, 2, "gaussian", x)
    bare = inspect.unwrap(fuss_catalan_density)
    for x in (torch.tensor(1.0), torch.ones(2, 3), torch.ones(2) * 1j):
        with pytest.raises(ValueError, match="expected a list of real s²"):
            bare(x, 2)
    none = torch.ones(0)
    assert jacobian_density("relu", 1.0, 0.1, 2, "gaussian", none).density.shape == (0,)
    assert fuss_catalan_density(none, 2).shape == (0,)
    with pytest.raises(ValueError, match="depth is 0"):
        fuss_catalan_density(torch.ones(1), 0)
    with pytest.raises(ValueError, match="depth is 0"):
        jacobian_density("relu", 1.0, 0.0, 0, "gaussian", torch.ones(1))
