"""`resnet_init`: residual networks need smaller branches the deeper they are.

Blocks x ← x + V φ(W x), where the entries of W and V have variance s/n. At s = 1, for
ReLU, the mean square of x and of gradients grow by 1 + s²/2 per block; for tanh x²
grows in proportion to depth l and gradients as exp(c √l), c = 1.0638: measured in wide
networks, once beside the recursion and once at great depth beside these limits.

Then networks of ReLU learn digits from a grid of scales and depths, at one learning
rate. The scale that learns fastest lies below the growth that is still harmless,
(1 + s²/2)^L: it falls with depth about as 1/√L, faster where the network is shallow.
With s = 1/√L deep networks train; with s = 1 they do at no learning rate of 13 decades.

References:
    Yang, Schoenholz 2017, arXiv:1712.08969.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntk_callbacks import theory
from ntk_callbacks.studies.residual_networks import PARTS
from ntk_callbacks.studies.slopes import log_log_slope
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ResNetInit:
    """Growth with depth, and the best scale of branches against depth.

    Args:
        depths: Blocks of the networks that learn.
        scales: s of their branches, rising.
        scaled_rates: Learning rates to choose from with s = 1/√L.
        unscaled_rates: And with s = 1, down to where nothing diverges.
        contrast_depth: L of these.
        width: Units where growth is measured.
        depth: Blocks there, for both activations.
        seeds: Networks there.
        deep_width: Units where the exponents of tanh are measured.
        deep_depth: Blocks there; exponents are fitted to the second half.
        deep_seeds: Networks there.
        inputs: Random inputs where growth is measured.
        learning_rate: At which scales are compared.
        units: Of networks that learn.
        examples: Digits, split evenly over the classes.
        steps: Updates of gradient descent.
        training_seeds: Networks for each setting.
    """

    depths: list[int]
    scales: list[float]
    scaled_rates: list[float]
    unscaled_rates: list[float]
    contrast_depth: int = 96
    width: int = 500
    depth: int = 50
    seeds: int = 10
    deep_width: int = 256
    deep_depth: int = 400
    deep_seeds: int = 6
    inputs: int = 64
    learning_rate: float = 0.03
    units: int = 48
    examples: int = 100
    steps: int = 60
    training_seeds: int = 2

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each, wide or learning."""
        wide = [
            ("relu", self.width, self.depth, self.seeds),
            ("tanh", self.width, self.depth, self.seeds),
            ("tanh", self.deep_width, self.deep_depth, self.deep_seeds),
        ]
        grown = {
            f"growth,{activation},depth={depth},seed={seed}": {
                "part": "growth",
                "seed": seed,
                "activation": activation,
                "width": width,
                "depth": depth,
                "examples": self.inputs,
            }
            for activation, width, depth, seeds in wide
            for seed in range(seeds)
        }
        settings = [
            (depth, scale, self.learning_rate)
            for depth in self.depths
            for scale in self.scales
        ]
        for scale, rates in self._contrast().values():
            settings += [(self.contrast_depth, scale, rate) for rate in rates]
        trained = {
            f"training,depth={depth},scale={scale:.4g},rate={rate:.4g},seed={seed}": {
                "part": "training",
                "seed": seed,
                "depth": depth,
                "scale": scale,
                "learning_rate": rate,
                "width": self.units,
                "examples": self.examples,
                "steps": self.steps,
            }
            for depth, scale, rate in settings
            for seed in range(self.training_seeds)
        }
        return grown | trained

    @staticmethod
    def run(*, part: str, seed: int, **parameters: Any) -> Result:
        """One network: growth of its signals, or what it learns."""
        return PARTS[part](**parameters)

    def _contrast(self) -> dict[str, tuple[float, list[float]]]:
        """Scales 1/√L and 1, and the learning rates that each may choose from."""
        return {
            "scaled": (1 / math.sqrt(self.contrast_depth), self.scaled_rates),
            "unscaled": (1.0, self.unscaled_rates),
        }

    def _logs(
        self, results: Results, activation: str, depth: int
    ) -> tuple[Tensor, Tensor]:
        """Means over seeds of ln p and of the log growth of gradients, by block."""
        chosen = [
            r
            for r in results.values()
            if (r["part"], r.get("activation"), r["depth"])
            == ("growth", activation, depth)
        ]
        signal = torch.tensor([r["signal"] for r in chosen], dtype=torch.float64)
        gradient = torch.tensor([r["gradient"] for r in chosen], dtype=torch.float64)
        return signal.log().mean(0), (gradient[:, :1] / gradient).log().mean(0)

    def _loss(self, results: Results, depth: int, scale: float, rate: float) -> float:
        """Mean over seeds of the final loss; infinite if one diverged."""
        losses = [
            math.inf if r["loss"] is None else r["loss"]
            for r in results.values()
            if r["part"] == "training"
            and (r["depth"], r["scale"], r["learning_rate"]) == (depth, scale, rate)
        ]
        return sum(losses) / len(losses)

    def _best(self, results: Results) -> dict[float, float]:
        """Depth -> the scale of the smallest loss."""
        best: dict[float, float] = {}
        for depth in self.depths:
            losses = {
                self._loss(results, depth, scale, self.learning_rate): scale
                for scale in self.scales
            }
            best[depth] = losses[min(losses)]
        return best

    def findings(self, results: Results) -> Findings:
        """Logs of growth, exponents at great depth, the best scale against depth."""
        numbers: dict[str, float] = {}
        for activation in ("relu", "tanh"):
            signal, gradient = self._logs(results, activation, self.depth)
            numbers |= {
                f"{activation}_growth": float((signal[-1] / self.depth).exp()),
                f"{activation}_log_signal": float(signal[-1]),
                f"{activation}_log_gradient": float(gradient[-1]),
            }
        signal, gradient = self._logs(results, "tanh", self.deep_depth)
        blocks = range(max(1, self.deep_depth // 2), self.deep_depth + 1)
        numbers["tanh_exponent"] = log_log_slope(
            {block: float(signal[block].exp()) for block in blocks}
        )
        # A slope against √l: what is left of ln growth once e is raised to it.
        numbers["tanh_gradient_rate"] = log_log_slope(
            {math.exp(block**0.5): float(gradient[block].exp()) for block in blocks}
        )
        best = self._best(results)
        numbers["best_scale_slope"] = log_log_slope(best)
        rises = [b / a for a, b in pairwise(best.values())]
        numbers["largest_rise"] = max(rises, default=math.nan)
        for name, (scale, rates) in self._contrast().items():
            losses = [self._loss(results, self.contrast_depth, scale, r) for r in rates]
            numbers[f"{name}_loss"] = min(losses)
        table: list[dict[str, float | str]] = [
            {
                "depth": depth,
                "best_scale": scale,
                "its_loss": self._loss(results, int(depth), scale, self.learning_rate),
                "growth": (1 + scale**2 / 2) ** depth,
            }
            for depth, scale in best.items()
        ]
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Growth against depth beside theory, and the loss by depth and scale."""
        left, middle, right = figure.subplots(1, 3)
        lines = [("relu", self.depth), ("tanh", self.depth), ("tanh", self.deep_depth)]
        for axes, kind in ((left, 0), (middle, 1)):
            for color, (activation, depth) in enumerate(lines):
                measured = self._logs(results, activation, depth)[kind]
                found = theory.residual_trajectory(activation, 1.0, 0.0, depth=depth)
                expected = (found.p.log(), found.log_gradient)[kind]
                some = range(1, depth + 1, max(1, depth // 25))
                axes.plot(
                    some,
                    [float(measured[i]) for i in some],
                    "o",
                    ms=3,
                    color=f"C{color}",
                    label=f"{activation}, {depth} blocks",
                )
                blocks = range(1, depth + 1)
                axes.plot(blocks, expected[1:], "--", color=f"C{color}")
            axes.set_xscale("log")
            axes.set_xlabel("depth (blocks)")
        left.set_ylabel("ln of the mean square of x")
        middle.set_ylabel("ln of the growth of squared gradients")
        left.legend(title="dashed: theory", fontsize="small", loc="upper left")
        self._draw_losses(results, right)
        figure.colorbar(right.collections[0], ax=right, label="log₁₀ of the final loss")

    def _draw_losses(self, results: Results, axes: "Axes") -> None:
        losses = torch.tensor(
            [
                [self._loss(results, d, s, self.learning_rate) for d in self.depths]
                for s in self.scales
            ]
        )
        # What diverged is left white.
        shown = torch.where(losses.isfinite(), losses.log10().clamp(max=1), torch.nan)
        axes.pcolormesh(self.depths, self.scales, shown, cmap="viridis")
        best = self._best(results)
        axes.plot(list(best), list(best.values()), "o-", color="C3", label="best")
        root = [d**-0.5 for d in self.depths]
        axes.plot(self.depths, root, "--", color="white", label="1/√depth")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(self.depths, [str(d) for d in self.depths])
        axes.minorticks_off()
        axes.set_xlabel("depth (blocks)")
        axes.set_ylabel("scale s of branches")
        axes.legend(fontsize="small", facecolor="0.7")
