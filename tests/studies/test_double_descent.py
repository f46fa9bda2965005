"""Least-norm fits against the pseudoinverse, and what is found in made-up results."""

import math

import pytest
import torch

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.double_descent import DoubleDescent
from ntk_callbacks.studies.least_norm import (
    TEST_DIGITS,
    isotropic,
    random_features,
    small_network,
    wrong_labels,
)
from ntk_callbacks.studies.tasks import digits


@pytest.mark.parametrize("p", [3, 8, 20])
def test_linear_regression(p):
    torch.manual_seed(p)
    found = isotropic(p, examples=8, draws=2, noise=0.25, device="cpu")
    torch.manual_seed(p)
    for i in range(2):
        x = torch.randn(8, p, dtype=torch.float64)
        beta = torch.randn(p, 10, dtype=torch.float64)
        beta /= beta.square().sum(0).sqrt()
        y = x @ beta + 0.5 * torch.randn(8, 10, dtype=torch.float64)
        missed = torch.linalg.pinv(x) @ y - beta
        assert found["errors"][i] == pytest.approx(float(missed.square().sum() / 10))
        values = torch.linalg.svdvals(x) ** 2
        smallest = float(values[-1] / max(8, p))
        assert found["smallest"][i] == pytest.approx(smallest, rel=1e-6)
        condition = float(values[0] / values[-1])
        assert found["conditions"][i] == pytest.approx(condition, rel=1e-6)


@pytest.mark.parametrize("p", [10, 60])
def test_random_features(p):
    settings = {"examples": 30, "flipped": 0.2, "device": "cpu"}
    torch.manual_seed(p)
    found = random_features(p, draws=1, **settings)
    torch.manual_seed(p)
    x, labels = digits(30)
    seen, truth = digits(TEST_DIGITS, held_out=True)
    mean = x.mean(0)
    weight = MLP((64,), 10, p, 1, "relu", "ntk", 2**0.5, 0.0).hidden[0].weight
    y = torch.full((30, 10), -0.1).double()
    y[range(30), wrong_labels(labels, 10, 0.2)] = 0.9
    phi, phi_seen = ((u - mean) @ weight.detach().double().T for u in (x, seen))
    # σ_w/√fan_in = √2/8
    phi, phi_seen = (2**0.5 / 8 * u.clamp(min=0) for u in (phi, phi_seen))
    missed = phi_seen @ torch.linalg.pinv(phi) @ y
    missed[range(TEST_DIGITS), truth] -= 1
    error = float((missed + 0.1).square().sum(1).mean())
    assert found["errors"] == [pytest.approx(error)]
    smallest = float(torch.linalg.svdvals(phi)[-1] ** 2) / max(30, p)
    assert found["smallest"] == [pytest.approx(smallest)]


def test_every_parameter_of_a_small_network_counts():
    settings = {"inputs": 5, "examples": 20, "draws": 1, "flipped": 0.0, "steps": 3}
    found = small_network(3, **settings, device="cpu")
    assert found["smallest"][0] > 1e-6  # of 18 parameters, not of fewer
    torch.manual_seed(0)
    model = MLP((5,), 1, 3, 1, "erf", "ntk", 1.5, 0.0)
    assert sum(p.numel() for p in model.parameters()) == 18
    assert len(found["errors"]) == len(found["trained"]) == 1


def test_wrong_labels():
    labels = torch.arange(4).repeat(5000)
    found = wrong_labels(labels, 4, 0.3)
    assert float((found != labels).double().mean()) == pytest.approx(0.3, abs=0.015)
    shifts = ((found - labels) % 4).bincount(minlength=4)[1:] / len(labels)
    assert shifts.tolist() == pytest.approx([0.1] * 3, abs=0.01)
    assert wrong_labels(labels, 4, 0.0).equal(labels)


def made_up(kind, n):
    """Medians of errors 1/|p − n|, 5 at p = n."""
    return {
        f"{kind}{p}": {
            "kind": kind,
            "p": p,
            "errors": [5.0, 1 / (abs(p - n) + 0.001), 0.0],
            "trained": [0.5],
            "smallest": [abs(p - n) + 0.5],
            "conditions": [math.exp(2.0) * n**2, math.exp(4.0) * n**2],
        }
        for p in (n // 2, n - 1, n, n + 2, 5 * n)
    }


def test_findings():
    study = DoubleDescent([], [], [], linear_examples=60, examples=200, noise=0.25)
    results = {
        **made_up("linear", 60),
        **made_up("features", 200),
        **made_up("network", 200),
    }
    for p, error in ((30, 0.25 * 30 / 29 * 1.04), (300, 0.8 + 0.25 * 60 / 239)):
        results[f"linear{p}"]["errors"] = [0.5 * error, 1.5 * error]
    found = study.findings(results)
    numbers = found.numbers
    assert numbers["linear_worst_error"] == pytest.approx(0.04)  # 59, 60, 62 left out
    assert numbers["log_condition_number"] == pytest.approx(1.5)
    for kind in ("features", "network"):
        assert numbers[f"{kind}_peak"] == numbers[f"{kind}_eigenvalue_dip"] == 1
        assert numbers[f"{kind}_height"] == pytest.approx(5 * 800.001)  # of medians
    results["features200"]["errors"] = [0.0]
    results["network100"]["smallest"] = [0.0]
    numbers = study.findings(results).numbers
    assert numbers["features_peak"] == 199 / 200
    assert numbers["network_eigenvalue_dip"] == 0.5
    assert [row["trained"] for row in found.table[-5:]] == [0.5] * 5
    assert all(math.isnan(row["trained"]) for row in found.table[:-5])
    exact = {row["parameters"]: row["exact"] for row in found.table[:5]}
    assert exact[30] == pytest.approx(7.5 / 29)
    assert exact[300] == pytest.approx(0.8627615)
    assert math.isnan(exact[60])
