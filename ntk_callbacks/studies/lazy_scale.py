"""`lazy_scale`: the larger the scale of its output, the less a network moves.

Gradient descent of ½ |α(f − f₀) − y|²/α² at one learning rate for every α: the output
learns equally fast at each, and the change of the weights and of the kernel falls as
1/α. Where α is small the network is not lazy, whatever its width.

References:
    Chizat, Oyallon, Bach 2019, arXiv:1812.07956.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ntk_callbacks import dynamics, metrics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import descend, half_square
from ntk_callbacks.studies.slopes import log_log_slope, mean_by
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import centered_one_hot, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LazyScale:
    """Drift against the scale of the output.

    Args:
        scales: Values of α.
        lazy_from: Smallest α that the slopes are taken over.
        seeds: Networks for each α.
        width: Units of a hidden layer.
        depth: Hidden layers.
        examples: Digits, split evenly over the classes.
        steps: Updates of gradient descent.
    """

    scales: list[float]
    lazy_from: float = 4.0
    seeds: int = 3
    width: int = 64
    depth: int = 2
    examples: int = 40
    steps: int = 200

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each."""
        common = {
            "width": self.width,
            "depth": self.depth,
            "examples": self.examples,
            "steps": self.steps,
        }
        return {
            f"scale={scale},seed={seed}": {"scale": scale, "seed": seed, **common}
            for scale in self.scales
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        scale: float,
        seed: int,
        width: int,
        depth: int,
        examples: int,
        steps: int,
        device: str,
    ) -> Result:
        """Train one network, and compare its kernels and weights."""
        x, labels = digits(examples, device=device)
        y = centered_one_hot(labels, 10, x)
        model = MLP((x.shape[1],), 10, width, depth, "erf", "ntk", 1.5, 0.1).to(x)
        start = empirical_ntk(model, x)
        before = [p.detach().clone() for p in model.parameters()]
        scaled = dynamics.scale_output(model, float(scale))
        rate = 0.5 * float(dynamics.max_learning_rate(start))

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return half_square(outputs, targets) / scale**2

        losses = descend(scaled, x, y, learning_rate=rate, steps=steps, loss=loss)
        after = [p.detach() for p in scaled.model.parameters()]
        moved = sum(
            float((b - a).square().sum()) for a, b in zip(before, after, strict=True)
        )
        whole = sum(float(a.square().sum()) for a in before)
        end = empirical_ntk(scaled.model, x)
        return {
            "weight_change": (moved / whole) ** 0.5,
            "kernel_change": float(metrics.relative_change(end, start)),
            "loss_share": losses[-1] / losses[0],
        }

    def findings(self, results: Results) -> Findings:
        """Slopes against α of the means over seeds, in logarithms."""
        names = ("weight_change", "kernel_change", "loss_share")
        means = {name: mean_by(results, "scale", name) for name in names}
        table: list[dict[str, float | str]] = [
            {"scale": scale, **{name: means[name][scale] for name in names}}
            for scale in self.scales
        ]
        slopes = {
            f"{name}_slope": log_log_slope(
                {a: value for a, value in means[name].items() if a >= self.lazy_from}
            )
            for name in names[:2]
        }
        return Findings(table, slopes)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Both changes against α, and the slope −1 of theory dashed."""
        axes = figure.subplots()
        labels = {
            "weight_change": "weights during training",
            "kernel_change": "kernel during training",
        }
        for number, (name, label) in enumerate(labels.items()):
            means = mean_by(results, "scale", name)
            scales = list(means)
            axes.loglog(
                scales, list(means.values()), "o", color=f"C{number}", label=label
            )
            last = means[scales[-1]] * scales[-1]
            axes.loglog(
                scales,
                [last / a for a in scales],
                "--",
                color=f"C{number}",
                label="slope −1",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.scales, [f"{a:g}" for a in self.scales])
        axes.set_xlabel("scale α of the output (factor)")
        axes.set_ylabel("relative change (Frobenius norms)")
        axes.legend()
