"""Eigendirections: what is measured in them decays as each one's eigenvalue says."""

import math

import pytest
import torch
from feature_models import features, kernel

from ntk_callbacks import as_matrix
from ntk_callbacks.dynamics import (
    eigenmodes,
    gradient_descent,
    gradient_flow,
    learning_times,
)


def problem(n=5, c=2, p=30):
    phi = features(n, c, p)
    f0, y = torch.randn(2, n, c, dtype=torch.float64)
    return kernel(phi, phi), f0, y


def test_modes_rebuild_the_kernel():
    ntk = problem()[0]
    modes = eigenmodes(ntk)
    v = modes.directions
    assert (modes.eigenvalues.diff() <= 0).all()
    rebuilt = v @ torch.diag(modes.eigenvalues) @ v.mT
    assert torch.allclose(rebuilt, as_matrix(ntk), rtol=0, atol=1e-13)
    assert torch.allclose(v.mT @ v, torch.eye(10).double(), rtol=0, atol=1e-13)


def test_components_of_a_known_kernel():
    """Θ = [[2, 1], [1, 2]]: λ = 3 along (1, 1)/√2, λ = 1 along (1, −1)/√2."""
    modes = eigenmodes(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    assert modes.eigenvalues.tolist() == pytest.approx([3, 1], abs=1e-14)
    found = modes.components(torch.tensor([3.0, 1.0])).abs()
    assert found.tolist() == pytest.approx([8**0.5, 2**0.5], abs=1e-14)


@pytest.mark.parametrize("t", [0.0, 0.3, 5.0])
def test_measured_residuals_decay_as_predicted(t):
    ntk, f0, y = problem()
    modes = eigenmodes(ntk)
    measured = modes.components(gradient_flow(ntk, f0, y, t).train - y)
    predicted = modes.decay(t) * modes.components(f0 - y)
    assert torch.allclose(measured, predicted, rtol=0, atol=1e-13)


def test_components_of_outputs_that_share_the_kernel():
    ntk = problem(c=1)[0][:, :, 0, 0]
    residual = torch.randn(5, 3, dtype=torch.float64)
    found = eigenmodes(ntk).components(residual)
    assert found.shape == (5, 3)
    for k in range(3):
        alone = eigenmodes(ntk).components(residual[:, k])
        assert torch.allclose(found[:, k], alone, rtol=0, atol=1e-14)


def test_decay_at_several_times_and_at_the_end():
    modes = eigenmodes(torch.diag(torch.tensor([2.0, 0.0])))
    found = modes.decay([0.0, 1.0, math.inf])
    expected = torch.tensor([[1, 1], [math.exp(-2), 1], [0, 1]], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)


def test_learning_times_are_when_the_fraction_is_left():
    ntk, f0, y = problem()
    modes = eigenmodes(ntk)
    start = modes.components(f0 - y)
    for fraction in (math.exp(-1), 0.01):
        times = learning_times(ntk, fraction=fraction)
        assert (times.diff() >= 0).all()
        for index, t in enumerate(times):
            left = modes.components(gradient_flow(ntk, f0, y, t).train - y)[index]
            assert (left / start[index]).item() == pytest.approx(fraction, rel=1e-10)


def test_what_is_never_learned_takes_forever():
    phi = features(4, 1, 2)
    times = learning_times(kernel(phi, phi))
    assert times.isinf().tolist() == [False, False, True, True]
    assert learning_times(torch.zeros(2, 2)).isinf().all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 2.0])
def test_loss_change_of_a_step_by_mode(rate):
    ntk, f0, y = problem()
    found = eigenmodes(ntk).loss_change(f0 - y, learning_rate=rate)
    after = gradient_descent(ntk, f0, y, learning_rate=rate, steps=1).train
    expected = ((after - y).square().sum() - (f0 - y).square().sum()) / 2
    assert found.sum().item() == pytest.approx(expected.item(), abs=1e-12)
    before, later = (eigenmodes(ntk).components(f - y) for f in (f0, after))
    each = (later.square() - before.square()) / 2
    assert torch.allclose(found, each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_fraction_outside_its_interval(fraction):
    with pytest.raises(ValueError, match=r"expected in \(0, 1\)"):
        learning_times(torch.eye(2), fraction=fraction)


def test_a_residual_of_another_size():
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 modes"):
        eigenmodes(torch.eye(2)).components(torch.ones(3))
