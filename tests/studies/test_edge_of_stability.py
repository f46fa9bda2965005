"""Sharpness, its edge and the Hessian, from small runs and dense matrices."""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.studies.edge_of_stability import (
    EdgeOfStability,
    hessian_max,
    late_share,
)

STUDY = EdgeOfStability(
    {"gd": [0.3], "momentum": [0.3], "adam": [0.01]},
    dict.fromkeys(("gd", "momentum", "adam"), 3),
    seeds=1,
    width=4,
    examples=10,
)


def dense_hessian(net, x, y):
    names = [name for name, _ in net.named_parameters()]
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(vector):
        weights, start = {}, 0
        for name in names:
            p = net.get_parameter(name)
            weights[name] = vector[start : start + p.numel()].view(p.shape)
            start += p.numel()
        outputs = torch.func.functional_call(net, weights, (x,))
        return (outputs - y).square().sum() / (2 * len(x))

    return torch.autograd.functional.hessian(loss, flat)


def test_largest_eigenvalue_of_the_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    values = torch.linalg.eigvalsh(dense_hessian(net, x, y))
    assert hessian_max(net, x, y, rounds=300) == pytest.approx(float(values[-1]))


def test_sharpness_is_that_of_the_hessian_at_zero_loss(monkeypatch):
    # With targets that are the outputs themselves, nothing is left to learn.
    found = {}
    inner = hessian_max

    def at_own_outputs(model, x, y):
        found["hessian"] = inner(model, x, model(x).detach(), rounds=500)
        return 0.0

    monkeypatch.setattr(
        "ntk_callbacks.studies.edge_of_stability.hessian_max", at_own_outputs
    )
    torch.manual_seed(1)
    result = STUDY.run(**STUDY.jobs()["gd,rate=0.3,seed=0"], device="cpu")
    assert result["sharpness"][-1] == pytest.approx(found["hessian"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "edge"),
    [
        ("gd,rate=0.1,seed=0", 20.0),
        ("gd,rate=0.3,seed=0", 2 / 0.3),
        ("momentum,rate=0.3,seed=0", 10.0),  # 2 (1 + ½)/η
        ("adam,rate=0.01,seed=0", 3800.0),
    ],
)
def test_edge_of_each_optimizer(name, edge):
    result = STUDY.run(**STUDY.jobs()[name], device="cpu")
    assert result["edge"] == pytest.approx(edge)
    assert result["measured_at"] == [0, 1, 2, 3]
    assert math.isnan(result["sharpness"][0]) == name.startswith("adam")
    assert all(value > 0 for value in result["sharpness"][1:])


def test_findings_on_made_up_sharpness():
    made_up = {}
    for name, job in STUDY.jobs().items():
        ends = {"gd": [1.0, 9.0, 3.6], "adam": [math.nan, 5.0, 3.0]}
        sharpness = ends.get(job["kind"], [1.0, math.nan, math.nan])
        if job["rate"] == STUDY.small_rate:
            sharpness = [1.0, 2.0, 6.0]
        result = {"measured_at": [0, 2, 4], "sharpness": sharpness, "edge": 4.0}
        made_up[name] = {**job, **result, "hessian": 3.96, "loss": 0.0}
    numbers = STUDY.findings(made_up).numbers
    assert numbers["gd_lowest"] == numbers["gd_highest"] == pytest.approx(0.9)
    assert numbers["adam_mean"] == pytest.approx(1.0)
    assert math.isnan(numbers["momentum_lowest"])
    assert math.isnan(numbers["momentum_highest"])
    assert numbers["limit_over_edge"] == pytest.approx(1.5)
    assert numbers["hessian_difference"] == pytest.approx(0.1)
    assert math.isnan(late_share(made_up["momentum,rate=0.3,seed=0"], mean=False))
