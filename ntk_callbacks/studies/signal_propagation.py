"""`signal_propagation`: what each layer does to variance, correlation and gradients.

Random tanh networks in the chaotic phase, σ_w = 1.5 and σ_b² = 0.05: by layer, averaged
over draws of the weights, the variance q of the pre-activations, the correlation c of
two inputs and the growth χ of squared gradients on their way back, beside

    q' = σ_w² E φ(√q z)² + σ_b²     c' = (σ_w² E φ(u) φ(v) + σ_b²)/q'     χ = σ_w² E φ'²

from the inputs on. One of the networks then learns digits, and `SignalMonitor` shows
how the three leave the theory of random weights. Inputs have mean square 1, so that all
start with the same q.

References:
    Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ntk_callbacks import Probe, SignalMonitor, signal_statistics, theory
from ntk_callbacks.experiments.data import Digits
from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.experiments.module import Classifier
from ntk_callbacks.studies.live import live_curves
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "q": "variance q of the pre-activations",
    "c": "correlation c of two inputs",
    "chi": "growth χ of squared gradients (factor)",
}


@dataclass(frozen=True)
class SignalPropagation:
    """q, c and χ by layer, at the start and while one network learns.

    Args:
        width: Units of a hidden layer.
        depth: Hidden layers.
        seeds: Networks that are averaged, besides the one that learns.
        sigma_w: σ_w.
        bias_variance: σ_b².
        examples: Digits whose signals are measured.
        steps: Updates of the network that learns.
        learning_rate: Of plain SGD on the mean cross-entropy, with batches of 32.
    """

    width: int = 1000
    depth: int = 20
    seeds: int = 20
    sigma_w: float = 1.5
    bias_variance: float = 0.05
    examples: int = 16
    steps: int = 30
    learning_rate: float = 0.01

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each, at its start, and one that learns."""
        common = {
            "width": self.width,
            "depth": self.depth,
            "sigma_w": self.sigma_w,
            "bias_variance": self.bias_variance,
            "examples": self.examples,
            "learning_rate": self.learning_rate,
        }
        start = {
            f"start,seed={seed}": {"steps": 0, **common} for seed in range(self.seeds)
        }
        return {**start, "live": {"steps": self.steps, **common}}

    @staticmethod
    def run(
        *,
        steps: int,
        width: int,
        depth: int,
        sigma_w: float,
        bias_variance: float,
        examples: int,
        learning_rate: float,
        device: str,
    ) -> Result:
        """Signals of one network by layer; of one that learns, at several steps."""
        x = _inputs(examples).to(device, torch.float32)
        sigma_b = math.sqrt(bias_variance)
        model = MLP((64,), 10, width, depth, "tanh", "standard", sigma_w, sigma_b).to(x)
        found = signal_statistics(model, x)
        start = {"q": found.q[:-1], "c": found.c[:-1], "chi": found.chi}
        result: Result = {name: by_depth.tolist() for name, by_depth in start.items()}
        if steps:
            result |= _live(model, x, start, steps, learning_rate)
        return result

    def findings(self, results: Results) -> Findings:
        """Means over networks beside the recursion, the worst layer of each."""
        theory_of, measured = self._theory(), self._start(results)
        live = results["live"]
        mean = {name: values.mean(0) for name, values in measured.items()}
        table: list[dict[str, float | str]] = [
            {
                "layer": layer + 1,
                **{
                    column: float(values[layer])
                    for name in _LABELS
                    for column, values in (
                        (name, mean[name]),
                        (f"{name}_theory", theory_of[name]),
                    )
                },
            }
            for layer in range(self.depth)
        ]
        return Findings(
            table,
            {
                "q_worst_error": _largest(mean["q"] / theory_of["q"] - 1),
                "c_worst_error": _largest(mean["c"] - theory_of["c"]),
                "chi_worst_error": _largest(mean["chi"] / theory_of["chi"] - 1),
                "live_difference": live["live_difference"],
                "live_loss_share": live["loss_share"],
            },
        )

    def draw(self, results: Results, figure: "Figure") -> None:
        """Each of the three against the layer; theory dashed, what is learnt red."""
        theory_of, measured = self._theory(), self._start(results)
        layers = range(1, self.depth + 1)
        for axes, (name, label) in zip(
            figure.subplots(1, 3), _LABELS.items(), strict=True
        ):
            values = measured[name]
            spread = values.std(0, correction=0)
            axes.errorbar(
                layers,
                values.mean(0),
                spread,
                fmt="o",
                markersize=3,
                label=f"start, mean and\nscatter of {len(values)}",
            )
            axes.plot(layers, theory_of[name], "k--", label="theory")
            self._draw_live(axes, results["live"], name)
            axes.set_xlabel("layer")
            axes.set_ylabel(label)
            # Layers are whole.
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")

    def _draw_live(self, axes: "Axes", live: Result, name: str) -> None:
        last = max(*live["live_steps"], 1)
        for step, values in zip(live["live_steps"], live[f"live_{name}"], strict=True):
            share = math.log1p(step) / math.log1p(last)
            axes.plot(
                range(1, self.depth + 1),
                values,
                color=(0.85, 0.1, 0.1, 0.15 + 0.7 * share),
                linewidth=1,
                label=f"one network,\nstep 0 … {last}" if step == last else None,
            )

    def _start(self, results: Results) -> dict[str, Tensor]:
        """Name -> values of all networks at their start, (networks, layers)."""
        return {
            name: torch.tensor([r[name] for r in results.values()], dtype=torch.float64)
            for name in _LABELS
        }

    def _theory(self) -> dict[str, Tensor]:
        """Name -> the recursion from the inputs on, by layer."""
        x = _inputs(self.examples)
        i, j = torch.triu_indices(self.examples, self.examples, offset=1)
        overlap = (x @ x.mT / x.shape[1])[i, j]
        gain, shift = self.sigma_w**2, self.bias_variance
        q = gain + shift
        # The correlation of every pair for itself: the map is not linear.
        found = theory.signal_trajectory(
            "tanh",
            self.sigma_w,
            math.sqrt(shift),
            depth=self.depth - 1,
            q=q,
            c=(gain * overlap + shift) / q,
        )
        by_layer = found.q[:, 0]
        chi = gain * theory.moment("tanh", by_layer, derivative=1)
        return {"q": by_layer, "c": found.c.mean(1), "chi": chi}


