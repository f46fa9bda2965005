"""`loss_prediction`: what a step does to the loss, said by the kernel before it.

A network learns digits from minibatches. Before every update the change of the loss on
digits that it is not trained on is predicted to first order, ∇_f L · J Δθ, twice: with
the very step Δθ of the optimizer, and with that of plain gradient descent, for which it
is −η ∇_f L · Θ(probe, batch) ∇_f L. The first is right for any optimizer as long as its
steps are small: what it misses is of second order in them. The second is right for
plain SGD alone: momentum moves up to 1/(1 − β) times as far, and the steps of Adam do
not scale with the gradient at all.

References:
    Jacot, Gabriel, Hongler 2018, arXiv:1806.07572 (kernel gradient); Lee et al. 2019,
    arXiv:1902.06720; Kingma, Ba 2015, arXiv:1412.6980.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ntk_callbacks.callbacks.prediction import PredictionMonitor
from ntk_callbacks.experiments.data import Digits
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.experiments.module import Classifier
from ntk_callbacks.probe import Probe
from ntk_callbacks.studies.live import live_curves
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}
_CHANGES = ("actual", "optimizer", "gradient_flow")


@dataclass(frozen=True)
class LossPrediction:
    """Predicted and real changes of the loss.

    Args:
        rates: Optimizer, `sgd`, `momentum` (β = 0.9) or `adam` -> learning rates, the
            smallest of which makes the small steps.
        seeds: Networks for each rate.
        width: Units of a hidden layer.
        depth: Hidden layers.
        steps: Updates.
        batch: Examples of an update.
        probe: Held-out digits whose loss is predicted, split evenly over the classes.
    """

    rates: dict[str, list[float]]
    seeds: int = 2
    width: int = 128
    depth: int = 2
    steps: int = 60
    batch: int = 64
    probe: int = 128

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One run each."""
        common = {
            "width": self.width,
            "depth": self.depth,
            "steps": self.steps,
            "batch": self.batch,
            "probe": self.probe,
        }
        return {
            f"{optimizer},rate={rate:g},seed={seed}": {
                "optimizer": optimizer,
                "rate": rate,
                "seed": seed,
                **common,
            }
            for optimizer, rates in self.rates.items()
            for rate in rates
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        optimizer: str,
        rate: float,
        seed: int,
        width: int,
        depth: int,
        steps: int,
        batch: int,
        probe: int,
        device: str,
    ) -> Result:
        """Train with a PredictionMonitor, and return its curves."""
        model = MLP((1, 8, 8), 10, width, depth)
        module = Classifier(model, partial(_OPTIMIZERS[optimizer], lr=rate))
        x, labels = digits(probe, held_out=True, images=True, dtype=torch.float32)
        monitor = PredictionMonitor(Probe(x, labels), 1, on_error="raise")
        order = int(torch.randint(2**31, ()))
        curves = live_curves(
            module, Digits(batch, seed=order), [monitor], steps=steps, device=device
        )
        return {
            "step_error": max(curves["prediction/step_error"].values.tolist()),
            **{
                f"by_{name}": curves[f"prediction/loss_change_{name}"].values.tolist()
                for name in _CHANGES
            },
        }

    def _changes(
        self, results: Results, optimizer: str, rate: float
    ) -> dict[str, list[float]]:
        """Every update of all seeds."""
        chosen = [
            r
            for r in results.values()
            if r["optimizer"] == optimizer and r["rate"] == rate
        ]
        return {name: [v for r in chosen for v in r[f"by_{name}"]] for name in _CHANGES}

    def findings(self, results: Results) -> Findings:
        """What is explained at each rate, and how far plain gradient descent is off."""
        table: list[dict[str, float | str]] = []
        numbers = {"step_error": max(r["step_error"] for r in results.values())}
        for optimizer, rates in self.rates.items():
            for rate in sorted(rates):
                changes = self._changes(results, optimizer, rate)
                found = {
                    "explained": explained(changes["actual"], changes["optimizer"]),
                    "by_gradient_flow": explained(
                        changes["actual"], changes["gradient_flow"]
                    ),
                    "times_gradient_flow": slope(
                        changes["gradient_flow"], changes["actual"]
                    ),
                }
                table.append({"optimizer": optimizer, "rate": rate, **found})
                if rate == min(rates):
                    numbers |= {f"{optimizer}_{key}": v for key, v in found.items()}
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Real against predicted changes, of every update, with the diagonal."""
        panels = figure.subplots(1, len(self.rates), squeeze=False)[0]
        for axes, (optimizer, rates) in zip(panels, self.rates.items(), strict=True):
            changes = self._changes(results, optimizer, min(rates))
            actual = [1e3 * v for v in changes["actual"]]
            for name, label in (
                ("gradient_flow", "plain gradient descent"),
                ("optimizer", "step of the optimizer"),
            ):
                color = "C0" if name == "optimizer" else "C1"
                predicted = [1e3 * v for v in changes[name]]
                axes.plot(predicted, actual, ".", color=color, ms=3, label=label)
            ends = [min(actual), max(actual)]
            axes.plot(ends, ends, "k--", lw=1, label="as predicted")
            axes.set_title(f"{optimizer}, rate {min(rates):g}")
            axes.set_xlabel("predicted ΔL (10⁻³ nats)")
        panels[0].set_ylabel("ΔL of one update (10⁻³ nats)")
        panels[0].legend(fontsize="small", loc="upper left")


def explained(actual: list[float], predicted: list[float]) -> float:
    """Share of the real changes that was foretold, 1 − Σ|ΔL − predicted|/Σ|ΔL|.

    The mean over updates of what PredictionMonitor logs of each, weighted by |ΔL|, so
    that updates which change next to nothing count for nothing.

    Args:
        actual: ΔL of each update.
        predicted: What was said of it.

    Returns:
        A number in (−∞, 1]; NaN if nothing changed.

    Example:
        >>> explained([-1.0, -3.0], [-1.0, -2.0])
        0.75
    """
    whole = math.fsum(map(abs, actual))
    missed = math.fsum(abs(a - p) for a, p in zip(actual, predicted, strict=True))
    return 1 - missed / whole if whole else math.nan


def slope(predicted: list[float], actual: list[float]) -> float:
    """How many times as much as predicted came, Σ ΔL · predicted / Σ predicted².

    Args:
        predicted: What was said of each update.
        actual: Its ΔL.

    Returns:
        The a of ΔL ≈ a · predicted, by least squares; NaN if nothing was predicted.

    Example:
        >>> slope([-1.0, -2.0], [-10.0, -20.0])
        10.0
    """
    whole = math.fsum(p * p for p in predicted)
    shared = math.fsum(a * p for a, p in zip(actual, predicted, strict=True))
    return shared / whole if whole else math.nan
