"""Residual networks: closed forms, tables of another recursion, real networks."""

import math

import pytest
import torch

from ntk_callbacks.theory import pair_moment, residual_trajectory


def test_relu_blocks_multiply_signals_and_gradients():
    """By 1 + σ_v² σ_w²/2 at every block, without biases."""
    found = residual_trajectory("relu", 1.2, 0.0, depth=10, p=0.7, branch_sigma_w=0.8)
    factors = (1 + 0.64 * 1.44 / 2) ** torch.arange(11, dtype=torch.float64)
    assert torch.allclose(found.p, 0.7 * factors, rtol=1e-12)
    assert torch.allclose(found.log_gradient.exp(), factors, rtol=1e-12)


def test_linear_blocks_with_biases():
    """p' = p + σ_v² (σ_w² p + σ_b²) + σ_a²; gradients grow by 1 + σ_v² σ_w²."""
    found = residual_trajectory(
        "linear", 0.5, 0.3, depth=2, p=2.0, branch_sigma_w=0.6, branch_sigma_b=0.2
    )
    p = 2.0
    for layer in (1, 2):
        p += 0.36 * (0.25 * p + 0.09) + 0.04
        assert found.p[layer].item() == pytest.approx(p, rel=1e-12)
        assert found.log_gradient[layer].item() == pytest.approx(layer * math.log(1.09))


# Block: p/l and log of the gradient over √l for tanh, σ_w = σ_v = 1 without biases,
# p₀ = 1: an independent recursion.
def test_tanh_blocks_grow_as_tabulated():
    found = residual_trajectory("tanh", 1.0, 0.0, depth=100)
    for layer, p, gradient in [
        (10, 6.776798, 2.64321),
        (50, 39.5935, 7.216100),
        (100, 84.449479, 10.54555),
    ]:
        assert found.p[layer].item() == pytest.approx(p, abs=6e-5)
        assert found.log_gradient[layer].item() == pytest.approx(gradient, abs=6e-6)


@pytest.mark.slow
def test_tanh_blocks_approach_their_power_laws():
    """p/l → σ_v² and log χ/√l → 2 (4/3)/√(2π) = 1.06385, from above."""
    found = residual_trajectory("tanh", 1.0, 0.0, depth=10_000)
    for layer, p, gradient in [
        (1000, 948.373238, 34.26509),
        (10_000, 9837.732879, 107.69755),
    ]:
        assert found.p[layer].item() == pytest.approx(p, abs=1e-5)
        assert found.log_gradient[layer].item() == pytest.approx(gradient, abs=6e-6)
    limit = 8 / 3 / math.sqrt(2 * math.pi)
    assert limit < found.log_gradient[-1].item() / 100 < 1.02 * limit


@pytest.mark.parametrize(
    ("name", "p", "gradient"),
    [("relu", 6.37622e8, 20.273255), ("linear", 1.1259e15, 34.657359)],
)
def test_fifty_blocks_of_homogeneous_networks(name, p, gradient):
    found = residual_trajectory(name, 1.0, 0.0, depth=50)
    assert found.p[-1].item() == pytest.approx(p, rel=1e-5)
    assert found.log_gradient[-1].item() == pytest.approx(gradient, abs=6e-7)


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_correlations_by_a_plain_loop(name):
    p, shared = 1.5, 0.3
    found = residual_trajectory(
        name, 1.1, 0.2, depth=6, p=p, c=0.2, branch_sigma_w=0.9, branch_sigma_b=0.1
    )
    for layer in range(1, 7):
        q, mixed = 1.21 * p + 0.04, 1.21 * shared + 0.04
        p += 0.81 * pair_moment(name, q, q, q).item() + 0.01
        shared += 0.81 * pair_moment(name, q, q, mixed).item() + 0.01
        assert found.p[layer].item() == pytest.approx(p, rel=1e-9)
        assert found.c[layer].item() == pytest.approx(shared / p, rel=1e-9)
    same = residual_trajectory(
        name, 1.1, 0.2, depth=6, p=1.5, branch_sigma_w=0.9, branch_sigma_b=0.1
    )
    assert torch.allclose(same.c, torch.ones(7, dtype=torch.float64), rtol=1e-15)
    assert torch.allclose(same.p, found.p, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "growth"), [("tanh", 7.216100), ("relu", 20.273255), ("linear", 34.657359)]
)
def test_wide_residual_networks(name, growth):
    """n = 500, 50 blocks, 10 seeds: log of the gradient's growth within 0.15."""
    n, depth, seeds = 500, 50, 10
    phi = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda x: 1.0 * x}[name]
    expected = residual_trajectory(name, 1.0, 0.0, depth=depth)
    assert expected.log_gradient[-1].item() == pytest.approx(growth, abs=6e-7)
    found, squares = [], []
    for _ in range(seeds):
        x = torch.randn(1, n, dtype=torch.float64)
        x = (x / x.square().mean().sqrt()).requires_grad_()
        h = x
        for _ in range(depth):
            w, v = torch.randn(2, n, n, dtype=torch.float64) / n**0.5
            h = h + phi(h @ w.T) @ v.T
        rows = []
        for direction in torch.randn(4, 1, n, dtype=torch.float64):
            loss = (h * direction).sum()
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            rows.append(gradient.square().sum() / direction.square().sum())
        found.append(torch.stack(rows).mean())
        squares.append(h.square().mean())
    assert torch.stack(found).mean().log().item() == pytest.approx(growth, abs=0.15)
    square = torch.stack(squares).mean().log()
    assert square.item() == pytest.approx(expected.p[-1].log().item(), abs=0.3)


def test_grid_agrees_with_its_cells_one_by_one():
    """A phase diagram over σ_w and σ_b, with other branches in other columns."""
    sigma_w = torch.tensor([0.5, 1.1, 2.0])
    sigma_b = torch.tensor([0.0, 0.4])
    arguments = {"depth": 5, "p": 0.8, "c": 0.3, "branch_sigma_b": 0.2}
    branches = torch.tensor([1.0, 0.7, 0.0])
    for name in ("tanh", "relu"):
        grid = residual_trajectory(
            name,
            sigma_w[None, :],
            sigma_b[:, None],
            branch_sigma_w=branches,
            **arguments,
        )
        assert grid.p.shape == grid.c.shape == grid.log_gradient.shape == (6, 2, 3)
        for i, j in [(0, 0), (1, 1), (0, 2), (1, 2)]:
            w, b, v = (t.item() for t in (sigma_w[j], sigma_b[i], branches[j]))
            cell = residual_trajectory(name, w, b, branch_sigma_w=v, **arguments)
            for part in ("p", "c", "log_gradient"):
                found = getattr(grid, part)[:, i, j]
                assert torch.allclose(found, getattr(cell, part), rtol=1e-12), part
        # Without a branch nothing happens to a gradient.
        assert (grid.log_gradient[:, :, 2] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": -1}, "depth is -1"),
        ({"p": 0.0}, "expected p above 0"),
        ({"p": -1.0}, "p is -1"),
        ({"c": 1.5}, "between -1 and 1"),
        ({"branch_sigma_w": -1.0}, "branch_sigma_w is -1"),
        ({"branch_sigma_b": math.nan}, "branch_sigma_b is nan"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        residual_trajectory("tanh", 1.0, 0.0, **{"depth": 2, **change})


def test_bad_scales_and_activations_are_refused():
    with pytest.raises(ValueError, match="sigma_w is -1"):
        residual_trajectory("tanh", -1.0, 0.0, depth=1)
    with pytest.raises(ValueError, match="expected one of"):
        residual_trajectory("tan", 1.0, 0.0, depth=1)
