"""`batchnorm_explosion`: batch normalization makes gradients explode in deep networks.

Layers h = W φ(BN(h)) of n units without bias, W ~ N(0, 1/n), and a random gradient at
the last one. From each layer down to the one before, its mean square grows by
(B − 2)/(B − 3) in linear networks with batches of B, by π/(π − 1) with ReLU and B → ∞,
whatever the scale of the weights: no initialization prevents it.

What it is good for stands beside: the tangent kernel at the start is conditioned better
with it. Without, the outputs have a common mean and examples grow alike from layer to
layer: λ_max is of the order n of all examples together, where BatchNorm keeps them
apart.

References:
    Yang, Pennington, Rao, Sohl-Dickstein, Schoenholz 2019, arXiv:1902.08129; Karakida,
    Akaho, Amari 2019, arXiv:1906.02926 (normalization and sharpness).
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ntk_callbacks import theory
from ntk_callbacks.studies.batchnorm_conditioning import (
    conditioning_jobs,
    conditioning_means,
    kernel_conditioning,
)
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BatchNormExplosion:
    """Growth of gradients per layer.

    Args:
        linear_batches: Sizes of a batch for linear networks, at least 4.
        relu_batches: The same for networks of ReLU.
        width: Units of a layer; many more than a batch times the depth.
        depth: Layers.
        skip: First layers whose signal is not at its fixed point yet.
        seeds: Networks for each size.
        kernel_depths: Hidden layers of the networks whose kernels are compared.
        kernel_examples: Digits that kernels are of.
        kernel_width: Units of their hidden layers.
    """

    linear_batches: list[int]
    relu_batches: list[int]
    width: int = 1000
    depth: int = 16
    skip: int = 4
    seeds: int = 4
    kernel_depths: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    kernel_examples: int = 32
    kernel_width: int = 128

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network and batch each."""
        common = {"width": self.width, "depth": self.depth}
        kernels = conditioning_jobs(
            self.kernel_depths,
            examples=self.kernel_examples,
            width=self.kernel_width,
            seeds=self.seeds,
        )
        return kernels | {
            f"{activation},batch={batch},seed={seed}": {
                "activation": activation,
                "batch": batch,
                "seed": seed,
                **common,
            }
            for activation, batches in self._batches().items()
            for batch in batches
            for seed in range(self.seeds)
        }

    def _batches(self) -> dict[str, list[int]]:
        return {"linear": self.linear_batches, "relu": self.relu_batches}

    @staticmethod
    def run(*, seed: int, **parameters: Any) -> Result:
        """Mean squares of the gradient at each layer, or conditioning of a kernel."""
        if "kind" in parameters:
            return kernel_conditioning(**parameters)
        return _gradients(**parameters)

    def _growth(self, results: Results, activation: str, batch: int) -> float:
        logs = [
            math.log(r["squares"][self.skip] / r["squares"][-1])
            / (self.depth - self.skip)
            for r in results.values()
            if r.get("activation") == activation and r["batch"] == batch
        ]
        return math.exp(sum(logs) / len(logs))

    def findings(self, results: Results) -> Findings:
        """Growth per layer beside that of theory, and conditioning."""
        table: list[dict[str, float | str]] = []
        means = conditioning_means(results, self.kernel_depths)
        numbers = {
            f"least_{name}_ratio": min(
                plain / kinds["normalized"][depth]
                for depth, plain in kinds["plain"].items()
            )
            for name, kinds in means.items()
        }
        for activation, batches in self._batches().items():
            errors = []
            for batch in batches:
                growth = self._growth(results, activation, batch)
                expected = float(theory.batch_norm_mean_field(activation, batch).growth)
                errors.append(abs(growth / expected - 1))
                numbers[f"{activation}_growth_{batch}"] = growth
                table.append(
                    {
                        "activation": activation,
                        "batch": batch,
                        "growth": growth,
                        "theory": expected,
                    }
                )
            numbers[f"{activation}_worst_error"] = max(errors)
        numbers["relu_growth"] = self._growth(results, "relu", max(self.relu_batches))
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Growth per layer against the size of the batch, theory dashed; kernels."""
        axes, right = figure.subplots(1, 2)
        self._draw_conditioning(results, right)
        for (activation, batches), color in zip(
            self._batches().items(), ("C0", "C1"), strict=True
        ):
            measured = [self._growth(results, activation, b) for b in batches]
            expected = [
                float(theory.batch_norm_mean_field(activation, b).growth)
                for b in batches
            ]
            axes.plot(batches, measured, "o", color=color, label=f"{activation}, mean")
            axes.plot(
                batches, expected, "--", color=color, label=f"{activation}, theory"
            )
        limit = math.pi / (math.pi - 1)
        axes.axhline(limit, color="C1", linestyle=":", label="π/(π − 1)")
        axes.set_xscale("log", base=2)
        ticks = sorted({*self.linear_batches, *self.relu_batches})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("batch size (examples)")
        axes.set_ylabel("growth of the squared gradient per layer (factor)")
        axes.legend()

    def _draw_conditioning(self, results: Results, axes: "Axes") -> None:
        means = conditioning_means(results, self.kernel_depths)
        labels = {"plain": "without", "normalized": "with BatchNorm"}
        for name, style, what in (
            ("condition", "o-", "λ_max/λ_min"),
            ("sharpness", "s:", "λ_max/mean λ"),
        ):
            for (kind, label), color in zip(labels.items(), ("C2", "C3"), strict=True):
                values = means[name][kind]
                axes.plot(
                    list(values),
                    list(values.values()),
                    style,
                    color=color,
                    label=f"{what}, {label}",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(self.kernel_depths, [str(d) for d in self.kernel_depths])
        axes.set_xlabel("depth (hidden layers)")
        axes.set_ylabel("conditioning of the kernel at the start")
        axes.set_ylim(top=8 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize="small")


def _gradients(
    *, activation: str, batch: int, width: int, depth: int, device: str
) -> Result:
    """Mean squares of the gradient at each layer, first to last."""
    phi = nn.ReLU() if activation == "relu" else nn.Identity()
    normalize = nn.BatchNorm1d(width, affine=False, track_running_stats=False)
    normalize.to(device)
    h = torch.randn(batch, width, device=device, requires_grad=True)
    layers = [h]
    for _ in range(depth):
        weight = torch.randn(width, width, device=device) / math.sqrt(width)
        h = phi(normalize(h)) @ weight.T
        layers.append(h)
    gradients = torch.autograd.grad(h, layers, torch.randn_like(h))
    return {"squares": [float(g.double().square().mean()) for g in gradients]}
