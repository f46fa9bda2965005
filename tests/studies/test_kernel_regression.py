"""Regression with kernels: the best heavy ball, and errors against loops and draws."""

import numpy as np
import pytest
import torch

from ntk_callbacks import dynamics
from ntk_callbacks.studies.descent import best_heavy_ball, descend
from ntk_callbacks.studies.kernel_regression import NAMES, KernelRegression
from ntk_callbacks.studies.tasks import digits

SPLIT = {"examples": 20, "held_out": 30, "depth": 1}


def run(job, **settings):
    return KernelRegression.run(job=job, device="cpu", **SPLIT, **settings)


def test_no_other_heavy_ball_is_faster():
    ntk = torch.diag(torch.tensor([50.0, 7.0, 1.0]).double())
    rate, momentum = best_heavy_ball(ntk)

    def slowest(rate, momentum):
        """The largest root of z² − (1 + β − ηλ) z + β over the eigenvalues."""
        roots = [
            abs(np.roots([1, rate * v - 1 - momentum, momentum]))
            for v in (50.0, 7.0, 1.0)
        ]
        return max(r.max() for r in roots)

    best = slowest(rate, momentum)
    assert best == pytest.approx(momentum**0.5, rel=1e-6)
    for factor in (0.9, 0.97, 1.03):
        assert slowest(rate * factor, momentum) > best + 1e-4
        assert slowest(rate, momentum * factor) > best + 1e-4


def test_infinite_width_against_ridgeless_least_squares():
    """One hidden layer of so many units that its features are the kernel, by NumPy."""
    found = run("infinite")
    x, labels = digits(20)
    x_test, labels_test = digits(30, held_out=True)
    both = torch.cat([x, x_test]).numpy()
    generator = np.random.default_rng(0)
    n = 40_000
    h = both @ generator.normal(size=(64, n)) * (2 / 64) ** 0.5
    h += 0.1 * generator.normal(size=n)
    nngp = 2 / n * np.maximum(h, 0) @ np.maximum(h, 0).T + 0.01
    slopes = 2 / n * (h > 0) @ (h > 0).T.astype(float)
    ntk = nngp + slopes * (2 / 64 * both @ both.T + 0.01)
    y = np.eye(10)[labels.numpy()] - 0.1
    y_test = np.eye(10)[labels_test.numpy()] - 0.1
    for name, kernel in (("nngp", nngp), ("ntk", ntk)):
        operator = kernel[20:, :20] @ np.linalg.inv(kernel[:20, :20])
        error = ((operator @ y - y_test) ** 2).mean()
        assert found[f"{name}_error"] == pytest.approx(error, rel=0.03)
    # The start of a network at infinite width, and what training leaves of it.
    root = np.linalg.cholesky(nngp + 1e-9 * np.eye(50))
    start = root @ generator.normal(size=(50, 20_000))
    left = start[20:] - operator @ start[:20]
    expected = error + (left**2).mean()
    assert found["expected_error"] == pytest.approx(expected, rel=0.03)


def test_long_training_ends_at_the_closed_form():
    whole = run("twin", width=64, precision=1e-6, most_steps=500)
    assert whole["twin_steps"] < 500
    assert whole["difference"] < 1e-3
    short = run("twin", width=64, precision=1e-6, most_steps=9)
    assert short["twin_steps"] == 9
    assert short["difference"] > 1e-2


def test_networks_of_one_start():
    """A wide network follows its linearization: the errors are those of its kernel."""
    found = run("network", width=1024, steps=300)
    assert found["loss_share"] < 1e-3
    for kernel, network in (("empirical", "centered"), ("linearized", "network")):
        assert found[f"{network}_error"] == pytest.approx(
            found[f"{kernel}_error"], rel=0.25
        )
    assert found["empirical_error"] < 0.8 * found["linearized_error"]


def test_means_and_worst():
    scores = {f"{name}_{what}": 0.5 for name in NAMES for what in ("accuracy", "error")}
    del scores["expected_accuracy"]
    other = {"linearized_error": 1.5, "network_accuracy": 0.3}
    results = {
        "infinite": {**scores, "expected_error": 2.0},
        "a": {"loss_share": 0.1, **other},
        "b": {"difference": 2.0, "twin_steps": 7},
        "c": {"difference": 1.0, "twin_steps": 9},
    }
    found = KernelRegression().findings(results)
    assert found.numbers["closed_form_difference"] == 2.0
    assert found.numbers["error_over_theory"] == 1.0 / 2.0
    assert found.numbers["ntk_minus_network"] == pytest.approx(0.1)
    assert [row["predictor"] for row in found.table] == [*NAMES.values()]


def test_a_stable_rate():
    x, y = torch.eye(3).double(), torch.ones(3, 1).double()
    model = torch.nn.Linear(3, 1, bias=False).double()
    rate, momentum = best_heavy_ball(x @ x.T)
    assert (rate, momentum) == (1.0, 0.0)
    assert rate < dynamics.max_learning_rate(x @ x.T)
    assert descend(model, x, y, learning_rate=rate, steps=1)[-1] < 1e-20
