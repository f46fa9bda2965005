"""The best time to stop against a search over many predicted trajectories."""

import math

import pytest
import torch
from feature_models import features, kernel

from ntk_callbacks.dynamics import early_stopping_time, gradient_flow


def test_a_closed_form():
    """One mode: f goes from 0 to 1, the test target u is met at e^(−λt) = 1 − u."""
    one = torch.ones(1, 1).double()
    for target, expected in ((0.3, -math.log(0.7)), (-1.0, 0.0), (1.5, math.inf)):
        found = early_stopping_time(
            2 * one,
            0 * one,
            one,
            ntk_test=2 * one,
            f0_test=0 * one,
            y_test=target * one,
        )
        assert found.item() == pytest.approx(expected / 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_a_search_over_time(seed):
    torch.manual_seed(seed)
    phi, phi_test = features(6, 2, 20), features(4, 2, 20)
    theta = torch.randn(20).double()
    y, y_test = phi @ theta, phi_test @ theta
    y = y + 0.5 * torch.randn_like(y)  # noise that is better not learned
    f0, f0_test = 0.1 * torch.randn_like(y), 0.1 * torch.randn_like(y_test)
    ntk, test = (
        kernel(phi, phi),
        {"ntk_test": kernel(phi_test, phi), "f0_test": f0_test},
    )
    found = early_stopping_time(ntk, f0, y, y_test=y_test, **test)

    def error(t):
        f = gradient_flow(ntk, f0, y, t, **test).test
        return (f - y_test).square().sum((-2, -1)) / 2

    grid = torch.cat([torch.logspace(-5, 5, 20001), torch.tensor([0.0, math.inf])])
    least = error(grid.double()).min()
    assert error(found) <= least * (1 + 1e-12)
    if 0 < found < math.inf:
        slope = (error(found * 1.001) - error(found * 0.999)) / (0.002 * found)
        assert slope.abs() < 1e-4 * error(torch.tensor(0.0))


def test_nothing_to_learn_from():
    zero, y = torch.zeros(2, 2), torch.ones(2)
    found = early_stopping_time(zero, 0 * y, y, ntk_test=zero, f0_test=0 * y, y_test=y)
    assert found == 0


def test_outputs_that_share_the_kernel():
    phi, phi_test = features(5, 1, 9), features(3, 1, 9)
    ntk, cross = kernel(phi, phi)[:, :, 0, 0], kernel(phi_test, phi)[:, :, 0, 0]
    y, y_test = torch.randn(5, 3).double(), torch.randn(3, 3).double()
    eye = torch.eye(3).double()
    found, full = (
        early_stopping_time(
            first,
            0 * y,
            y,
            ntk_test=second,
            f0_test=0 * y_test,
            y_test=y_test,
        )
        for first, second in (
            (ntk, cross),
            (ntk[:, :, None, None] * eye, cross[:, :, None, None] * eye),
        )
    )
    assert found.item() == pytest.approx(full.item(), rel=1e-9)
