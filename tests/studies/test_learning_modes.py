"""Decay rates and stopping times of a linear model, where both are known exactly."""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.studies.learning_modes import LearningModes
from ntk_callbacks.studies.wide_network import decay_rate, early_stopping, mode_decay


def test_decay_rate():
    steps = torch.arange(200).double()
    decaying = 3 * torch.exp(-0.05 * steps) + 1e-9
    assert decay_rate(decaying) == pytest.approx(0.05, rel=1e-6)
    # What is below e⁻² of the start, after 40 steps, has no say.
    assert decay_rate(torch.where(steps > 41, 1.0, decaying)) == pytest.approx(0.05)
    assert decay_rate(decaying[:5]) == pytest.approx(0.05)
    assert math.isnan(decay_rate(decaying[:1]))


def linear():
    """f = w·x, of which XXᵀ is the kernel: diagonal, with eigenvalues 4, 1 and 1/4."""
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model, torch.diag(torch.tensor([2.0, 1.0, 0.5])).double()


def test_modes_of_a_linear_model():
    model, x = linear()
    y = torch.tensor([[3.0], [0.0], [-4.0]]).double()
    found = mode_decay(model, x, y, count=3, steps=60)
    rate = 0.2 * 2 / 4  # a fifth of the largest stable one
    expected = [-math.log(1 - rate * v) for v in (4.0, 1.0, 0.25)]
    assert found["predicted"] == pytest.approx(expected)
    assert found["measured"][::2] == pytest.approx(expected[::2])
    assert found["shares"] == pytest.approx([0.6, 0.0, 0.8])
    assert found["moments"][-1] == 60
    left = [(1 - rate / 4) ** step for step in found["moments"]]
    assert found["curves"][2] == pytest.approx(left)
    assert found["kernel_change"] == pytest.approx(0.0)


def test_early_stopping_of_a_linear_model():
    # The third target is half noise: best is to have learned just half of it.
    model, x = linear()
    y = torch.tensor([[1.0], [1.0], [1.0]]).double()
    truth = torch.tensor([[1.0], [1.0], [0.5]]).double()
    found = early_stopping(model, x, y, x, truth, steps=100)
    rate = 0.1
    factors = 1 - rate * torch.tensor([4.0, 1.0, 0.25]).double()
    powers = factors ** torch.arange(101).double()[:, None]
    errors = (1 - powers - truth.mT).square().mean(1)
    assert found["best_step"] == int(errors.argmin())
    assert found["best_error"] == pytest.approx(float(errors.min()))
    assert found["last_error"] == pytest.approx(float(errors[-1]))
    # Of gradient flow: zero of the derivative by bisection.
    low, high = 0.0, 20.0
    for _ in range(60):
        t = (low + high) / 2
        decay = [math.exp(-t * v) for v in (4.0, 1.0, 0.25)]
        slope = sum(
            (1 - e - float(u)) * e * v
            for e, u, v in zip(decay, truth, (4.0, 1.0, 0.25), strict=True)
        )
        low, high = (t, high) if slope < 0 else (low, t)
    assert found["predicted_step"] == pytest.approx(t / rate)
    for name in ("train", "test"):
        assert found[name] == pytest.approx(found[f"{name}_predicted"], abs=1e-12)


def test_findings():
    study = LearningModes(seeds=2, least_share=0.1)
    decay = {
        "kind": "decay",
        "kernel_change": 0.1,
        "shares": [0.9, 0.05],
        "measured": [1.04, 9.0],
        "predicted": [1.0, 1.0],
    }
    stop = {
        "kind": "stopping",
        "kernel_change": 0.2,
        "best_step": 90,
        "predicted_step": 100.0,
        "best_error": 0.5,
        "error_there": 0.51,
        "last_error": 0.7,
    }
    results = {
        "decay,seed=0": {**decay, "seed": 0},
        "decay,seed=1": {**decay, "seed": 1, "measured": [0.97, 0.0]},
        "stopping,seed=0": {**stop, "seed": 0},
        "stopping,seed=1": {**stop, "seed": 1, "best_step": 110, "last_error": 0.5},
    }
    found = study.findings(results)
    assert found.numbers == pytest.approx(
        {
            "worst_rate_error": 0.04,
            "modes_compared": 1.0,
            "least_stopping_ratio": 0.9,
            "largest_stopping_ratio": 1.1,
            "excess_error": 1.02,
            "overfitting": 1.2,
            "kernel_change": 0.2,
        }
    )
    assert [row["seed"] for row in found.table] == [0, 1, 0, 1]
