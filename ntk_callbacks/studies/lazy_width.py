"""`lazy_width`: wide networks barely move, and neither does their kernel.

Networks of several widths, in NTK parametrization, descend the squared error of digits
by full-batch gradient descent at the same share of the largest stable learning rate.
Against the width n: the change of the weights falls as n^−½ (first layer) and n^−1
(hidden layers), that of the kernel as n^−1 to n^−½, and the kernel at the start nears
that of infinite width as n^−½.

References:
    Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; Lee et al. 2019, arXiv:1902.06720.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ntk_callbacks import dynamics, metrics, theory
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import descend
from ntk_callbacks.studies.slopes import log_log_slope, mean_by
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import centered_one_hot, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LazyWidth:
    """Drift against width.

    Args:
        widths: Units of a hidden layer.
        seeds: Networks of each width.
        depth: Hidden layers.
        examples: Digits, split evenly over the classes.
        steps: Updates of gradient descent.
    """

    widths: list[int]
    seeds: int = 3
    depth: int = 2
    examples: int = 40
    steps: int = 200

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each."""
        common = {"depth": self.depth, "examples": self.examples, "steps": self.steps}
        return {
            f"width={width},seed={seed}": {"width": width, "seed": seed, **common}
            for width in self.widths
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *, width: int, seed: int, depth: int, examples: int, steps: int, device: str
    ) -> Result:
        """Train one network, and compare its kernels and weights."""
        x, labels = digits(examples, device=device)
        y = centered_one_hot(labels, 10, x)
        model = MLP((x.shape[1],), 10, width, depth, "erf", "ntk", 1.5, 0.1).to(x)
        infinite = theory.fully_connected(
            x.cpu(), depth=depth, activation="erf", sigma_w=1.5, sigma_b=0.1
        )
        start = empirical_ntk(model, x)
        before = [p.detach().clone() for p in model.parameters() if p.ndim == 2]
        rate = 0.5 * float(dynamics.max_learning_rate(start))
        losses = descend(model, x, y, learning_rate=rate, steps=steps)
        end = empirical_ntk(model, x)
        after = [p.detach() for p in model.parameters() if p.ndim == 2]
        moved = [
            float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)
        ]
        traced = torch.diagonal(start, dim1=2, dim2=3).mean(-1)
        return {
            "kernel_change": float(metrics.relative_change(end, start)),
            "kernel_error": float(metrics.relative_change(traced, infinite.ntk.to(x))),
            "outer": moved[0],
            "hidden": moved[1],
            "loss_share": losses[-1] / losses[0],
        }

    def findings(self, results: Results) -> Findings:
        """Slopes of the means over seeds, against width, in logarithms."""
        names = ("kernel_error", "kernel_change", "outer", "hidden", "loss_share")
        means = {name: mean_by(results, "width", name) for name in names}
        table: list[dict[str, float | str]] = [
            {"width": width, **{name: means[name][width] for name in names}}
            for width in self.widths
        ]
        slopes = {f"{name}_slope": log_log_slope(means[name]) for name in names[:-1]}
        return Findings(table, slopes)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Each quantity against width, with the slopes that theory expects."""
        axes = figure.subplots()
        labels = {
            "kernel_error": "kernel at start to infinite width, slope −½",
            "kernel_change": "kernel during training",
            "outer": "weights of the first layer, slope −½",
            "hidden": "weights of the second layer, slope −1",
        }
        for name, label in labels.items():
            means = mean_by(results, "width", name)
            axes.loglog(list(means), list(means.values()), "o-", label=label)
        axes.set_xlabel("width (units of a hidden layer)")
        axes.set_ylabel("relative change (Frobenius norms)")
        axes.legend()
