"""`deep_cnn`: convolutional networks of any depth train, if each layer is an isometry.

Plain networks of 3×3 convolutions and tanh, without skip connections or normalization,
start at the critical point (χ = 1). Delta-orthogonal weights, orthogonal at the center
tap and 0 elsewhere, multiply the norm of every image by 1, under any padding: without φ
all singular values of the input-output Jacobian are 1 at any depth, and with φ the
network of 200 layers learns as fast as that of 10.

Gaussian weights keep gradients only on average over wide layers and over an image
without borders. Where images are padded with zeros, each layer loses what falls
outside, and after some tens of layers nothing is left. With circular padding gradients
survive, but singular values spread: of networks of 200 layers some learn in as many
steps as orthogonal ones need and others do not, which is reported and not checked.

References:
    Xiao, Bahri, Sohl-Dickstein, Schoenholz, Pennington 2018, arXiv:1806.05393.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from ntk_callbacks.engine.input_jacobian import input_singular_values
from ntk_callbacks.engine.signals import signal_statistics
from ntk_callbacks.experiments.initializations import critical_
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits
from ntk_callbacks.theory.jacobian_spectra import Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WEIGHTS: tuple[Weights, ...] = ("orthogonal", "gaussian")
Padding: TypeAlias = Literal["zeros", "circular"]
_PADDINGS: tuple[Padding, ...] = ("zeros", "circular")
_SIGMA_B = 2e-5**0.5  # as in the publication, σ_b² = 2·10⁻⁵
_LEARNED = 0.99  # accuracy at which training ends


@dataclass(frozen=True)
class DeepCNN:
    """Training accuracy against depth, of orthogonal and of Gaussian weights.

    Args:
        depths: Convolutions, rising.
        rates: Learning rates, of which each depth takes its best.
        channels: Of every convolution.
        examples: Digits, split evenly over the classes.
        steps: Updates of SGD with momentum 0.9 on all examples, at most.
        seeds: Networks for each setting, with padding by zeros.
        circular_seeds: The same with circular padding, of the greatest depth only.
        linear_channels: Of the linear networks, on images of 8×8 pixels.
    """

    depths: list[int]
    rates: list[float]
    channels: int = 16
    examples: int = 50
    steps: int = 40
    seeds: int = 2
    circular_seeds: int = 1
    linear_channels: int = 4

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each: linear, at the start, or learning."""
        deepest = max(self.depths)
        found: dict[str, dict[str, Any]] = {}
        for weights, padding in product(_WEIGHTS, _PADDINGS):
            kind = {"weights": weights, "padding": padding, "depth": deepest}
            found[f"linear,{weights},{padding}"] = {
                "part": "linear",
                **kind,
                "channels": self.linear_channels,
            }
            found[f"start,{weights},{padding}"] = {
                "part": "start",
                **kind,
                "channels": self.channels,
                "examples": self.examples,
            }
        zeros = product(_PADDINGS[:1], self.depths, range(self.seeds))
        circular = product(_PADDINGS[1:], [deepest], range(self.circular_seeds))
        for (padded, depth, seed), weights, rate in product(
            [*zeros, *circular], _WEIGHTS, self.rates
        ):
            name = f"{weights},{padded},depth={depth},rate={rate:.4g},seed={seed}"
            found[f"training,{name}"] = {
                "part": "training",
                "weights": weights,
                "padding": padded,
                "depth": depth,
                "rate": rate,
                "seed": seed,
                "channels": self.channels,
                "examples": self.examples,
                "steps": self.steps,
            }
        return found

    @staticmethod
    def run(*, part: str, seed: int = 0, **parameters: Any) -> Result:
        """Singular values, gradients by layer, or what a network learns."""
        return _PARTS[part](**parameters)

    def _best(
        self, results: Results, weights: str, depth: int, padding: str = "zeros"
    ) -> tuple[float, float]:
        """Largest mean accuracy over seeds, and the learning rate that it takes."""
        best = (-1.0, 0.0)
        for rate in self.rates:
            chosen = [
                r["accuracy"]
                for r in results.values()
                if r["part"] == "training"
                and (r["weights"], r["padding"]) == (weights, padding)
                and (r["depth"], r["rate"]) == (depth, rate)
            ]
            best = max(best, (sum(chosen) / len(chosen), rate))
        return best

    def findings(self, results: Results) -> Findings:
        """Distance from isometry, and accuracy at the best rate."""
        shallow, deep = min(self.depths), max(self.depths)
        table: list[dict[str, float | str]] = []
        numbers: dict[str, float] = {}
        for weights in _WEIGHTS:
            numbers[f"{weights}_isometry_error"] = max(
                abs(results[f"linear,{weights},{padding}"][end] - 1)
                for padding in _PADDINGS
                for end in ("largest", "smallest")
            )
            settings = [*((d, "zeros") for d in self.depths), (deep, "circular")]
            for depth, padding in settings:
                accuracy, rate = self._best(results, weights, depth, padding)
                table.append(
                    {
                        "weights": weights,
                        "padding": padding,
                        "depth": depth,
                        "accuracy": accuracy,
                        "best_rate": rate,
                    }
                )
            numbers |= {
                f"{weights}_shallow_accuracy": self._best(results, weights, shallow)[0],
                f"{weights}_deep_accuracy": self._best(results, weights, deep)[0],
                f"{weights}_circular_accuracy": self._best(
                    results, weights, deep, "circular"
                )[0],
            }
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Accuracy against depth, and gradients by layer at the start."""
        left, right = figure.subplots(1, 2)
        deep = max(self.depths)
        for weights, color in zip(_WEIGHTS, ("C0", "C1"), strict=True):
            best = [self._best(results, weights, d)[0] for d in self.depths]
            left.plot(self.depths, best, "o-", color=color, label=weights)
            circular = self._best(results, weights, deep, "circular")[0]
            label = f"{weights}, circular"
            left.plot([deep], [circular], "x", ms=9, color=color, label=label)
            for padding, line in zip(_PADDINGS, ("-", "-."), strict=True):
                gradients = results[f"start,{weights},{padding}"]["gradient"]
                layers = range(1, len(gradients) + 1)
                shares = [g / gradients[-1] for g in gradients]
                right.semilogy(
                    layers, shares, line, color=color, label=f"{weights}, {padding}"
                )
        self._finish(left, right)

    def _finish(self, left: "Axes", right: "Axes") -> None:
        left.axhline(0.1, color="gray", linestyle=":", label="guessing")
        left.set_xscale("log")
        left.set_xticks(self.depths, [str(d) for d in self.depths])
        left.minorticks_off()
        left.set_ylim(0, 1.05)
        left.set_xlabel("depth (convolutions)")
        left.set_ylabel(f"training accuracy after {self.steps} steps, best rate")
        left.legend(loc="lower left", fontsize="small")
        right.axhline(
            1, color="black", linestyle="--", label="critical, infinite width"
        )
        right.set_xlabel("layer (convolution)")
        right.set_ylabel("squared gradient at the start, over that of the last layer")
        right.legend()


def _linear(
    *, weights: Weights, padding: Padding, depth: int, channels: int, device: str
) -> Result:
    """Extreme singular values of a network without φ."""
    model = nn.Sequential(
        *(
            nn.Conv2d(
                channels, channels, 3, padding=1, bias=False, padding_mode=padding
            )
            for _ in range(depth)
        )
    )
    model.to(device, torch.float64)
    critical_(model, "linear", weights=weights)
    x = torch.randn(1, channels, 8, 8, dtype=torch.float64, device=device)
    values = input_singular_values(model, x)
    return {"largest": float(values.max()), "smallest": float(values.min())}


def _network(
    weights: Weights, padding: Padding, depth: int, channels: int, device: str
) -> nn.Module:
    # Four pixels become four channels: a quarter of the operations, nothing lost.
    layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
    for layer in range(depth):
        inputs = channels if layer else 4
        layers += [
            nn.Conv2d(inputs, channels, 3, padding=1, padding_mode=padding),
            nn.Tanh(),
        ]
    readout = nn.Linear(16 * channels, 10)
    model = nn.Sequential(*layers, nn.Flatten(), readout).to(device)
    return critical_(model, "tanh", sigma_b=_SIGMA_B, weights=weights)


def _start(
    *,
    weights: Weights,
    padding: Padding,
    depth: int,
    channels: int,
    examples: int,
    device: str,
) -> Result:
    """Mean square of the gradient at each convolution, before training."""
    x, _ = digits(examples, images=True, device=device, dtype=torch.float32)
    # In float64: the square of what vanishes is no float32.
    model = _network(weights, padding, depth, channels, device).double()
    found = signal_statistics(model, x.double())
    return {"gradient": found.gradient_square[:-1].tolist()}


def _training(
    *,
    weights: Weights,
    padding: Padding,
    depth: int,
    rate: float,
    channels: int,
    examples: int,
    steps: int,
    device: str,
) -> Result:
    """Accuracy on the digits learned from, and the steps it took."""
    x, labels = digits(examples, images=True, device=device, dtype=torch.float32)
    model = _network(weights, padding, depth, channels, device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    accuracy, step = 0.0, 0
    for step in range(steps + 1):
        outputs = model(x)
        accuracy = float((outputs.argmax(1) == labels).float().mean())
        if accuracy >= _LEARNED or step == steps:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {"accuracy": accuracy, "steps_taken": step}


_PARTS: dict[str, Callable[..., Result]] = {
    "linear": _linear,
    "start": _start,
    "training": _training,
}
