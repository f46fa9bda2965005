"""`linearized`: a network beside its linearization, trained and in closed form.

tanh networks of several widths in NTK parametrization learn the sign of a coordinate on
a sphere by gradient descent on ½ Σ (f − y)², each beside its twin f₀ + J₀ (θ − θ₀),
trained in the same way, and what the kernel says of both, without any training:
f₀ + (1 − (1 − ηΘ)ᵏ)(y − f₀) after k steps. The twin is that to round-off. A narrow
network parts from it within a few steps; the gap falls as 1/n or a little faster.

Targets are counted from f₀, so that all networks have the same way to go: the size of
f₀ scatters more over seeds than anything else.

References:
    Lee et al. 2019, arXiv:1902.06720; Chizat, Oyallon, Bach 2019, arXiv:1812.07956;
    Huang, Yau 2019, arXiv:1909.08156 (order 1/n).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntk_callbacks import dynamics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import descend
from ntk_callbacks.studies.slopes import log_log_slope, mean_by
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIMENSIONS, _EXAMPLES = 6, 12


@dataclass(frozen=True)
class Linearized:
    """The gap between a network and its linearization, over steps and widths.

    Args:
        networks: Width of a hidden layer -> networks of that width.
        twins: How many of them train a linearized twin too.
        steps: Updates of gradient descent.
        share: Learning rate in units of 1/λ_max; 2 is the largest stable one.
        depth: Hidden layers.
        lazy_from: Least width that the slope is taken over.
        parted: Gap that counts as parted.
    """

    networks: dict[int, int]
    twins: int = 1
    steps: int = 300
    share: float = 0.4
    depth: int = 2
    lazy_from: int = 128
    parted: float = 0.1

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each."""
        common = {"steps": self.steps, "share": self.share, "depth": self.depth}
        return {
            f"width={width},seed={seed}": {
                "width": width,
                "seed": seed,
                "train_twin": seed < self.twins,
                **common,
            }
            for width, seeds in sorted(self.networks.items())
            for seed in range(seeds)
        }

    @staticmethod
    def run(
        *,
        width: int,
        seed: int,
        train_twin: bool,
        steps: int,
        share: float,
        depth: int,
        device: str,
    ) -> Result:
        """Outputs at some steps: of the network, of its twin and in closed form."""
        x, y = points(device)
        model = MLP((_DIMENSIONS,), 1, width, depth, "tanh", "ntk", 1.5, 0.1).to(x)
        with torch.no_grad():
            f0 = model(x)
        ntk = empirical_ntk(model, x)
        rate = 0.5 * share * float(dynamics.max_learning_rate(ntk))
        at = logarithmic(steps)
        closed = dynamics.gradient_descent(
            ntk, f0, f0 + y, learning_rate=rate, steps=at
        ).train
        linear = dynamics.linearize(model) if train_twin else None
        settings = (x, f0 + y, rate, at)
        network = _outputs(model, *settings) - f0
        closed = closed.to(f0) - f0
        result: Result = {
            "at": at,
            "gaps": (network - closed).abs().amax((1, 2)).tolist(),
            "network": network[:, 0, 0].tolist(),
            "closed": closed[:, 0, 0].tolist(),
            "target": float(y[0, 0]),
        }
        if linear is not None:
            trained = _outputs(linear, *settings) - f0
            result |= {
                "twin": trained[:, 0, 0].tolist(),
                "twin_gap": float((trained - closed).abs().max()),
            }
        return result

    def findings(self, results: Results) -> Findings:
        """The gap at its largest and at the end, when it opened, and its slope."""
        largest = mean_by(_with_gaps(results), "width", "largest")
        end = mean_by(_with_gaps(results), "width", "end")
        table: list[dict[str, float | str]] = []
        for width, gap in largest.items():
            some = [r for r in results.values() if r["width"] == width]
            times = sorted(self._parting(r) for r in some)
            middle = times[len(times) // 2]
            table.append(
                {
                    "width": width,
                    "networks": len(some),
                    "largest_gap": gap,
                    "gap_at_the_end": end[width],
                    "parted_at_step": middle if middle < math.inf else "never",
                }
            )
        lazy = {n: gap for n, gap in largest.items() if n >= self.lazy_from}
        widest = max(largest)
        numbers = {
            "largest_gap_of_widest": largest[widest],
            "gap_at_the_end_of_widest": end[widest],
            "gap_slope": log_log_slope(lazy),
            "twin_gap": max(r["twin_gap"] for r in results.values() if "twin" in r),
        }
        return Findings(table, numbers)

    def _parting(self, result: Result) -> float:
        """First step with so large a gap."""
        beyond = [
            k
            for k, gap in zip(result["at"], result["gaps"], strict=True)
            if gap > self.parted
        ]
        return beyond[0] if beyond else math.inf

    def draw(self, results: Results, figure: "Figure") -> None:
        """One output over the steps, the gap over the steps, the gap over the width."""
        grid = figure.add_gridspec(2, 2)
        outputs = figure.add_subplot(grid[:, 0])
        over_steps = figure.add_subplot(grid[0, 1])
        over_width = figure.add_subplot(grid[1, 1])
        widths = sorted(self.networks)
        for number, width in enumerate(widths):
            color = f"C{number}"
            some = [r for r in results.values() if r["width"] == width]
            first, at = some[0], some[0]["at"]
            if width in (widths[0], widths[-1]):
                label = f"width {width}: "
                outputs.plot(at, first["network"], color=color, label=f"{label}network")
                if "twin" in first:
                    outputs.plot(
                        at,
                        first["twin"],
                        "o",
                        color=color,
                        mfc="none",
                        label="its twin",
                    )
                outputs.plot(at, first["closed"], "k--", lw=1, label="in closed form")
            gaps = [r["gaps"] for r in some]
            mean = [sum(g) / len(some) for g in zip(*gaps, strict=True)]
            over_steps.plot(at[1:], mean[1:], color=color, label=f"width {width}")
        outputs.axhline(first["target"], color="gray", linestyle=":", label="target")
        outputs.set_xscale("symlog", linthresh=1)
        outputs.set_xlim(left=0)
        outputs.set_xlabel("step")
        outputs.set_ylabel("output f − f₀ on one training example")
        outputs.legend(fontsize="small")
        over_steps.axhline(self.parted, color="gray", linestyle=":")
        over_steps.set_xscale("log")
        over_steps.set_yscale("log")
        over_steps.set_xlabel("step")
        over_steps.set_ylabel("gap max |f − f_lin|")
        over_steps.legend(fontsize="x-small")
        found = _with_gaps(results)
        means = mean_by(found, "width", "largest")
        each = [(r["width"], r["largest"]) for r in found.values()]
        over_width.loglog(*zip(*each, strict=True), "k.", alpha=0.4)
        over_width.loglog(list(means), list(means.values()), "o-", label="mean")
        last = means[widths[-1]] * widths[-1]
        over_width.loglog(
            widths, [last / n for n in widths], "--", color="C0", label="slope −1"
        )
        over_width.set_xticks(widths, [str(n) for n in widths])
        over_width.minorticks_off()
        over_width.set_xlabel("width (units of a hidden layer)")
        over_width.set_ylabel("largest gap")
        over_width.legend(fontsize="x-small")


def _with_gaps(results: Results) -> dict[str, Result]:
    return {
        key: {**r, "largest": max(r["gaps"]), "end": r["gaps"][-1]}
        for key, r in results.items()
    }


def points(device: str) -> tuple[Tensor, Tensor]:
    """What every network learns: 12 points with |x|² = 6, and the sign of x₁.

    Args:
        device: Where to put them.

    Returns:
        Inputs (12, 6) and targets (12, 1), always the same.
    """
    generator = torch.Generator().manual_seed(0)
    size = (_EXAMPLES, _DIMENSIONS)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x = (x / x.norm(dim=1, keepdim=True) * _DIMENSIONS**0.5).to(device)
    return x, x[:, :1].sign()


def logarithmic(steps: int) -> list[int]:
    """0, 1 and about eight numbers of steps per decade up to the last.

    Args:
        steps: The last, at least 1.

    Returns:
        Ascending whole numbers.

    Example:
        >>> logarithmic(10)
        [0, 1, 2, 3, 4, 6, 7, 10]
    """
    powers = range(math.ceil(8 * math.log10(steps)))
    return sorted({0, steps, *(round(10 ** (k / 8)) for k in powers)})


def _outputs(
    model: nn.Module, x: Tensor, y: Tensor, rate: float, at: list[int]
) -> Tensor:
    """Outputs on the training set after each number of steps."""
    found, done = [], 0
    for steps in at:
        descend(model, x, y, learning_rate=rate, steps=steps - done)
        done = steps
        with torch.no_grad():
            found.append(model(x))
    return torch.stack(found)
