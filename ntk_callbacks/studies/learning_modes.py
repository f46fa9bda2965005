"""`learning_modes`: each eigendirection of the kernel is learned at a rate of its own.

A wide network in NTK parametrization descends ½ Σ (f − y)² over all examples, odd
digits at y = 1 and even ones at −1. By the kernel at its start, Θ = V diag(λ) Vᵀ, the
residual in mode i shrinks by 1 − ηλᵢ a step; measured is the slope of log |vᵢ·(f − y)|
until e⁻² of it is left. Modes that hold almost nothing of the residual at the start are
left out: what leaks into them as the kernel moves, of order 1/width, is not small
beside them.

With wrong labels the modes that are learned last are mostly noise: the error on held
out examples has a minimum, at a time that the kernel foretells.

References:
    Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; Advani, Saxe 2017, arXiv:1710.03667;
    Yao, Rosasco, Caponnetto 2007, "On early stopping in gradient descent learning".
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.least_norm import TEST_DIGITS, wrong_labels
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits
from ntk_callbacks.studies.wide_network import early_stopping, mode_decay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = [c * 10.0**k for k in range(-4, 1) for c in (1, 2, 5)]  # of rates


@dataclass(frozen=True)
class LearningModes:
    """Decay of the residual mode by mode, and the best time to stop.

    Args:
        seeds: Networks for each of the two.
        width: Hidden units, of one layer.
        modes: How many of the largest eigenvalues.
        least_share: Of the norm of the residual, that a mode must hold at the start.
        examples: Digits whose modes are followed.
        steps: Updates for them.
        noisy_examples: Digits for early stopping.
        flipped: Share of wrong labels for early stopping.
        noisy_steps: Updates for it.
    """

    seeds: int = 3
    width: int = 2048
    modes: int = 10
    least_share: float = 0.01
    examples: int = 40
    steps: int = 80
    noisy_examples: int = 200
    flipped: float = 0.3
    noisy_steps: int = 1500

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each."""
        clean = {"examples": self.examples, "steps": self.steps, "flipped": 0.0}
        noisy = {
            "examples": self.noisy_examples,
            "steps": self.noisy_steps,
            "flipped": self.flipped,
        }
        return {
            f"{kind},seed={seed}": {
                "kind": kind,
                "seed": seed,
                "width": self.width,
                "modes": self.modes,
                **settings,
            }
            for kind, settings in (("decay", clean), ("stopping", noisy))
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        kind: str,
        seed: int,
        width: int,
        modes: int,
        examples: int,
        steps: int,
        flipped: float,
        device: str,
    ) -> Result:
        """Train one network, and compare it with what its kernel said."""
        del seed  # in the name of the job
        x, labels = digits(examples, device=device, dtype=torch.float32)
        y = _signs(wrong_labels(labels % 2, 2, flipped), x)
        seen, truth = digits(
            TEST_DIGITS, held_out=True, device=device, dtype=torch.float32
        )
        y_seen = _signs(truth % 2, x)
        x, seen = x - x.mean(0), seen - x.mean(0)
        model = MLP((x.shape[1],), 1, width, 1, "erf", "ntk", 1.5, 0.1).to(x)
        if kind == "decay":
            return mode_decay(model, x, y, count=modes, steps=steps)
        return early_stopping(model, x, y, seen, y_seen, steps=steps)

    def _kept(self, results: Results) -> Iterator[tuple[int, Result]]:
        """The modes that the rates are compared of: their number, and the job."""
        for r in results.values():
            if r["kind"] == "decay":
                for i, share in enumerate(r["shares"]):
                    if share >= self.least_share:
                        yield i, r

    def findings(self, results: Results) -> Findings:
        """Rates of the modes, and steps to the least error, beside the predicted."""
        table: list[dict[str, float | str]] = [
            {
                "what": f"rate of mode {i + 1}",
                "seed": r["seed"],
                "measured": r["measured"][i],
                "predicted": r["predicted"][i],
                "ratio": r["measured"][i] / r["predicted"][i],
            }
            for i, r in self._kept(results)
        ]
        rates = [abs(float(row["ratio"]) - 1) for row in table]
        stops = [r for r in results.values() if r["kind"] == "stopping"]
        table += [
            {
                "what": "steps to least error",
                "seed": r["seed"],
                "measured": r["best_step"],
                "predicted": r["predicted_step"],
                "ratio": r["best_step"] / r["predicted_step"],
            }
            for r in stops
        ]
        ratios = [r["best_step"] / r["predicted_step"] for r in stops]
        return Findings(
            table,
            {
                "worst_rate_error": max(rates, default=math.nan),
                "modes_compared": len(rates) / self.seeds,
                "least_stopping_ratio": min(ratios),
                "largest_stopping_ratio": max(ratios),
                "excess_error": max(r["error_there"] / r["best_error"] for r in stops),
                "overfitting": sum(r["last_error"] / r["best_error"] for r in stops)
                / len(stops),
                "kernel_change": max(r["kernel_change"] for r in results.values()),
            },
        )

    def draw(self, results: Results, figure: "Figure") -> None:
        """Residuals of one network, rates of all, and the error with wrong labels."""
        first, second, third = figure.subplots(1, 3)
        self._draw_decay(results["decay,seed=0"], first)
        for seed in range(self.seeds):
            kept = [(i, r) for i, r in self._kept(results) if r["seed"] == seed]
            second.loglog(
                [r["predicted"][i] for i, r in kept],
                [r["measured"][i] for i, r in kept],
                "o",
                label=f"network {seed + 1}",
                markersize=5,
                alpha=0.7,
            )
        ends = [rate for _, r in self._kept(results) for rate in r["predicted"]]
        if ends:
            line = [min(ends), max(ends)]
            second.loglog(line, line, "k--", label="equal")
            ticks = [t for t in _TICKS if line[0] / 1.5 < t < line[1] * 1.5]
            second.set_xticks(ticks, [f"{t:g}" for t in ticks])
            second.set_yticks(ticks, [f"{t:g}" for t in ticks])
            second.minorticks_off()
        second.set_xlabel("predicted rate, −log(1 − ηλ) (per step)")
        second.set_ylabel("measured rate (per step)")
        second.legend(fontsize="x-small")
        self._draw_stopping(results["stopping,seed=0"], third)

    def _draw_decay(self, r: Result, axes: "Axes") -> None:
        for i, curve in enumerate(r["curves"]):
            if r["shares"][i] < self.least_share:
                continue
            color = f"C{i % 10}"
            axes.plot(r["moments"], curve, color=color, label=f"mode {i + 1}")
            left = [math.exp(-r["predicted"][i] * t) for t in r["moments"]]
            axes.plot(r["moments"], left, "k--", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylim(1e-2, 1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("share of the residual left (predicted: dashed)")
        axes.legend(fontsize="xx-small", loc="upper right")

    def _draw_stopping(self, r: Result, axes: "Axes") -> None:
        for name, label, color in (
            ("train", "training digits", "C0"),
            ("test", "test digits", "C1"),
        ):
            axes.plot(r["moments"], r[name], color=color, label=label)
            axes.plot(r["moments"], r[f"{name}_predicted"], "k--", linewidth=0.8)
        axes.axvline(r["best_step"], color="0.5", label="least error")
        axes.axvline(
            r["predicted_step"], color="k", linestyle="--", label="least, predicted"
        )
        axes.set_xscale("log")
        axes.set_ylim(0, 1.5 * r["last_error"])
        axes.set_xlabel("step")
        axes.set_title(f"{r['flipped']:.0%} of labels wrong", fontsize="medium")
        axes.set_ylabel("mean squared error (predicted: dashed)")
        axes.legend(fontsize="x-small", loc="lower left")


def _signs(odd: Tensor, like: Tensor) -> Tensor:
    return (2 * odd[:, None] - 1).to(like)
