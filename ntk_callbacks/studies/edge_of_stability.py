"""`edge_of_stability`: training sharpens the loss until the learning rate forbids more.

The sharpness is λ_max of the Gauss-Newton matrix, that of the kernel Θ/n for the loss
1/(2n) Σ (f − y)², and of the Hessian too where the loss has gone. With small steps it
grows from a small initialization to a limit of its own. At a learning rate η whose edge
2/η lies below that limit it stops there: a sharper loss would throw the weights out of
the valley. (At a share 1 + δ of the edge that takes 1/(2δ) updates, so that a run may
end above it by about the inverse of its length.) The edge is 2(1 + β)/η with momentum
β, and (2 + 2β₁)/((1 − β₁) η), 38/η by default, for Adam, whose sharpness is that of the
preconditioned kernel J P⁻¹ Jᵀ. Adam never settles, as P follows the gradients: it is
held to its mean late in training.

Full-batch training of a tanh network, which learns all of the targets: large β, whose
effective rate η/(1 − β) ends training before the edge is reached again once it was
overstepped, need tasks that take longer.

References:
    Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484 (Adam).
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.instruments.kernel import KernelInstrument, NTKOptions
from ntk_callbacks.probe import Probe
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE = 30  # measurements of a run, evenly spaced, besides those of its beginning


@dataclass(frozen=True)
class EdgeOfStability:
    """Sharpness beside the edge.

    Args:
        rates: Optimizer, `gd`, `momentum` or `adam` -> learning rates beyond 2/limit.
        steps: Optimizer -> updates.
        small_rate: Of gradient descent that stays below the edge, for the limit.
        momentum: β of `momentum`.
        seeds: Networks for each rate.
        width: Units of a hidden layer.
        depth: Hidden layers.
        sigma_w: Scale of the weights; small, for the sharpness to start low.
        examples: Digits, split evenly over the classes.
    """

    rates: dict[str, list[float]]
    steps: dict[str, int]
    small_rate: float = 0.1
    momentum: float = 0.5
    seeds: int = 2
    width: int = 64
    depth: int = 2
    sigma_w: float = 0.6
    examples: int = 50

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One training run each."""
        common = {
            "momentum": self.momentum,
            "width": self.width,
            "depth": self.depth,
            "sigma_w": self.sigma_w,
            "examples": self.examples,
        }
        runs = [("gd", self.small_rate)] + [
            (kind, rate) for kind, rates in self.rates.items() for rate in rates
        ]
        return {
            f"{kind},rate={rate:g},seed={seed}": {
                "kind": kind,
                "rate": rate,
                "seed": seed,
                "steps": self.steps[kind],
                **common,
            }
            for kind, rate in runs
            for seed in range(self.seeds)
        }

    @staticmethod
    def run(
        *,
        kind: str,
        rate: float,
        seed: int,
        steps: int,
        momentum: float,
        width: int,
        depth: int,
        sigma_w: float,
        examples: int,
        device: str,
    ) -> Result:
        """Train one network, and measure its sharpness on the way."""
        x, labels = digits(examples, device=device)
        x = x - x.mean(0)  # else the mean image makes the start the sharpest point
        y = nn.functional.one_hot(labels, 10).to(x)
        model = MLP((x.shape[1],), 10, width, depth, "tanh", "standard", sigma_w, 0.1)
        model = model.to(x)
        optimizer = _optimizer(kind, model.parameters(), rate, momentum)
        names = ("sharpness", "sharpness_limit")
        instrument = KernelInstrument(
            metrics=names, options=NTKOptions(loss="half_mean")
        )
        instrument.optimizers = [optimizer]
        instrument.start(Probe(x, y))
        due = _measured_steps(steps)
        curve: dict[str, list[float]] = {"measured_at": [], "sharpness": []}
        for step in range(steps + 1):
            optimizer.zero_grad()
            loss = _loss(model, x, y)
            if step in due:
                found = instrument.measure(model, step).scalars
                curve["measured_at"].append(step)
                curve["sharpness"].append(float(found["ntk/sharpness"]))
            if step < steps:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {
            **curve,
            "edge": float(found["ntk/sharpness_limit"]),
            "hessian": hessian_max(model, x, y),
            "loss": float(loss.detach()),
        }

    def _of(self, results: Results, kind: str, rate: float) -> list[Result]:
        return [r for r in results.values() if (r["kind"], r["rate"]) == (kind, rate)]

    def findings(self, results: Results) -> Findings:
        """How near to the edge the sharpness is in the end."""
        table: list[dict[str, float | str]] = []
        shares: dict[str, list[float]] = {}
        numbers = {}
        for kind, rates in self.rates.items():
            for rate in rates:
                for result in self._of(results, kind, rate):
                    share = late_share(result, mean=kind == "adam")
                    shares.setdefault(kind, []).append(share)
                    row = {"optimizer": kind, "rate": rate, "edge": result["edge"]}
                    start = result["sharpness"][0]  # none for adam yet: NaN
                    row |= {"start/edge": start / result["edge"], "end/edge": share}
                    table.append({**row, "loss": result["loss"]})
        for kind, found in shares.items():
            whole = torch.tensor(found)  # whose extremes are NaN if a run diverged
            numbers[f"{kind}_mean"] = float(whole.mean())
            numbers[f"{kind}_lowest"] = float(whole.min())
            numbers[f"{kind}_highest"] = float(whole.max())
        plain = [r for rate in self.rates["gd"] for r in self._of(results, "gd", rate)]
        limits = [r["sharpness"][-1] for r in self._of(results, "gd", self.small_rate)]
        numbers["limit_over_edge"] = min(limits) / max(r["edge"] for r in plain)
        numbers["hessian_difference"] = max(
            abs(r["hessian"] / r["sharpness"][-1] - 1) for r in plain
        )
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Sharpness over the steps, the edge of each rate dashed."""
        panels = figure.subplots(1, len(self.rates), squeeze=False)[0]
        for axes, (kind, rates) in zip(panels, self.rates.items(), strict=True):
            small = [self.small_rate] if kind == "gd" else []
            for number, rate in enumerate([*rates, *small]):
                result = self._of(results, kind, rate)[0]
                color = f"C{number}" if rate in rates else "0.5"
                axes.plot(
                    result["measured_at"],
                    result["sharpness"],
                    color=color,
                    label=f"η = {rate:g}",
                )
                if rate in rates:
                    axes.axhline(result["edge"], color=color, ls="--", lw=1)
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(0, self.steps[kind])
            axes.set_xticks(
                [0, *(t for t in (1, 10, 100, 1000) if t < self.steps[kind])]
            )
            edges = [self._of(results, kind, rate)[0]["edge"] for rate in rates]
            # Adam starts with no gradients to scale by, far above.
            axes.set_ylim(0, {"gd": 2.0}.get(kind, 1.4) * max(edges))
            axes.set_title({"gd": "gradient descent"}.get(kind, kind))
            axes.set_xlabel("updates")
            axes.legend(fontsize="small", loc="lower right")
        panels[0].set_ylabel("sharpness (1/learning rate); the edge dashed")


def late_share(result: Result, *, mean: bool) -> float:
    """Sharpness over the edge when training ends.

    Args:
        result: Of a job: `measured_at`, `sharpness` and `edge`.
        mean: Take the mean over the second half of the updates, not the last one.

    Returns:
        A number; NaN if training diverged.

    Example:
        >>> result = {"measured_at": [0, 5, 10], "sharpness": [1.0, 3.0, 5.0]}
        >>> result["edge"] = 4.0
        >>> late_share(result, mean=False), late_share(result, mean=True)
        (1.25, 1.0)
    """
    last = result["measured_at"][-1]
    late = [
        value
        for step, value in zip(result["measured_at"], result["sharpness"], strict=True)
        if step == last or (mean and step >= last / 2)
    ]
    return float(sum(late) / len(late) / result["edge"])


def hessian_max(model: nn.Module, x: Tensor, y: Tensor, rounds: int = 400) -> float:
    """Largest eigenvalue of the Hessian of 1/(2n) Σ (f − y)², by power iteration.

    Args:
        model: Left as it is.
        x: Inputs (n, ...).
        y: Targets (n, c).
        rounds: Products with the Hessian.

    Returns:
        The eigenvalue of largest absolute value.
    """
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(_loss(model, x, y), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    v, value = torch.randn_like(gradient), math.nan
    for _ in range(rounds):
        v = v / v.norm()
        product = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        after = torch.cat([p.flatten() for p in product])
        value, v = float(v @ after), after
    return value


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = 0.5 * (model(x) - y).square().sum() / len(x)
    return loss


def _optimizer(
    kind: str, parameters: Iterable[nn.Parameter], rate: float, momentum: float
) -> Optimizer:
    if kind == "adam":
        return torch.optim.Adam(parameters, rate)
    return torch.optim.SGD(parameters, rate, momentum if kind == "momentum" else 0.0)


def _measured_steps(steps: int) -> set[int]:
    """0, 1, 2, 4, … and evenly spaced ones to the last."""
    early = {2**k for k in range(steps.bit_length()) if 2**k <= steps}
    return {0, steps} | early | set(range(0, steps, max(1, steps // _CURVE)))
