"""Conditioning of the tangent kernel at the start, with and without BatchNorm."""

import math
from typing import Any

import torch
from torch import nn

from ntk_callbacks import metrics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.studies.slopes import mean_by
from ntk_callbacks.studies.study import Result, Results
from ntk_callbacks.studies.tasks import digits


def conditioning_jobs(
    depths: list[int], *, examples: int, width: int, seeds: int
) -> dict[str, dict[str, Any]]:
    """One network for each depth and seed, with BatchNorm and without.

    Args:
        depths: Hidden layers.
        examples: Digits, the batch.
        width: Units of a hidden layer.
        seeds: Networks of each kind.

    Returns:
        Name of a job -> what `kernel_conditioning` takes.
    """
    return {
        f"kernel,{kind},depth={depth},seed={seed}": {
            "kind": kind,
            "depth": depth,
            "seed": seed,
            "examples": examples,
            "width": width,
        }
        for kind in ("plain", "normalized")
        for depth in depths
        for seed in range(seeds)
    }


def kernel_conditioning(
    *, kind: str, depth: int, examples: int, width: int, device: str
) -> Result:
    """Condition number of Θ on one batch, and how far λ_max is above the mean λ.

    A network of ReLU with W ~ N(0, 2/fan_in), without biases; BatchNorm stands before
    every ReLU and takes the statistics of the batch, so that Θ is that of all examples
    together.

    Args:
        kind: `"normalized"`, or `"plain"` without BatchNorm.
        depth: Hidden layers.
        examples: Digits.
        width: Units of a hidden layer.
        device: Where to compute.

    Returns:
        Logarithms: `log_condition`, of λ_max/λ_min, and `log_sharpness`, of λ_max over
        the mean eigenvalue: from 0 to log n.
    """
    x, _ = digits(examples, device=device)
    layers: list[nn.Module] = []
    fan_in = x.shape[1]
    for _ in range(depth):
        layers.append(_linear(fan_in, width, 2.0))
        if kind == "normalized":
            layers.append(
                nn.BatchNorm1d(width, affine=False, track_running_stats=False)
            )
        layers.append(nn.ReLU())
        fan_in = width
    model = nn.Sequential(*layers, _linear(fan_in, 1, 1.0)).to(x)
    # In train mode Θ is of the joint batch; without BatchNorm that changes nothing.
    ntk = empirical_ntk(model, x, outputs="trace", mode="train")
    values = torch.linalg.eigvalsh(ntk).flip(0)
    return {
        "log_condition": math.log(float(metrics.condition_number(values))),
        "log_sharpness": math.log(float(values[0] / values.mean())),
    }


def conditioning_means(
    results: Results, depths: list[int]
) -> dict[str, dict[str, dict[float, float]]]:
    """Geometric means over seeds.

    Args:
        results: Of all jobs of the study.
        depths: Those that were measured.

    Returns:
        `"condition"` or `"sharpness"` -> `"plain"` or `"normalized"` -> depth -> mean.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for name in ("condition", "sharpness"):
        found[name] = {}
        for kind in ("plain", "normalized"):
            some = {k: r for k, r in results.items() if r.get("kind") == kind}
            means = mean_by(some, "depth", f"log_{name}")
            found[name][kind] = {d: math.exp(means[d]) for d in sorted(depths)}
    return found


def _linear(fan_in: int, fan_out: int, variance: float) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, 0, math.sqrt(variance / fan_in))
    return layer
