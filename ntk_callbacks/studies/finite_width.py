"""`finite_width`: how far the kernel scatters over seeds, by depth and width.

Var Θ(x, x)/(E Θ(x, x))² of bias-free ReLU networks with L hidden layers of n units,
over many draws of the weights, beside its exact value. Its leading order is
L (11L + 7)/(3(L + 1) n): the kernel is certain only where depth over width is small.

References:
    Hanin, Nica 2020, arXiv:1909.05989; Roberts, Yaida, Hanin 2021, arXiv:2106.10165.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ntk_callbacks import theory
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOGETHER = 100  # networks whose gradients are held at once


@dataclass(frozen=True)
class FiniteWidth:
    """Variance of the kernel over seeds.

    Args:
        depths: Hidden layers.
        widths: Units of each.
        networks: Draws of the weights for every depth and width.
        inputs: Entries of the one input.
    """

    depths: list[int]
    widths: list[int]
    networks: int = 10_000
    inputs: int = 8

    def jobs(self) -> dict[str, dict[str, Any]]:
        """All networks of one depth and width each."""
        common = {"networks": self.networks, "inputs": self.inputs}
        return {
            f"depth={depth},width={width}": {"depth": depth, "width": width, **common}
            for depth in self.depths
            for width in self.widths
        }

    @staticmethod
    def run(
        *, depth: int, width: int, networks: int, inputs: int, device: str
    ) -> Result:
        """Mean and variance of Θ(x, x), from many networks at a time."""
        x = torch.ones(1, inputs, device=device)
        model = MLP((inputs,), 1, width, depth, "relu", "ntk", math.sqrt(2), 0.0).to(x)

        def output(weights: dict[str, Tensor]) -> Tensor:
            value: Tensor = functional_call(model, weights, (x,))
            return value.sum()

        shapes = {name: p.shape for name, p in model.named_parameters()}
        kernels: list[Tensor] = []
        while len(kernels) < networks:
            some = min(_TOGETHER, networks - len(kernels))
            drawn = {
                name: torch.randn(some, *shape, device=device)
                for name, shape in shapes.items()
            }
            gradients = vmap(grad(output))(drawn).values()
            squares = sum(g.flatten(1).square().sum(1) for g in gradients)
            kernels += squares.double().cpu().view(-1, 1, 1).unbind()
        # The last of them by the engine too.
        model.load_state_dict({name: w[-1] for name, w in drawn.items()})
        last = float(empirical_ntk(model, x, outputs="trace"))
        found = theory.seed_statistics(kernels)
        mean = float(found.mean)
        return {
            "mean": mean,
            "relative_variance": float(found.relative_variance),
            "error": float(found.variance_error) / mean**2,
            "engine_difference": abs(last / float(kernels[-1]) - 1),
        }

    def findings(self, results: Results) -> Findings:
        """Measured, exact and leading-order relative variance."""
        table: list[dict[str, float | str]] = []
        for r in results.values():
            depth, width = r["depth"], r["width"]
            exact = theory.ntk_relative_variance([width] * depth)
            mean = theory.ntk_mean(1.0, depth=depth)
            table.append(
                {
                    "depth": depth,
                    "width": width,
                    "mean_ratio": r["mean"] / mean,
                    "relative_variance": r["relative_variance"],
                    "exact": exact,
                    "ratio": r["relative_variance"] / exact,
                    "standard_error": r["error"] / exact,
                }
            )
        return Findings(
            table,
            {
                "worst_variance_error": max(abs(float(t["ratio"]) - 1) for t in table),
                "worst_mean_error": max(abs(float(t["mean_ratio"]) - 1) for t in table),
                "engine_difference": max(
                    r["engine_difference"] for r in results.values()
                ),
            },
        )

    def draw(self, results: Results, figure: "Figure") -> None:
        """Relative variance against depth over width, theory dashed."""
        axes = figure.subplots()
        for number, width in enumerate(self.widths):
            color = f"C{number}"
            rows = [r for r in results.values() if r["width"] == width]
            axes.errorbar(
                [r["depth"] / width for r in rows],
                [r["relative_variance"] for r in rows],
                [2 * r["error"] for r in rows],
                fmt="o",
                color=color,
                label=f"width {width}, measured ± 2 standard errors",
            )
            depths = range(min(self.depths), max(self.depths) + 1)
            exact = [theory.ntk_relative_variance([width] * d) for d in depths]
            leading = [
                theory.ntk_relative_variance_at_large_width(width, d) for d in depths
            ]
            ratios = [d / width for d in depths]
            axes.plot(ratios, exact, "--", color=color, label=f"width {width}, exact")
            axes.plot(ratios, leading, ":", color=color, label="leading order in 1/n")
        axes.set_xlabel("depth over width (layers per unit)")
        axes.set_ylabel("variance of Θ(x, x) over its squared mean")
        axes.legend()
