"""The integrator against solutions in closed form, and its own coefficients."""

import math

import pytest
import torch

from ntk_callbacks.dynamics.runge_kutta import _ERROR, _STAGES, solution


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_an_oscillator():
    times = tensor([0.0, 20.0, 1.0, 1.0, 7.5])
    found = solution(lambda y: tensor([[0, 1], [-1, 0]]) @ y, tensor([1.0, 0.0]), times)
    expected = torch.stack([torch.cos(times), -torch.sin(times)], 1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-8)


def test_a_blow_up_near_its_pole():
    """ẏ = y²: y = 1/(1 − t)."""
    found = solution(lambda y: y**2, tensor([1.0]), tensor([0.5, 0.99]))
    assert torch.allclose(found[:, 0], tensor([2.0, 100.0]), rtol=1e-7, atol=0)
    with pytest.raises(ArithmeticError, match="stopped being finite at time 1"):
        solution(lambda y: y**2, tensor([1.0]), tensor([2.0]))


def test_a_stiff_decay_stays_stable():
    """Rates a thousand times apart, far past the end of the fast one."""
    rates = tensor([1000.0, 1.0])
    found = solution(lambda y: -rates * y, torch.ones(2).double(), tensor([5.0]))
    assert torch.allclose(found[0], tensor([0.0, math.exp(-5)]), rtol=0, atol=1e-8)


def test_the_tolerance_is_kept():
    errors = []
    for tolerance in (1e-4, 1e-7, 1e-10):
        found = solution(
            lambda y: -y, torch.ones(1).double(), tensor([1.0]), tolerance=tolerance
        )
        errors.append(abs(found.item() - math.exp(-1)))
        assert errors[-1] < 3 * tolerance
    assert errors[0] > errors[1] > errors[2]


def test_a_spike_is_not_stepped_over():
    """ẏ = ε/(ε² + (s − 1)²), ṡ = 1: an arc tangent with a sudden rise at s = 1."""
    width = 1e-3

    def spike(state):
        rise = width / (width**2 + (state[1] - 1) ** 2)
        return torch.stack([rise, torch.ones_like(rise)])

    found = solution(spike, torch.zeros(2).double(), tensor([2.0]))
    expected = 2 * math.atan(1 / width)
    # Some 240 steps, each within 1e-10 of the largest value so far.
    assert found[0, 0].item() == pytest.approx(expected, abs=2e-9)


def test_what_stands_still_takes_one_step():
    calls = []

    def still(y):
        calls.append(1)
        return torch.zeros_like(y)

    found = solution(still, torch.ones(2).double(), tensor([1e6]))
    assert torch.equal(found[0], torch.ones(2).double())
    assert len(calls) < 100


def test_a_fixed_step_is_of_fifth_order_and_its_estimate_of_fourth():
    """One step on ẏ = −y agrees with e^(−h) up to h⁵; the estimate starts at h⁵."""

    def step(h):
        y, slopes = 1.0, [-1.0]
        for weights in _STAGES:
            y_next = y + h * sum(w * s for w, s in zip(weights, slopes, strict=True))
            slopes.append(-y_next)
        estimate = h * sum(w * s for w, s in zip(_ERROR, slopes, strict=True))
        return abs(y_next - math.exp(-h)), abs(estimate)

    (coarse, guess), (fine, finer_guess) = step(0.2), step(0.1)
    assert math.log2(coarse / fine) == pytest.approx(6, abs=0.2)
    assert math.log2(guess / finer_guess) == pytest.approx(5, abs=0.2)
    for weights, node in zip(_STAGES, (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1), strict=True):
        assert sum(weights) == pytest.approx(node, abs=1e-13)
    assert sum(_ERROR) == pytest.approx(0, abs=1e-15)
