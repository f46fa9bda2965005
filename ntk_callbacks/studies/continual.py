"""`continual`: what learning a task makes of those before it, foretold by the kernel.

One network learns tasks in sequence: the same digits, turned by another angle in each,
with the same ten outputs. Before it learns task B, its kernel says how the outputs on
an earlier task A will move: to the end of training by −Θ(A, B) Θ(B, B)⁻¹ (f_B − y_B),
here by as many steps of gradient descent as are made. That gives the rise of the loss
of A, which is then measured. Θ(A, B) is the larger the more alike two tasks look, which
digits do upside down too; it depends on the targets whether that helps or hurts.

References:
    Bennani, Doan, Sugiyama 2020, arXiv:2006.11942; Doan et al. 2021, arXiv:2010.04003.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ntk_callbacks import dynamics
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import descend
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import centered_one_hot, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Continual:
    """Forgetting, foretold and measured.

    Args:
        angles: By which the digits of each task are turned, in degrees.
        seeds: Networks, each with the tasks in another order.
        width: Units of a hidden layer.
        depth: Hidden layers.
        examples: Digits of each task, split evenly over the classes.
        steps: Updates of gradient descent on each task.
    """

    angles: list[float]
    seeds: int = 4
    width: int = 256
    depth: int = 2
    examples: int = 50
    steps: int = 200

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One sequence of tasks each."""
        common = {
            "angles": self.angles,
            "width": self.width,
            "depth": self.depth,
            "examples": self.examples,
            "steps": self.steps,
        }
        return {f"seed={seed}": {"seed": seed, **common} for seed in range(self.seeds)}

    @staticmethod
    def run(
        *,
        seed: int,
        angles: list[float],
        width: int,
        depth: int,
        examples: int,
        steps: int,
        device: str,
    ) -> Result:
        """Learn the tasks in an order drawn by chance."""
        images, labels = digits(examples, images=True, device=device)
        y = centered_one_hot(labels, 10, images)
        model = MLP((1, 8, 8), 10, width, depth, "erf", "ntk", 1.5, 0.1).to(images)
        tasks = [turned(images, angle) for angle in angles]
        order = torch.randperm(len(tasks)).tolist()
        kinship = kernel_cosines(model, tasks)
        pairs: list[dict[str, float]] = []
        for place, new in enumerate(order):
            x = tasks[new]
            ntk, before = empirical_ntk(model, x), model(x).detach()
            rate = 0.5 * float(dynamics.max_learning_rate(ntk))
            earlier = order[:place]
            then = {a: model(tasks[a]).detach() for a in earlier}
            foretold: dict[int, Tensor] = {}
            for a in earlier:
                path = dynamics.gradient_descent(
                    ntk,
                    before,
                    y,
                    learning_rate=rate,
                    steps=steps,
                    ntk_test=empirical_ntk(model, tasks[a], x),
                    f0_test=then[a],
                )
                assert path.test is not None
                foretold[a] = path.test
            descend(model, x, y, learning_rate=rate, steps=steps)
            for a in earlier:
                after = model(tasks[a]).detach()
                moved = after - then[a]
                pairs.append(
                    {
                        "old": angles[a],
                        "new": angles[new],
                        "foretold": mean_loss(foretold[a], y) - mean_loss(then[a], y),
                        "measured": mean_loss(after, y) - mean_loss(then[a], y),
                        "output_error": float(
                            (foretold[a] - after).norm() / moved.norm()
                        ),
                    }
                )
        return {"pairs": pairs, "kinship": kinship}

    def findings(self, results: Results) -> Findings:
        """Forgetting by the angle between two tasks, and how well it was foretold."""
        pairs = [pair for r in results.values() for pair in r["pairs"]]
        by_angle: dict[float, list[dict[str, float]]] = {}
        for pair in pairs:
            between = angle_between(pair["old"], pair["new"])
            by_angle.setdefault(between, []).append(pair)
        table: list[dict[str, float | str]] = [
            {
                "angle_between": between,
                "pairs": len(found),
                **{
                    name: sum(pair[name] for pair in found) / len(found)
                    for name in ("foretold", "measured", "output_error")
                },
            }
            for between, found in sorted(by_angle.items())
        ]
        foretold = [pair["foretold"] for pair in pairs]
        measured = [pair["measured"] for pair in pairs]
        errors = [pair["output_error"] for pair in pairs]
        numbers = {
            "rank_correlation": rank_correlation(foretold, measured),
            "output_error": sum(errors) / len(errors),
        }
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Kernels between tasks, and rises of the loss with the diagonal."""
        left, right = figure.subplots(1, 2)
        kinship = np.mean([r["kinship"] for r in results.values()], axis=0)
        left.imshow(kinship, vmin=0, vmax=1)
        names = [f"{angle:g}°" for angle in self.angles]
        left.set_xticks(range(len(names)), names)
        left.set_yticks(range(len(names)), names)
        left.set_xlabel("task B (digits turned by)")
        left.set_ylabel("task A")
        left.set_title("‖Θ(A, B)‖/√(‖Θ(A, A)‖ ‖Θ(B, B)‖)", fontsize="medium")
        for (row, column), value in np.ndenumerate(kinship):
            shade = "black" if value > 0.6 else "white"
            left.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=shade
            )
        pairs = [pair for r in results.values() for pair in r["pairs"]]
        right.plot([], [], "k--", lw=1, label="as foretold")
        points = right.scatter(
            [pair["foretold"] for pair in pairs],
            [pair["measured"] for pair in pairs],
            c=[angle_between(pair["old"], pair["new"]) for pair in pairs],
            cmap="plasma",
            s=18,
        )
        ends = [min(p["foretold"] for p in pairs), max(p["foretold"] for p in pairs)]
        right.plot(ends, ends, "k--", lw=1)
        figure.colorbar(points, ax=right, shrink=0.8, label="angle between tasks (°)")
        right.set_xlabel("foretold rise of the loss of A")
        right.set_ylabel("measured rise of the loss of A")
        right.legend()


def turned(images: Tensor, angle: float) -> Tensor:
    """Images turned counterclockwise around their middle.

    Args:
        images: (n, channels, height, width).
        angle: In degrees; what comes from outside continues the border.

    Returns:
        Images of the same shape, interpolated linearly.

    Example:
        >>> turned(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90).round()
        tensor([[[[2., 4.],
                  [1., 3.]]]])
    """
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).to(images)
    grid = affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def angle_between(first: float, second: float) -> float:
    """The smaller angle between two directions.

    Args:
        first: In degrees.
        second: In degrees.

    Returns:
        Degrees in [0, 180].

    Example:
        >>> angle_between(10, 350)
        20
    """
    apart = abs(first - second) % 360
    return min(apart, 360 - apart)


def kernel_cosines(
    model: torch.nn.Module, tasks: Sequence[Tensor]
) -> list[list[float]]:
    """‖Θ(A, B)‖/√(‖Θ(A, A)‖ ‖Θ(B, B)‖) for every two tasks, Frobenius norms.

    Args:
        model: Left as it is.
        tasks: Inputs of each.

    Returns:
        A symmetric table with ones on its diagonal.
    """
    norms = torch.tensor(
        [[float(empirical_ntk(model, a, b).norm()) for b in tasks] for a in tasks],
        dtype=torch.float64,
    )
    own = norms.diagonal().sqrt()
    table: list[list[float]] = (norms / own / own[:, None]).tolist()
    return table


def mean_loss(outputs: Tensor, targets: Tensor) -> float:
    """½ |f − y|² in the mean over examples."""
    return float(0.5 * (outputs - targets).square().sum() / len(targets))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, of numbers without ties.

    Args:
        first: Numbers.
        second: As many.

    Returns:
        A number in [−1, 1]; NaN for fewer than two.

    Example:
        >>> round(rank_correlation([1.0, 5.0, 9.0], [0.1, 0.2, 10.0]), 12)
        1.0
    """
    if len(first) < 2:
        return math.nan
    values = torch.tensor([list(first), list(second)], dtype=torch.float64)
    ranks = values.argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])
