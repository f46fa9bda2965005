"""`edge_of_chaos`: how deep a network may be to be trained, against σ_w.

Tanh networks with σ_b² = 0.05 learn digits by gradient descent with a fixed number of
updates, from the best of a few learning rates. For each σ_w the depth is raised until
they no longer do. Theory: what sets two inputs apart survives about ξ_c layers, so that
the greatest depth is a fixed multiple of ξ_c, and is reached next to the edge of chaos,
σ_w = 1.327, where ξ_c diverges. There finite width and the number of updates end it:
the proportionality is looked at where ξ_c is at most `largest_scale` layers.

References:
    Schoenholz, Gilmer, Ganguli, Sohl-Dickstein 2017, arXiv:1611.01232.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from ntk_callbacks import theory
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EdgeOfChaos:
    """Trained accuracy by depth and σ_w.

    Args:
        sigma_ws: σ_w, increasing.
        depths: Hidden layers, increasing.
        learning_rates: Of plain gradient descent on the mean cross-entropy.
        bias_variance: σ_b².
        largest_scale: ξ_c up to which the greatest depth is compared with it, layers.
        width: Units of a hidden layer.
        seeds: Networks of each σ_w and depth.
        examples: Digits, all of them in every update.
        steps: Updates at most.
        accuracy: Share of the examples that counts as trained, and ends a training.
    """

    sigma_ws: list[float]
    depths: list[int]
    learning_rates: list[float]
    bias_variance: float = 0.05
    largest_scale: float = 12.0
    width: int = 100
    seeds: int = 2
    examples: int = 100
    steps: int = 200
    accuracy: float = 0.9

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One σ_w and seed each, from shallow to deep."""
        common = {
            "bias_variance": self.bias_variance,
            "depths": self.depths,
            "learning_rates": self.learning_rates,
            "width": self.width,
            "examples": self.examples,
            "steps": self.steps,
            "accuracy": self.accuracy,
        }
        return {
            f"sigma_w={sigma_w},seed={seed}": {
                "sigma_w": sigma_w,
                "seed": seed,
                **common,
            }
            for sigma_w in self.sigma_ws
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        sigma_w: float,
        bias_variance: float,
        seed: int,
        depths: list[int],
        learning_rates: list[float],
        width: int,
        examples: int,
        steps: int,
        accuracy: float,
        device: str,
    ) -> Result:
        """Accuracy at each depth, up to the first that is not trained."""
        x, labels = digits(examples, device=device, dtype=torch.float32)
        reached: list[float] = []
        for depth in depths:
            best = 0.0
            sigma_b = math.sqrt(bias_variance)
            for rate in learning_rates:
                model = MLP(
                    (64,), 10, width, depth, "tanh", "standard", sigma_w, sigma_b
                )
                model.to(x)
                optimizer = torch.optim.SGD(model.parameters(), rate)
                for step in range(steps + 1):
                    outputs = model(x)
                    # A count: 0.9 in float32 is less than 0.9.
                    right = int((outputs.argmax(1) == labels).sum())
                    best = max(best, right / examples)
                    if best >= accuracy or step == steps:
                        break
                    optimizer.zero_grad()
                    functional.cross_entropy(outputs, labels).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                if best >= accuracy:
                    break
            reached.append(best)
            if best < accuracy:
                break
        return {"reached": reached}

    def findings(self, results: Results) -> Findings:
        """Greatest depths beside ξ_c, over the seeds in geometric mean."""
        scales, deepest = self._scales(), self._deepest(results)
        edge = float(theory.critical_sigma_w("tanh", math.sqrt(self.bias_variance)))
        table: list[dict[str, float | str]] = [
            {
                "sigma_w": sigma_w,
                "xi_c": scales[sigma_w],
                "deepest": deepest[sigma_w],
                "multiple": deepest[sigma_w] / scales[sigma_w],
            }
            for sigma_w in self.sigma_ws
        ]
        compared = [s for s in self.sigma_ws if scales[s] <= self.largest_scale]
        x = np.array([scales[s] for s in compared])
        y = np.array([deepest[s] for s in compared])
        multiple = math.exp(float(np.mean(np.log(y / x))))
        tied = [s for s in self.sigma_ws if deepest[s] == max(deepest.values())]
        best = sum(tied) / len(tied)
        cell = max((b - a for a, b in pairwise(self.sigma_ws)), default=math.nan)
        return Findings(
            table,
            {
                "depth_over_scale": multiple,
                "worst_factor": math.exp(float(np.abs(np.log(y / x / multiple)).max())),
                "correlation": _correlation(x, y),
                "cells_from_edge": abs(best - edge) / cell,
                "best_sigma_w": best,
            },
        )

    def _scales(self) -> dict[float, float]:
        """σ_w -> ξ_c."""
        sigma_b = math.sqrt(self.bias_variance)
        found = theory.mean_field(
            "tanh", torch.tensor(self.sigma_ws, dtype=torch.float64), sigma_b
        )
        return dict(zip(self.sigma_ws, found.xi_c.tolist(), strict=True))

    def _deepest(self, results: Results) -> dict[float, float]:
        """σ_w -> depth between the last that is trained and the first that is not."""
        found: dict[float, float] = {}
        for sigma_w in self.sigma_ws:
            logs = [
                math.log(greatest_depth(r["reached"], self.depths, self.accuracy))
                for r in results.values()
                if r["sigma_w"] == sigma_w
            ]
            found[sigma_w] = math.exp(sum(logs) / len(logs))
        return found

    def draw(self, results: Results, figure: "Figure") -> None:
        """Map of the accuracies tried, with multiples of ξ_c; depth against ξ_c."""
        left, right = figure.subplots(1, 2)
        rows = []
        for sigma_w in self.sigma_ws:
            columns = [r for r in results.values() if r["sigma_w"] == sigma_w]
            padded = [
                [*r["reached"], *[math.nan] * (len(self.depths) - len(r["reached"]))]
                for r in columns
            ]
            tried = np.ma.masked_invalid(np.array(padded))  # deeper ones were not
            rows.append(tried.mean(0).filled(math.nan))
        image = left.pcolormesh(
            self.sigma_ws,
            self.depths,
            np.array(rows).T,
            shading="nearest",
            cmap="viridis",
            vmin=0,
            vmax=1,
        )
        figure.colorbar(image, ax=left, label="accuracy on the training set (share)")
        fine = torch.linspace(min(self.sigma_ws), max(self.sigma_ws), 200).double()
        sigma_b = math.sqrt(self.bias_variance)
        scale = theory.mean_field("tanh", fine, sigma_b).xi_c.clamp(max=1e4)
        numbers = self.findings(results).numbers
        multiple = numbers["depth_over_scale"]
        left.plot(fine, multiple * scale, "w--", label=f"{multiple:.1f} ξ_c")
        left.plot(fine, scale, "w:", label="ξ_c")
        edge = float(theory.critical_sigma_w("tanh", sigma_b))
        left.axvline(edge, color="C3", linewidth=1, label=f"edge, {edge:.3f}")
        left.set_facecolor("0.6")  # not tried
        left.set_yscale("log")
        left.set_ylim(min(self.depths), max(self.depths))
        left.set_yticks(self.depths, [str(depth) for depth in self.depths])
        left.minorticks_off()
        left.set_xlabel("σ_w")
        left.set_ylabel("depth (hidden layers)")
        left.legend(fontsize="small", facecolor="0.5", labelcolor="w")
        scales, deepest = self._scales(), self._deepest(results)
        for label, ordered in (("ordered, σ_w", True), ("chaotic, σ_w", False)):
            chosen = [s for s in self.sigma_ws if (s < edge) == ordered]
            right.loglog(
                [scales[s] for s in chosen],
                [deepest[s] for s in chosen],
                "o",
                label=label + (" below the edge" if ordered else " above it"),
            )
        ends = np.array([min(scales.values()), self.largest_scale])
        right.loglog(ends, multiple * ends, "k--", label=f"{multiple:.1f} ξ_c")
        for axis, ticks in (
            (right.xaxis, [t for t in (4, 8, 16, 32, 64) if t < max(scales.values())]),
            (right.yaxis, self.depths),
        ):
            axis.set_ticks(ticks, [str(tick) for tick in ticks])
        right.minorticks_off()
        right.set_xlabel("depth scale ξ_c (layers)")
        right.set_ylabel("greatest depth that is trained (layers)")
        right.legend(fontsize="small")


def greatest_depth(reached: list[float], depths: list[int], accuracy: float) -> float:
    """Depth between the last that is trained and the first that is not, in logarithms.

    Args:
        reached: Accuracy at each depth, up to the first that is not trained.
        depths: Hidden layers, increasing.
        accuracy: What counts as trained.

    Returns:
        Their geometric mean; the end of `depths` where one of the two is beyond it.

    Example:
        >>> greatest_depth([1.0, 0.5], [4, 9, 16], 0.9)
        6.0
    """
    trained = [d for d, r in zip(depths, reached, strict=False) if r >= accuracy]
    if not trained:
        return float(depths[0])
    if len(trained) == len(depths):
        return float(depths[-1])
    return math.sqrt(trained[-1] * depths[len(trained)])


def _correlation(x: Any, y: Any) -> float:
    """Of logarithms; NaN where one of them does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(np.log(x), np.log(y))[0, 1])
