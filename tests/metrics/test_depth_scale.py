"""Depth scales of sequences that are known on paper."""

import math

import numpy as np
import pytest
import torch

from ntk_callbacks.metrics.depth import depth_scale_fit


def sequence(xi, limit, scale, count, noise=0.0, seed=0):
    depth = np.arange(count)
    scatter = noise * np.random.default_rng(seed).standard_normal(count)
    return torch.tensor(limit + scale * np.exp(-depth / xi) + scatter)


@pytest.mark.parametrize("xi", [0.3, 1.0, 4.0, 9.0])
@pytest.mark.parametrize(("limit", "scale"), [(2.0, 3.0), (0.0, -1.0), (1e-6, 1e-7)])
def test_exponentials_are_found_again(xi, limit, scale):
    fit = depth_scale_fit(sequence(xi, limit, scale, 12))
    assert fit.xi == pytest.approx(xi, rel=1e-4)
    assert fit.limit == pytest.approx(limit, abs=1e-4 * abs(scale))
    assert fit.r_squared == pytest.approx(1.0, abs=1e-9)


def test_slope_of_the_tail_is_the_slope_of_the_map():
    """A linear map v' = v* + 0.8 (v − v*) has ξ = −1/ln 0.8."""
    v, values = 5.0, []
    for _ in range(20):
        values.append(v)
        v = 1 + 0.8 * (v - 1)
    fit = depth_scale_fit(torch.tensor(values, dtype=torch.float64))
    assert fit.xi == pytest.approx(-1 / math.log(0.8), rel=1e-4)


def test_scatter_moves_the_fit_by_little():
    found = [
        depth_scale_fit(sequence(4, 1, 2, 20, noise=0.02, seed=seed)).xi
        for seed in range(20)
    ]
    # Each by 4 % or so, 20 of them by 1 %.
    assert np.mean(found) == pytest.approx(4, rel=0.03)
    assert max(found) < 5


@pytest.mark.parametrize(
    "values",
    [
        torch.full((12,), 0.3),  # settled from the start
        torch.full((12,), 0.3) + 1e-17,
        torch.arange(12.0),  # grows and grows
        torch.exp(torch.arange(12) / 4.0),  # moves away
        torch.tensor([0.0, 1.0] * 6),  # jumps
        torch.randn(12, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0]),  # at once
        sequence(1.0, 0, 1, 4),  # too few
        torch.empty(0),
        torch.tensor([4.0, 2.0, 1.0, torch.nan, 0.2, 0.1]),
        torch.tensor([torch.inf, 2.0, 1.0, 0.5, 0.2, 0.1]),
    ],
)
def test_where_there_is_no_fit(values):
    fit = depth_scale_fit(values.double())
    assert math.isnan(fit.xi)
    assert math.isnan(fit.limit)
    assert 0 <= fit.r_squared <= 1


def test_how_much_has_to_be_explained_can_be_chosen():
    values = sequence(3, 0, 1, 12, noise=0.2, seed=1)
    share = depth_scale_fit(values, least_r_squared=0.0).r_squared
    assert 0.3 < share < 0.9
    assert math.isnan(depth_scale_fit(values).xi)
    assert depth_scale_fit(values, least_r_squared=share - 1e-9).xi > 0
