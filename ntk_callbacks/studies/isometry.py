"""`isometry`: singular values of ∂f/∂x, from Gaussian and from orthogonal weights.

At a critical point the mean of s² is 1 at any depth L. How far the s² scatter about it
depends on the weights: Var s² = L (μ₂/μ₁² − 1 − s₁), μ_k = E φ'^{2k}, with s₁ = −1 for
Gaussian and 0 for orthogonal ones. Orthogonal weights therefore bring tanh networks
near isometry, and deep ones learn digits in fewer updates, each kind with the best of a
few learning rates.

The mean itself scatters over networks by about √(L/n): variances and edges are taken
relative to it. Edges are those of infinite width. Gaussian products of n = 400 fall
short of them by 3 % at L = 2, by 5 % at 4 and 13 % at 16, half of that at n = 800:
they are held to the edge at `linear_edge_depth`, ReLU networks at `relu_edge_depth`.

References:
    Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735; 2018, arXiv:1802.09979.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ntk_callbacks import theory
from ntk_callbacks.studies.critical_networks import (
    ACTIVATIONS,
    isometry_gap,
    spectrum,
    training,
)
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = ("gaussian", "orthogonal")
_CASES = [("linear", "gaussian")] + [
    (activation, weights)
    for activation in ("relu", "tanh", "hard_tanh")
    for weights in _KINDS
]


@dataclass(frozen=True)
class Isometry:
    """Spectra of input-output Jacobians, and what they mean for training.

    Args:
        depths: Layers L of the networks whose spectra are taken, increasing.
        learning_rates: Of plain gradient descent, for networks that learn.
        linear_edge_depth: The L at which the edge of linear networks is looked up.
        relu_edge_depth: The same of ReLU.
        width: Units n.
        seeds: Networks for each activation and kind of weights.
        linear_depth: Layers of the linear orthogonal network.
        trained_depth: Hidden layers of the tanh networks that learn.
        trained_width: Their units.
        trained_seeds: How many of them for each kind of weights.
        examples: Digits that they learn, all at once.
        steps: Updates at most.
        learned: Mean cross-entropy that they are to reach.
    """

    depths: list[int]
    learning_rates: list[float]
    linear_edge_depth: int = 2
    relu_edge_depth: int = 4
    width: int = 400
    seeds: int = 20
    linear_depth: int = 32
    trained_depth: int = 50
    trained_width: int = 100
    trained_seeds: int = 4
    examples: int = 100
    steps: int = 200
    learned: float = 0.5

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each; those that learn with all learning rates."""
        spectra = {
            f"{activation},{weights},seed={seed}": {
                "part": "spectrum",
                "activation": activation,
                "weights": weights,
                "depths": self.depths,
                "width": self.width,
                "compare": seed == 0,
            }
            for activation, weights in _CASES
            for seed in range(self.seeds)
        }
        linear = {
            "part": "gap",
            "weights": "orthogonal",
            "depth": self.linear_depth,
            "width": self.width,
        }
        learning = {
            f"training,{weights},seed={seed}": {
                "part": "training",
                "weights": weights,
                "depth": self.trained_depth,
                "width": self.trained_width,
                "examples": self.examples,
                "learning_rates": self.learning_rates,
                "steps": self.steps,
                "learned": self.learned,
            }
            for weights in _KINDS
            for seed in range(self.trained_seeds)
        }
        return {**spectra, "linear,orthogonal": linear, **learning}

    @staticmethod
    def run(*, part: str, device: str, **parameters: Any) -> Result:
        """The spectrum of a network, or how one learns."""
        parts: dict[str, Callable[..., Result]] = {
            "spectrum": spectrum,
            "gap": isometry_gap,
            "training": training,
        }
        return parts[part](device=device, **parameters)

    def findings(self, results: Results) -> Findings:
        """Means over networks beside infinite width, and updates until learned."""
        table: list[dict[str, float | str]] = []
        edges: dict[tuple[str, str, int], float] = {}
        for activation, weights in _CASES:
            jobs = _jobs(results, activation, weights)
            for k, depth in enumerate(self.depths):
                mean, spread, largest = (
                    sum(r["by_depth"][k][name] for r in jobs) / len(jobs)
                    for name in ("mean", "spread", "largest")
                )
                expected = theory.jacobian_moments(
                    activation, *_critical(activation), depth, _literal(weights)
                )
                edge = largest / mean / float(expected.maximum)
                edges[activation, weights, depth] = edge
                table.append(
                    {
                        "activation": activation,
                        "weights": weights,
                        "depth": depth,
                        "mean": mean,
                        "variance": spread,
                        "theory": float(expected.variance),
                        "ratio": spread / float(expected.variance),
                        "edge_ratio": edge,
                    }
                )
        errors = [abs(float(row["ratio"]) - 1) for row in table]
        speedups = [
            self._updates(_best(results, "gaussian", seed))
            / self._updates(_best(results, "orthogonal", seed))
            for seed in range(self.trained_seeds)
        ]
        return Findings(
            table,
            {
                "variance_worst_error": max(errors),
                "linear_edge": edges["linear", "gaussian", self.linear_edge_depth],
                "relu_edge": edges["relu", "orthogonal", self.relu_edge_depth],
                "linear_isometry_gap": results["linear,orthogonal"]["gap"],
                "engine_difference": max(
                    r.get("engine_difference", 0.0) for r in results.values()
                ),
                "least_speedup": min(speedups),
                "mean_speedup": sum(speedups) / len(speedups),
            },
        )

    def _updates(self, losses: list[float]) -> int:
        """Updates until learned; the most there are if it never is."""
        return max(len(losses) - 1, 1) if losses[-1] < self.learned else self.steps

    def draw(self, results: Results, figure: "Figure") -> None:
        """Spectra of the deepest networks, theory dashed, and the best losses."""
        *spectra, curves = figure.subplots(1, 3)
        for axes, weights in zip(spectra, _KINDS, strict=True):
            for number, activation in enumerate(ACTIVATIONS):
                if (activation, weights) in _CASES:
                    self._draw_spectrum(axes, results, activation, weights, number)
            axes.set_title(f"{weights} weights, {self.depths[-1]} layers", fontsize=9)
            axes.set_xlabel("log₁₀ s, s² in units of its mean")
            axes.set_ylabel("density of log₁₀ s, theory dashed")
            corner = "lower center" if weights == "gaussian" else "upper left"
            axes.legend(fontsize="small", loc=corner)
        for number, weights in enumerate(_KINDS):
            for seed in range(self.trained_seeds):
                losses = _best(results, weights, seed)
                label = weights if seed == 0 else None
                curves.plot(losses, color=f"C{number}", label=label)
        curves.set_title(f"tanh, {self.trained_depth} hidden layers", fontsize=9)
        curves.set_xlabel("updates, best learning rate")
        curves.set_ylabel("mean cross-entropy (nats)")
        curves.axhline(self.learned, color="0.6", linestyle=":", label="learned")
        curves.legend(fontsize="small")

    def _draw_spectrum(
        self, axes: "Axes", results: Results, activation: str, weights: str, color: int
    ) -> None:
        depth = self.depths[-1]
        pooled = torch.cat(
            [
                torch.tensor(r["squares"]) / r["by_depth"][-1]["mean"]
                for r in _jobs(results, activation, weights)
            ]
        ).double()
        # Half of a ReLU's directions are silent and have no logarithm.
        logs = 0.5 * pooled.clamp(min=1e-300).log10()
        edges = torch.linspace(-2, 1.2, 33, dtype=torch.float64)
        counts = torch.histogram(logs, edges).hist
        heights = counts / len(logs) / float(edges[1] - edges[0])
        axes.stairs(heights, edges, color=f"C{color}", label=activation)
        at = torch.linspace(-2, 1.2, 161, dtype=torch.float64)
        squared = 10 ** (2 * at)
        found = theory.jacobian_density(
            activation, *_critical(activation), depth, _literal(weights), squared
        )
        density = 2 * math.log(10) * squared * found.density
        axes.plot(at, density, "--", color=f"C{color}", linewidth=1)


def _critical(activation: str) -> tuple[float, float]:
    """σ_w and σ_b."""
    sigma_b = ACTIVATIONS[activation][1] ** 0.5
    return float(theory.critical_sigma_w(activation, sigma_b)), sigma_b


def _literal(weights: str) -> Any:
    return weights


def _jobs(results: Results, activation: str, weights: str) -> list[Result]:
    """Spectra of one kind of network."""
    found = [r for r in results.values() if r["part"] == "spectrum"]
    wanted = (activation, weights)
    return [r for r in found if (r["activation"], r["weights"]) == wanted]


def _best(results: Results, weights: str, seed: int) -> list[float]:
    """Losses with the learning rate that gets lowest first."""
    curves: list[list[float]] = results[f"training,{weights},seed={seed}"]["losses"]
    learned = results[f"training,{weights},seed={seed}"]["learned"]
    return min(curves, key=lambda c: (c[-1] >= learned, len(c), c[-1]))
