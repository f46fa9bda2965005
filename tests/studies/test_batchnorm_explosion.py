"""Conditioning of kernels with and without BatchNorm, against plain autograd."""

import math

import pytest
import torch
from torch import nn

from ntk_callbacks.studies.batchnorm_conditioning import kernel_conditioning
from ntk_callbacks.studies.batchnorm_explosion import BatchNormExplosion
from ntk_callbacks.studies.tasks import digits


@pytest.mark.parametrize("kind", ["plain", "normalized"])
def test_conditioning_against_autograd(kind):
    """The same weights as plain tensors, BatchNorm by its formula."""
    torch.manual_seed(0)
    found = kernel_conditioning(kind=kind, depth=2, examples=10, width=16, device="cpu")
    torch.manual_seed(0)
    weights = []
    for fan_in, fan_out, variance in ((64, 16, 2), (16, 16, 2), (16, 1, 1)):
        weight = nn.Linear(fan_in, fan_out, bias=False).weight.detach()
        weight.normal_(0, math.sqrt(variance / fan_in))
        weights.append(weight.double().requires_grad_())
    h, _ = digits(10)
    for weight in weights[:2]:
        h = h @ weight.T
        if kind == "normalized":
            h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        h = h.clamp(min=0)
    rows = []
    for output in h @ weights[2].T:
        grads = torch.autograd.grad(output, weights, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    values = torch.linalg.svdvals(torch.stack(rows)).square()
    condition, sharpness = values[0] / values[-1], values[0] / values.mean()
    assert found["log_condition"] == pytest.approx(condition.log().item(), rel=1e-6)
    assert found["log_sharpness"] == pytest.approx(sharpness.log().item(), rel=1e-6)


def test_least_ratio_of_geometric_means():
    study = BatchNormExplosion([8], [16], depth=2, skip=0, kernel_depths=[1, 2])
    results = {
        f"{kind},{depth},{seed}": {
            "kind": kind,
            "depth": depth,
            "log_condition": math.log(condition) + (-1) ** seed,
            "log_sharpness": 0.0,
        }
        for kind, conditions in (("plain", (50, 60)), ("normalized", (10, 5)))
        for depth, condition in zip((1, 2), conditions, strict=True)
        for seed in (0, 1)
    } | {
        name: {"activation": name, "batch": batch, "squares": [9.0, 3.0, 1.0]}
        for name, batch in (("linear", 8), ("relu", 16))
    }
    numbers = study.findings(results).numbers
    assert numbers["least_condition_ratio"] == pytest.approx(5)
    assert numbers["least_sharpness_ratio"] == pytest.approx(1)
    assert numbers["relu_growth"] == pytest.approx(3)