def _inputs(examples: int) -> Tensor:
    """Digits, each of mean square 1."""
    x, _ = digits(examples)
    return x / x.square().mean(1, keepdim=True).sqrt()


def _largest(errors: Tensor) -> float:
    return float(errors.abs().max())


def _live(
    model: MLP, x: Tensor, start: dict[str, Tensor], steps: int, learning_rate: float
) -> Result:
    """Train with the monitor on, and read what it kept."""
    inputs, labels = digits(320, dtype=x.dtype)

    def loss() -> float:
        with torch.no_grad():
            outputs = model.to(x)(inputs.to(x)).cpu()
        return float(functional.cross_entropy(outputs, labels))

    before = loss()
    monitor = SignalMonitor(
        Probe(x), every="5 per decade", per_layer=True, on_error="raise"
    )
    curves = live_curves(
        Classifier(model, partial(torch.optim.SGD, lr=learning_rate)),
        Digits(batch_size=32),
        [monitor],
        steps=steps,
        device=x.device.type,
    )
    result: Result = {"loss_share": loss() / before, "live_difference": 0.0}
    for name, direct in start.items():
        group = f"signal_layers/{name}/"
        by_depth = [curve for tag, curve in curves.items() if tag.startswith(group)]
        by_depth = by_depth[: len(direct)]  # the readout is the last
        values = torch.tensor([curve.values.tolist() for curve in by_depth]).double().mT
        result["live_steps"] = [int(step) for step in by_depth[0].steps]
        result[f"live_{name}"] = values.tolist()
        difference = _largest(values[0] / direct - 1)
        result["live_difference"] = max(result["live_difference"], difference)
    return result
