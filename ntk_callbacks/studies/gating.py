"""`gating`: recurrent networks with gates remember where those without forget.

A step of the state of a vanilla RNN, a minimalRNN, a GRU and an LSTM has a Jacobian J;
(1/n) tr J Jᵀ is held to theory in wide cells whose weights are drawn anew at each step.
Then small networks must name, after T − 1 steps of noise, what they were shown first.
The vanilla one starts at its critical point, (1/n) tr J Jᵀ = 1, from where gradients
would not vanish on average: but singular values spread around it, and after tens of
steps few directions are left. Gates that start open, with a bias of 5, keep a little
less of the mean square at each step, in a minimalRNN and a GRU nearly the same in every
direction; the cell of an LSTM adds up its inputs and stretches.

References:
    Chen, Pennington, Schoenholz 2018, arXiv:1806.05394; Gilboa et al. 2019,
    arXiv:1901.08987.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ntk_callbacks import theory
from ntk_callbacks.engine.state_jacobians import jacobian_by_time
from ntk_callbacks.studies.recurrent_cells import (
    CELLS,
    Remembering,
    measured_stretch,
    stretch,
)
from ntk_callbacks.studies.study import Findings, Result, Results
from ntk_callbacks.theory import Gate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES = 4
_SQUARE = 0.8  # mean square of the inputs of wide cells
_WIDE = {  # gates in the order of torch, each term of theory a share of several percent
    "vanilla": [Gate(1.4, 0.5, 0.1)],
    "minimal": [Gate(2.0, 1.0, 0.1, 0.5)],
    "gru": [Gate(4.0, 1.0, 0.2), Gate(1.5, 0.7, 0.0, -1.0), Gate(4.0, 0.5, 0.1)],
    "lstm": [
        Gate(1.0, 1.0, 0.2, 0.3),
        Gate(1.5, 0.7, 0.0, 1.0),
        Gate(2.5, 0.5, 0.1),
        Gate(1.7, 0.4, 0.3, -0.2),
    ],
}


def _starting_gates(kind: str, bias: float) -> list[Gate]:
    """Of a network that learns: critical, or with the gate of memory open."""
    plain, memory = Gate(1.0, 0.3), Gate(1.0, 0.3, mean=bias)
    if kind == "vanilla":
        # The inputs act as a bias does.
        return [Gate(float(theory.critical_sigma_w("tanh", 0.3)), 0.3)]
    if kind == "minimal":
        return [memory]
    return [plain, memory, plain] if kind == "gru" else [plain, memory, plain, plain]


@dataclass(frozen=True)
class Gating:
    """Stretch of a step, and what is remembered after T steps.

    Args:
        lengths: T, rising; the longest is checked.
        rates: Learning rates of Adam, of which each network takes its best.
        width: Units where (1/n) tr J Jᵀ is measured.
        sequences: Of random inputs there.
        skip: Steps there before the state is stationary.
        steps: Steps there that are measured.
        seeds: Networks for each measurement and setting.
        units: Of networks that learn.
        bias: Mean of the gate that keeps the state.
        batch: Sequences of an update, always new ones.
        updates: At most.
    """

    lengths: list[int]
    rates: list[float]
    width: int = 1000
    sequences: int = 32
    skip: int = 20
    steps: int = 30
    seeds: int = 2
    units: int = 32
    bias: float = 5.0
    batch: int = 32
    updates: int = 150

    def jobs(self) -> dict[str, dict[str, Any]]:
        """One network each: wide, at the start, or learning."""
        found: dict[str, dict[str, Any]] = {}
        small = {"units": self.units, "bias": self.bias, "batch": self.batch}
        for kind, seed in product(CELLS, range(self.seeds)):
            found[f"wide,{kind},seed={seed}"] = {
                "part": "wide",
                "kind": kind,
                "seed": seed,
                "width": self.width,
                "examples": self.sequences,
                "skip": self.skip,
                "steps": self.steps,
            }
        for kind in CELLS:
            longest = {"kind": kind, "length": max(self.lengths), **small}
            found[f"start,{kind}"] = {"part": "start", **longest}
        for length, kind, rate, seed in product(
            self.lengths, CELLS, self.rates, range(self.seeds)
        ):
            found[f"training,{kind},length={length},rate={rate:.4g},seed={seed}"] = {
                "part": "training",
                "kind": kind,
                "length": length,
                "rate": rate,
                "seed": seed,
                "updates": self.updates,
                **small,
            }
        return found

    @staticmethod
    def run(*, part: str, seed: int = 0, **parameters: Any) -> Result:
        """Stretch of a wide cell, Jacobians over time, or what a network learns."""
        return _PARTS[part](**parameters)

    def _stretch(self, results: Results, kind: str) -> float:
        found: list[float] = [
            r["stretch"]
            for r in results.values()
            if (r["part"], r["kind"]) == ("wide", kind)
        ]
        return sum(found) / len(found)

    def _best(self, results: Results, kind: str, length: int) -> float:
        """Mean accuracy over seeds at the best rate."""
        means: list[float] = []
        for rate in self.rates:
            found = [
                r["accuracy"]
                for r in results.values()
                if r["part"] == "training"
                and (r["kind"], r["length"], r["rate"]) == (kind, length, rate)
            ]
            means.append(sum(found) / len(found))
        return max(means)

    def findings(self, results: Results) -> Findings:
        """Stretch beside theory, and accuracy by length."""
        table: list[dict[str, float | str]] = []
        numbers: dict[str, float] = {}
        for kind in CELLS:
            expected = stretch(kind, _WIDE[kind], _SQUARE)
            measured = self._stretch(results, kind)
            numbers[f"{kind}_error"] = abs(measured / expected - 1)
            table.append(
                {
                    "cell": kind,
                    "stretch": measured,
                    "theory": expected,
                    **{
                        f"accuracy_{length}": self._best(results, kind, length)
                        for length in self.lengths
                    },
                }
            )
        short, long = min(self.lengths), max(self.lengths)
        numbers["worst_stretch_error"] = max(numbers.values())
        numbers["vanilla_short_accuracy"] = self._best(results, "vanilla", short)
        numbers["vanilla_long_accuracy"] = self._best(results, "vanilla", long)
        numbers["gated_long_accuracy"] = min(
            self._best(results, kind, long) for kind in CELLS if kind != "vanilla"
        )
        return Findings(table, numbers)

    def draw(self, results: Results, figure: "Figure") -> None:
        """Jacobians over time at the start, and accuracy by length."""
        left, right = figure.subplots(1, 2)
        for number, kind in enumerate(CELLS):
            color, found = f"C{number}", results[f"start,{kind}"]
            times = found["times"]
            left.semilogy(times, found["mean_square"], color=color, label=kind)
            left.semilogy(times, found["largest_square"], ":", color=color)
            accuracies = [self._best(results, kind, length) for length in self.lengths]
            right.plot(self.lengths, accuracies, "o-", color=color, label=kind)
        left.set_xlabel("time t (steps)")
        left.set_ylabel("s² of ∂(last state)/∂(state at t), at the start")
        left.legend(title="mean; dotted: largest")
        right.axhline(1 / _CLASSES, color="gray", linestyle=":", label="guessing")
        right.set_xticks(self.lengths, [str(length) for length in self.lengths])
        right.set_ylim(0, 1.05)
        right.set_xlabel("length of the sequence T (steps)")
        right.set_ylabel(f"accuracy after at most {self.updates} updates, best rate")
        right.legend()


def _wide(*, kind: str, **settings: Any) -> Result:
    """Stretch of a step of one wide cell."""
    gates = _WIDE[kind]
    return {"stretch": measured_stretch(kind, gates, input_square=_SQUARE, **settings)}


def _network(kind: str, units: int, bias: float, device: str) -> Remembering:
    gates = _starting_gates(kind, bias)
    return Remembering(kind, gates, _CLASSES + 1, units, _CLASSES).to(device)


def _sequences(count: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """The class first, then noise in an input of its own."""
    labels = torch.randint(_CLASSES, (count,), device=device)
    x = torch.zeros(count, length, _CLASSES + 1, device=device)
    x[:, 0, :_CLASSES] = nn.functional.one_hot(labels, _CLASSES).to(x)
    x[:, 1:, _CLASSES] = torch.randn(count, length - 1, device=device)
    return x, labels


def _start(
    *, kind: str, length: int, units: int, bias: float, batch: int, device: str
) -> Result:
    """Squared singular values of the Jacobian from each time to the last."""
    model = _network(kind, units, bias, device)
    x, _ = _sequences(batch, length, device)
    (found,) = jacobian_by_time(model, x, count=4).values()
    return {
        "times": found.times.tolist(),
        "mean_square": found.to_end.mean_square.mean(1).tolist(),
        "largest_square": found.to_end.largest.square().mean(1).tolist(),
    }


def _training(
    *,
    kind: str,
    length: int,
    rate: float,
    units: int,
    bias: float,
    batch: int,
    updates: int,
    device: str,
) -> Result:
    """Mean accuracy over the last ten updates, on sequences never seen before."""
    model = _network(kind, units, bias, device)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    accuracies: list[float] = []
    last = 0.0
    for _ in range(updates):
        x, labels = _sequences(batch, length, device)
        outputs = model(x)
        accuracies.append(float((outputs.argmax(1) == labels).float().mean()))
        recent = accuracies[-10:]
        last = sum(recent) / len(recent)
        if len(recent) == 10 and last >= 0.99:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"accuracy": last, "updates_taken": len(accuracies)}


_PARTS: dict[str, Callable[..., Result]] = {
    "wide": _wide,
    "start": _start,
    "training": _training,
}
