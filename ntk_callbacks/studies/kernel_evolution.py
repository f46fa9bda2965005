"""`kernel_evolution`: the kernel turns fast for a few epochs, then hardly, and learns.

Deep, narrow ReLU networks learn digits whose pixels are noisy and stand among others
that are noise alone, by SGD on the cross-entropy. Instruments watch the traced kernel
Θ_t of the training set: the distance S(Θ, Θ′) = 1 − ⟨Θ, Θ′⟩/(‖Θ‖ ‖Θ′‖) to the start,
the velocity S(Θ_t, Θ_t+dt)/dt, its alignment with the labels, and the accuracy of
regression with Θ_t on held-out digits beside that of Θ₀ and of the network.

The noise is what features are for: the start treats all inputs alike, so that its
kernel has the noise in it, and training turns it to the pixels that matter. Fort et al.
see the velocity fall and then stay; here it goes on falling, because the training set
is learned to the last example.

References:
    Fort et al. 2020, arXiv:2010.15110; Long 2021, arXiv:2105.10585 (after kernel).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntk_callbacks.experiments.models import MLP
from ntk_callbacks.instruments.kernel import KernelInstrument
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.probe import Probe
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.studies.tasks import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KERNEL = ("kernel_distance", "kernel_velocity", "target_alignment")
_ACCURACIES = ("network_accuracy", "after_kernel_accuracy", "initial_kernel_accuracy")


@dataclass(frozen=True)
class KernelEvolution:
    """The kernel of networks that learn features, over epochs.

    Args:
        epochs: At whose ends the kernel is measured, ascending from 0, the start.
        early: Last of them that counts as the beginning.
        seeds: Networks, each with noise of its own.
        examples: Digits to learn from, split evenly over the classes.
        held_out: Digits to test on, at most 300.
        noise: Standard deviation of what is added to the pixels, of variance 1.
        distractors: Inputs beside the 64 pixels that are such noise alone.
        width: Units of a hidden layer.
        depth: Hidden layers.
        learning_rate: Of SGD on the mean cross-entropy of a batch.
        batch_size: Examples in a batch.
    """

    epochs: list[int]
    early: int = 2
    seeds: int = 4
    examples: int = 500
    held_out: int = 300
    noise: float = 0.5
    distractors: int = 128
    width: int = 64
    depth: int = 5
    learning_rate: float = 0.1
    batch_size: int = 20

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each."""
        names = (
            *("epochs", "examples", "held_out", "noise", "distractors"),
            *("width", "depth", "learning_rate", "batch_size"),
        )
        common = {name: getattr(self, name) for name in names}
        return {f"seed={s}": {"seed": s, **common} for s in range(self.seeds)}

    @staticmethod
    def run(
        *,
        seed: int,
        epochs: list[int],
        examples: int,
        held_out: int,
        noise: float,
        distractors: int,
        width: int,
        depth: int,
        learning_rate: float,
        batch_size: int,
        device: str,
    ) -> Result:
        """Train one network, and read its instruments at the ends of epochs."""
        x, labels = digits(examples, dtype=torch.float32)
        x_test, labels_test = digits(held_out, held_out=True, dtype=torch.float32)
        x, x_test = (_noisy(v, noise, distractors).to(device) for v in (x, x_test))
        labels, labels_test = labels.to(device), labels_test.to(device)
        model = MLP(x.shape[1:], 10, width, depth, sigma_b=0.1).to(x)
        optimizer = torch.optim.SGD(model.parameters(), learning_rate)
        kernel = KernelInstrument(outputs="trace", metrics=_KERNEL)
        regression = LinearizationInstrument(held_out=Probe(x_test, labels_test))
        probe = Probe(x, labels)
        kernel.start(probe)
        regression.start(probe)
        found: dict[str, list[float]] = {name: [] for name in (*_KERNEL, *_ACCURACIES)}
        step = 0
        for epoch in range(epochs[-1] + 1):
            if epoch in epochs:
                with _quietly():
                    scalars = kernel.measure(model, step).scalars
                    scalars |= regression.measure(model, step).scalars
                for group, names in (("ntk", _KERNEL), ("linear", _ACCURACIES)):
                    for name in names:
                        value = scalars.get(f"{group}/{name}", math.nan)
                        found[name].append(value)
            if epoch < epochs[-1]:
                for batch in torch.randperm(examples).split(batch_size):  # type: ignore[no-untyped-call]
                    optimizer.zero_grad()
                    loss = torch.nn.functional.cross_entropy(
                        model(x[batch]), labels[batch]
                    )
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    step += 1
        # Per epoch instead of per step.
        per_epoch = math.ceil(examples / batch_size)
        velocities = [v * per_epoch for v in found["kernel_velocity"][1:]]
        return {**found, "kernel_velocity": velocities}

    def findings(self, results: Results) -> Findings:
        """Means over networks at each epoch."""
        curves = {name: self._mean(results, name) for name in (*_KERNEL, *_ACCURACIES)}
        table: list[dict[str, float | str]] = [
            {
                "epoch": epoch,
                "distance": curves["kernel_distance"][i],
                "velocity": curves["kernel_velocity"][i - 1] if i else "–",
                "alignment": curves["target_alignment"][i],
                "network": curves["network_accuracy"][i],
                "after_kernel": curves["after_kernel_accuracy"][i],
            }
            for i, epoch in enumerate(self.epochs)
        ]
        speeds = list(zip(self.epochs[1:], curves["kernel_velocity"], strict=True))
        early = max(v for epoch, v in speeds if epoch <= self.early)
        late = [v for epoch, v in speeds if epoch > self.early] or [math.nan]
        after, initial = (
            curves[f"{k}_kernel_accuracy"][-1] for k in ("after", "initial")
        )
        gains = [
            r["after_kernel_accuracy"][-1] - r["initial_kernel_accuracy"][-1]
            for r in results.values()
        ]
        alignment = curves["target_alignment"]
        return Findings(
            table,
            {
                "velocity_ratio": early / late[-1],
                "after_kernel_gain": after - initial,
                "least_gain": min(gains),
                "errors_ratio": (1 - initial) / (1 - after) if after < 1 else math.inf,
                "alignment_gain": alignment[-1] - alignment[0],
                "after_kernel_accuracy": after,
                "initial_kernel_accuracy": initial,
            },
        )

    def _mean(self, results: Results, name: str) -> list[float]:
        columns = zip(*(r[name] for r in results.values()), strict=True)
        return [sum(column) / len(column) for column in columns]

    def draw(self, results: Results, figure: "Figure") -> None:
        """Distance and alignment, velocity, and accuracies over the epochs."""
        left, middle, right = figure.subplots(1, 3)
        panels = (
            (
                left,
                {"kernel_distance": "distance to Θ₀", "target_alignment": "alignment"},
            ),
            (middle, {"kernel_velocity": "velocity"}),
            (
                right,
                {
                    "after_kernel_accuracy": "regression with Θ_t",
                    "initial_kernel_accuracy": "regression with Θ₀",
                    "network_accuracy": "network",
                },
            ),
        )
        for axes, names in panels:
            for number, (name, label) in enumerate(names.items()):
                color = f"C{number}"
                for r in results.values():
                    at = self.epochs[-len(r[name]) :]
                    axes.plot(at, r[name], color=color, alpha=0.25, lw=1)
                axes.plot(
                    at, self._mean(results, name), "o-", ms=3, color=color, label=label
                )
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=0)
            ticks = [1, *(2**k for k in range(1, 20) if 2**k <= self.epochs[-1])]
            axes.set_xticks([0, *ticks], ["0", *map(str, ticks)])
            axes.set_xlabel("epoch")
            axes.legend(fontsize="small")
        left.set_ylabel("cosine distance; alignment with the labels")
        middle.set_yscale("log")
        middle.set_ylabel("S(Θ_t, Θ_t+dt)/dt (per epoch)")
        right.set_ylabel("held-out accuracy (share)")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a line for each measurement, which would bury those of the study."""
    silent = logging.root.manager.disable
    logging.disable(max(silent, logging.INFO))
    try:
        yield
    finally:
        logging.disable(silent)


def _noisy(x: Tensor, noise: float, distractors: int) -> Tensor:
    """Noise on every pixel, and beside them inputs that are noise alone."""
    whole = torch.cat([x, x.new_zeros(len(x), distractors)], 1)
    return whole + noise * torch.randn_like(whole)
