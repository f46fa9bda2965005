"""How far parameters go, against the table and against the parameters themselves."""

import json
import math
from pathlib import Path

import pytest
import torch
from feature_models import features, kernel

from ntk_callbacks import as_matrix
from ntk_callbacks.dynamics import parameter_distance

TABLE = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "linear_dynamics.json").read_text()
)


def test_table():
    ntk, f0, y = (
        torch.tensor(TABLE[name], dtype=torch.float64) for name in ("ntk", "f0", "y")
    )
    found = parameter_distance(ntk, f0, y)
    assert found.item() == pytest.approx(TABLE["displacement"], rel=1e-14)
    residual = f0 - y
    expected = (residual @ torch.linalg.solve(ntk, residual)).sqrt()
    assert found.item() == pytest.approx(expected.item(), rel=1e-14)
    values = torch.linalg.eigvalsh(ntk).tolist()
    assert values == pytest.approx([0.47057217, 0.79365727, 2.23577055], abs=6e-9)


@pytest.mark.parametrize("t", [0.0, 0.3, 20.0, math.inf])
@pytest.mark.parametrize("p", [30, 4], ids=["regular", "singular"])
def test_in_the_space_of_parameters(t, p):
    """θ(t) = θ* + e^(−ΦᵀΦt)(θ₀ − θ*) with the nearest of the best θ*."""
    phi = features(5, 2, p)
    flat = phi.flatten(0, 1)
    theta = torch.randn(p, dtype=torch.float64)
    y = torch.randn(5, 2, dtype=torch.float64)
    best = theta + torch.linalg.pinv(flat) @ (y.flatten() - flat @ theta)
    moved = best
    if t < math.inf:
        moved = best + torch.matrix_exp(-flat.mT @ flat * t) @ (theta - best)
    expected = (moved - theta).norm().item()
    ntk, f0 = kernel(phi, phi), phi @ theta
    assert parameter_distance(ntk, f0, y, t).item() == pytest.approx(expected, rel=1e-9)
    found = parameter_distance(as_matrix(ntk), f0.flatten(), y.flatten(), [t, 0.0])
    assert found.tolist() == pytest.approx([expected, 0.0], rel=1e-9)


def test_outputs_that_share_the_kernel_move_parameters_of_their_own():
    phi = features(5, 1, 9)
    ntk = kernel(phi, phi)[:, :, 0, 0]
    f0, y = torch.randn(2, 5, 3, dtype=torch.float64)
    each = [parameter_distance(ntk, f0[:, k], y[:, k]) for k in range(3)]
    expected = torch.stack(each).square().sum().sqrt()
    found = parameter_distance(ntk, f0, y)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
