"""`elbows`: a one-dimensional function, its ReLU elbows, and where they go.

A network of one hidden ReLU layer is piecewise linear; unit k bends it at its elbow,
−bₖ/wₖ. α (f − f₀) descends the squared error of a piecewise linear target, in units of
α²: a small α asks for much larger weights than the start has (rich), a large one hardly
moves them (lazy). Rich networks carry their elbows to the bends of the target, and
approximate it with few units; lazy ones fit with the elbows they have, which move about
as 1/α, and stay near their linearized twin all the way (the gap is the largest root
mean square over the moments of training).

References:
    Williams, Trager, Silva, Panozzo, Zorin, Bruna 2019, arXiv:1906.07842; Maennel,
    Bousquet, Gelly 2018, arXiv:1803.08367; Chizat, Oyallon, Bach 2019,
    arXiv:1812.07956; Cybenko 1989 (universal approximation).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntk_callbacks import dynamics, metrics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.layers import Linear
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import half_square
from ntk_callbacks.studies.slopes import log_log_slope, mean_by
from ntk_callbacks.studies.study import Findings, Result, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RATE, _MOMENTUM = 0.1, 0.9  # _RATE: of the largest stable rate of the start
_EXAMPLES = 41  # on a grid that holds the bends of the target
_GRID = 401  # of inputs between the examples
_DRAWN = 40  # moments of the paths of elbows


@dataclass(frozen=True)
class Elbows:
    """Elbows of networks at several scales of the output.

    Args:
        scales: Values of α; the smallest is to be rich, the largest lazy.
        lazy_from: Smallest α that the slope is taken over.
        seeds: Networks for each α.
        width: Units.
        steps: Updates of gradient descent with momentum.
    """

    scales: list[float]
    lazy_from: float = 8.0
    seeds: int = 3
    width: int = 100
    steps: int = 2000

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each; the rich and the lazy one that are drawn have twins."""
        ends = (min(self.scales), max(self.scales))
        return {
            f"scale={scale},seed={seed}": {
                "scale": scale,
                "seed": seed,
                "width": self.width,
                "steps": self.steps,
                "with_twin": seed == 0 and scale in ends,
            }
            for scale in self.scales
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        scale: float,
        seed: int,
        width: int,
        steps: int,
        with_twin: bool,
        device: str,
    ) -> Result:
        """Train a network and its linearized twin, and follow functions and elbows."""
        del seed  # in the name of the job
        grid = torch.linspace(-1, 1, _GRID, dtype=torch.float64, device=device)[:, None]
        x = grid[:: (_GRID - 1) // (_EXAMPLES - 1)]
        model = MLP((1,), 1, width, 1, "relu", "ntk", math.sqrt(2), 1.0).to(x)
        kernel = empirical_ntk(model, x)
        rate = _RATE * float(dynamics.max_learning_rate(kernel))
        network = dynamics.scale_output(model, float(scale))
        twin = dynamics.linearize(network)
        moments = path_moments(steps)
        paths, functions = _followed(network, x, grid, scale, rate, moments)
        twins = functions
        if with_twin:
            _, twins = _followed(twin, x, grid, scale, rate, moments)
        error = functions[-1] - target(grid)[:, 0]
        gaps = (functions - twins).square().mean(1).sqrt()
        change = metrics.relative_change(empirical_ntk(network.model, x), kernel)
        inside = paths[0].abs() < 1
        return {
            "error": float(error.square().mean().sqrt()),
            "twin_gap": float(gaps.max()),
            "elbow_change": float((paths[-1] - paths[0])[inside].abs().median()),
            "kernel_change": float(change),
            "moments": moments,
            "paths": paths.tolist(),
            "functions": functions[_shown(moments), ::4].tolist(),
            "twins": twins[_shown(moments), ::4].tolist(),
        }

    def findings(self, results: Results) -> Findings:
        """Errors and moves of elbows against the scale."""
        names = ("error", "elbow_change", "kernel_change")
        means = {name: mean_by(results, "scale", name) for name in names}
        rich, lazy = min(self.scales), max(self.scales)
        moved = means["elbow_change"]
        gaps = {
            scale: results[f"scale={scale},seed=0"]["twin_gap"]
            for scale in (rich, lazy)
        }
        return Findings(
            [
                {"scale": scale, **{name: means[name][scale] for name in names}}
                for scale in self.scales
            ],
            {
                "approximation_error": max(
                    r["error"] for r in results.values() if r["scale"] == rich
                ),
                "rich_elbow_change": moved[rich],
                "lazy_elbow_change": moved[lazy],
                "lazy_elbow_slope": log_log_slope(
                    {a: v for a, v in moved.items() if a >= self.lazy_from}
                ),
                "lazy_twin_gap": gaps[lazy],
                "rich_twin_gap": gaps[rich],
            },
        )

    def draw(self, results: Results, figure: "Figure") -> None:
        """A rich and a lazy network at three moments, and the paths of their elbows."""
        rows = figure.subplots(2, 4, sharex="col")
        for row, (word, scale) in zip(
            rows,
            (("rich", min(self.scales)), ("lazy", max(self.scales))),
            strict=True,
        ):
            r = results[f"scale={scale},seed=0"]
            for number, axes in enumerate(row[:3]):
                self._draw_function(r, number, axes)
                step = r["moments"][_shown(r["moments"])[number]]
                axes.set_title(f"{word}, α = {scale:g}, step {step}", fontsize="small")
            row[0].set_ylabel("output")
            self._draw_paths(r, row[3])
        for axes in rows[1][:3]:
            axes.set_xlabel("input")
        rows[1][3].set_xlabel("elbow (input)")
        rows[0][2].legend(fontsize="xx-small", loc="upper left")

    def _draw_function(self, r: Result, number: int, axes: "Axes") -> None:
        x = torch.linspace(-1, 1, len(r["functions"][0]))
        axes.plot(x, target(x), color="0.8", linewidth=4, label="target")
        axes.plot(x, r["functions"][number], color="C0", label="network")
        axes.plot(x, r["twins"][number], "--", color="C1", label="linearized twin")
        elbows = r["paths"][_shown(r["moments"])[number]]
        axes.plot(elbows, [-1.9] * len(elbows), "|", color="C3", label="elbows")
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(-2.1, 2.4)

    def _draw_paths(self, r: Result, axes: "Axes") -> None:
        steps = [step + 1 for step in r["moments"]]
        for path in zip(*r["paths"], strict=True):
            axes.plot(path, steps, color="C3", linewidth=0.5)
        for bend in BENDS:
            axes.axvline(bend, color="0.8", linewidth=4, zorder=0)
        axes.set_yscale("log")
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylabel("step + 1", fontsize="small")
        axes.set_title("paths of elbows, bends", fontsize="small")


BENDS = (-0.5, 0.3)
"""Where the target bends."""


def target(x: Tensor) -> Tensor:
    """Piecewise linear: slope −1, 3 between the bends, and −1 again.

    Args:
        x: Inputs of any shape.

    Returns:
        Values of that shape: −1.5 and 0.9 at the bends.
    """
    first, second = BENDS
    return 2 * ((x - first).abs() - (x - second).abs()) - x - 0.4


def elbows(model: MLP) -> Tensor:
    """Where each unit of the first layer bends, −b/w in units of the input.

    Args:
        model: Of one input, in NTK parametrization.

    Returns:
        One number for each unit.
    """
    layer = model.hidden[0]
    assert isinstance(layer, Linear)
    assert layer.bias is not None
    weight, bias = layer.sigma_w * layer.weight[:, 0], layer.sigma_b * layer.bias
    return (-bias / weight).detach()


def path_moments(steps: int) -> list[int]:
    """Steps that are kept: the first, the last, and as many in each decade between.

    Args:
        steps: The last.

    Returns:
        Ascending whole numbers.
    """
    late = torch.logspace(0, math.log10(max(steps, 1)), _DRAWN).round().long().tolist()
    return sorted({0, *late, steps})


def _shown(moments: list[int]) -> list[int]:
    """Places of the three moments whose functions are drawn."""
    return [0, len(moments) // 2, len(moments) - 1]


def _followed(
    model: nn.Module,
    x: Tensor,
    grid: Tensor,
    scale: float,
    rate: float,
    moments: list[int],
) -> tuple[Tensor, Tensor]:
    """Train; elbows (moments, units), none of a twin, and outputs (moments, grid)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, _MOMENTUM)
    network = model.model if isinstance(model, dynamics.ScaledModel) else None
    y = target(x)
    paths, functions = [], []
    for step in range(moments[-1] + 1):
        if step in moments:
            with torch.no_grad():
                functions.append(model(grid)[:, 0])
            if isinstance(network, MLP):
                paths.append(elbows(network))
        optimizer.zero_grad()
        (half_square(model(x), y) / scale**2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.stack(paths) if paths else x[:0], torch.stack(functions)
