"""`kernel_regression`: regression with NTK and NNGP beside the networks they stand for.

One split of digits, the squared error, ReLU networks in NTK parametrization:

- NTK regression Θ* Θ⁻¹ y and NNGP regression K* K⁻¹ y at infinite width, and the first
  with the empirical kernel Θ₀ of networks;
- networks less their start, f − f₀, which are near it, and plain ones;
- plain linearized networks at t = ∞, f₀* + Θ₀* Θ₀⁻¹ (y − f₀), whose random start
  stays in what they say of new digits, and the error of one at infinite width: that of
  NTK regression and the variance of the start.

The last formula is also held to long training of `dynamics.linearize(model)`, by heavy
ball with the constant rate η and momentum β that are best for the spectrum of Θ₀:
√η = 2/(√λ_max + √λ_min), √β = (√λ_max − √λ_min)/(√λ_max + √λ_min).

References:
    Jacot et al. 2018, arXiv:1806.07572; Lee et al. 2019, arXiv:1902.06720; Lee et al.
    2020, arXiv:2007.15801; Polyak 1964, "Some methods of speeding up the convergence of
    iteration methods".
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntk_callbacks import dynamics, theory
from ntk_callbacks.engine.kernel import empirical_ntk
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.studies.descent import best_heavy_ball, descend
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import centered_one_hot, digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "ntk": "NTK regression",
    "nngp": "NNGP regression",
    "empirical": "empirical NTK regression",
    "centered": "network − its start",
    "network": "network",
    "linearized": "linearized network",
    "expected": "linearized, infinite width",
}
"""Each predictor -> what tables and figures call it."""

_NETWORKS = ("centered", "network", "linearized")
_ACTIVATION, _SIGMA_W, _SIGMA_B = "relu", math.sqrt(2), 0.1


@dataclass(frozen=True)
class _Split:
    x: Tensor
    y: Tensor
    x_test: Tensor
    labels_test: Tensor

    def scores(self, name: str, outputs: Tensor) -> Result:
        """Accuracy and mean squared error on the test set."""
        labels = self.labels_test.to(outputs.device)
        y = centered_one_hot(labels, outputs.shape[1], outputs)
        return {
            f"{name}_accuracy": float((outputs.argmax(1) == labels).double().mean()),
            f"{name}_error": float((outputs - y).square().mean()),
        }


@dataclass(frozen=True)
class KernelRegression:
    """Kernels and networks on one split.

    Args:
        examples: Digits to learn from, split evenly over the classes.
        held_out: Digits to test on, at most 300.
        depth: Hidden layers.
        width: Units of a hidden layer.
        steps: Updates of a network.
        twin_width: Units of a hidden layer of the networks whose twins are trained.
        precision: Share of the slowest eigendirection that is left to the twins.
        most_steps: Of the twins, if so much precision takes more.
        seeds: Networks of each kind.
    """

    examples: int = 200
    held_out: int = 300
    depth: int = 2
    width: int = 512
    steps: int = 500
    twin_width: int = 128
    precision: float = 1e-11
    most_steps: int = 5000
    seeds: int = 3

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The kernels of infinite width, and one network each."""
        split = {
            "examples": self.examples,
            "held_out": self.held_out,
            "depth": self.depth,
        }
        network = {"width": self.width, "steps": self.steps}
        twin = {
            "width": self.twin_width,
            "precision": self.precision,
            "most_steps": self.most_steps,
        }
        found = {"infinite": {"job": "infinite", **split}}
        for seed in range(self.seeds):
            for job, settings in (("network", network), ("twin", twin)):
                found[f"{job},seed={seed}"] = {
                    "job": job,
                    "seed": seed,
                    **split,
                    **settings,
                }
        return found

    @staticmethod
    def run(*, job: str, device: str, seed: int = 0, **parameters: Any) -> Result:
        """What the predictors of one job say of the test set."""
        n, held_out = parameters.pop("examples"), parameters.pop("held_out")
        x, labels = digits(n, device=device)
        split = _Split(
            x,
            centered_one_hot(labels, 10, x),
            *digits(held_out, held_out=True, device=device),
        )
        kinds: dict[str, Callable[..., Result]] = {
            "infinite": _infinite,
            "network": _networks,
            "twin": _twin,
        }
        return kinds[job](split, **parameters)

    def findings(self, results: Results) -> Findings:
        """Test accuracy and error of each predictor, means over seeds of networks."""
        table: list[dict[str, float | str]] = []
        numbers: dict[str, float] = {}
        for name, label in NAMES.items():
            means: dict[str, float] = {}
            for what in ("accuracy", "error"):
                found = _values(results, f"{name}_{what}")
                if found:
                    means[what] = sum(found) / len(found)
                    numbers[f"{name}_{what}"] = means[what]
            table.append(
                {
                    "predictor": label,
                    "test_accuracy": means.get("accuracy", "–"),
                    "test_error": means["error"],
                }
            )
        numbers["closed_form_difference"] = max(_values(results, "difference"))
        numbers["twin_steps"] = max(_values(results, "twin_steps"))
        numbers["loss_share"] = max(_values(results, "loss_share"))
        numbers["error_over_theory"] = (
            numbers["linearized_error"] / numbers["expected_error"]
        )
        numbers["ntk_minus_network"] = (
            numbers["ntk_accuracy"] - numbers["network_accuracy"]
        )
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Bars of both, a dot for each network."""
        left, right = figure.subplots(1, 2, sharey=True)
        places = [*range(len(NAMES))][::-1]
        for axes, what, label in (
            (left, "accuracy", "test accuracy (share)"),
            (right, "error", "test error (mean square)"),
        ):
            for place, name in zip(places, NAMES, strict=True):
                values = _values(results, f"{name}_{what}")
                if not values:
                    continue
                mean = sum(values) / len(values)
                color = "C1" if name in _NETWORKS else "C0"
                axes.barh(place, mean, color=color, alpha=0.6)
                axes.text(max(values), place, f"  {mean:.3g}", va="center")
                if len(values) > 1:
                    axes.plot(values, [place] * len(values), "k.")
            axes.set_xlabel(label)
            axes.margins(x=0.25)
        accuracies = [v for n in NAMES for v in _values(results, f"{n}_accuracy")]
        low = 0.9 * min(accuracies)
        left.set_xlim(low, 1 + 0.15 * (1 - low))
        left.set_yticks(places, NAMES.values())


def _values(results: Results, name: str) -> list[float]:
    return [r[name] for r in results.values() if name in r]


def _infinite(split: _Split, *, depth: int) -> Result:
    """Regression with both kernels, and the error of one network of infinite width."""
    both = torch.cat([split.x, split.x_test]).cpu()
    kernels = theory.fully_connected(
        both, depth=depth, activation=_ACTIVATION, sigma_w=_SIGMA_W, sigma_b=_SIGMA_B
    )
    n, y = len(split.x), split.y.cpu()
    found: Result = {}
    for name in ("ntk", "nngp"):
        kernel = getattr(kernels, name)
        predicted = dynamics.kernel_regression(kernel[:n, :n], y, kernel[n:, :n])
        found |= split.scores(name, predicted)
    trained = dynamics.ensemble(kernels.nngp, kernels.ntk, y, math.inf)
    variance = trained.covariance.diagonal()[n:].mean()
    return found | {"expected_error": found["ntk_error"] + float(variance)}


def _networks(split: _Split, *, width: int, depth: int, steps: int) -> Result:
    """One start: regression with its kernel, and two networks trained from there."""
    model = _model(split, width, depth)
    regressed = _Regressed.of(model, split)
    found = split.scores("linearized", regressed.plain)
    found |= split.scores("empirical", regressed.centered)
    rate, momentum = best_heavy_ball(regressed.ntk)
    # Without need of a precision beyond float32, and at half the rate: the largest
    # curvature of a network grows while it learns.
    model = model.float()
    x, y = split.x.float(), split.y.float()
    shares = []
    for name, net in (
        ("network", copy.deepcopy(model)),
        ("centered", dynamics.scale_output(model, 1.0)),
    ):
        losses = descend(
            net, x, y, learning_rate=rate / 2, steps=steps, momentum=momentum
        )
        shares.append(losses[-1] / losses[0])
        with torch.no_grad():
            found |= split.scores(name, net(split.x_test.float()))
    return found | {"loss_share": max(shares)}


def _twin(
    split: _Split, *, width: int, depth: int, precision: float, most_steps: int
) -> Result:
    """A linearized network: trained for long, beside its closed form."""
    model = _model(split, width, depth)
    regressed = _Regressed.of(model, split)
    twin = dynamics.linearize(model)
    rate, momentum = best_heavy_ball(regressed.ntk)
    slowest = dynamics.learning_steps(
        regressed.ntk, learning_rate=rate, momentum=momentum, fraction=precision
    ).max()
    steps = math.ceil(min(float(slowest), most_steps))
    descend(twin, split.x, split.y, learning_rate=rate, steps=steps, momentum=momentum)
    with torch.no_grad():
        trained = twin(split.x_test).cpu()
    closed = regressed.plain.cpu()
    difference = (trained - closed).abs().max() / closed.abs().max()
    return {"difference": float(difference), "twin_steps": steps}


@dataclass(frozen=True)
class _Regressed:
    """What the empirical kernel of a network says of the test set."""

    ntk: Tensor
    plain: Tensor
    centered: Tensor

    @classmethod
    def of(cls, model: nn.Module, split: _Split) -> "_Regressed":
        ntk = empirical_ntk(model, split.x)
        across = empirical_ntk(model, split.x_test, split.x)
        with torch.no_grad():
            starts = {"f0": model(split.x), "f0_test": model(split.x_test)}
        return cls(
            ntk,
            dynamics.kernel_regression(ntk, split.y, across, **starts),
            dynamics.kernel_regression(ntk, split.y, across),
        )


def _model(split: _Split, width: int, depth: int) -> nn.Module:
    inputs, c = split.x.shape[1:], split.y.shape[1]
    model = MLP(inputs, c, width, depth, _ACTIVATION, "ntk", _SIGMA_W, _SIGMA_B)
    return model.to(split.x)
