"""A network beside its linearization: how far apart, since when, and who is better."""

import math
from typing import Any

from torch import Tensor, nn

from ntk_callbacks._types import OutputFunction, Params
from ntk_callbacks.engine.arguments import Request, check_selection
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.engine.series import KernelSeries
from ntk_callbacks.errors import ProbeError, ProbeMismatchError
from ntk_callbacks.guard import measuring
from ntk_callbacks.instruments.after_kernel import (
    accuracy,
    checked_labels,
    joined,
    kernel_accuracy,
)
from ntk_callbacks.instruments.instrument import chosen_options, numbers
from ntk_callbacks.instruments.linearization_options import LinearizationOptions
from ntk_callbacks.instruments.linearization_point import LinearizationPoint
from ntk_callbacks.instruments.linearized_twin import LinearizedTwin
from ntk_callbacks.instruments.probe_loss import (
    LossOfProbe,
    ProbeLoss,
    loss_value,
    probe_outputs,
)
from ntk_callbacks.layout import widened
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement


class LinearizationInstrument:
    """Compares a network with f_lin(θ) = f₀ + J₀(θ − θ₀), J = ∂f/∂θ.

    θ₀, and the buffers that f₀ and J₀ depend on, are those of the first measurement.
    All by products: two passes of the probe at θ, one and a product J₀·Δθ at θ₀.

    Args:
        loss_fn: As in `PredictionInstrument`; the twin trains on it too.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        twin: Compare with a linearized twin that trains too: see `LinearizedTwin`, the
            attribute of this name.
        held_out: Labeled examples on which the network is compared with regression by
            its kernel, now and at θ₀, from the probe.
        options: The less common choices.

    Attributes:
        kernels: Measures the kernels.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> instrument = LinearizationInstrument()
        >>> instrument.start(Probe(torch.eye(2), torch.tensor([0, 1])))
        >>> _ = instrument.measure(net, 0)
        >>> _ = nn.init.zeros_(net.weight)
        >>> instrument.measure(net, 1).scalars["linear/output_distance"] < 1e-6
        True

    References:
        Lee et al. 2019, arXiv:1902.06720; Chizat, Oyallon, Bach 2019, arXiv:1812.07956.
    """

    def __init__(
        self,
        *,
        loss_fn: ProbeLoss | None = None,
        output_fn: OutputFunction | None = None,
        twin: bool = False,
        held_out: Probe | None = None,
        options: LinearizationOptions | None = None,
    ) -> None:
        check_selection(output_fn=output_fn)
        if not (loss_fn is None or callable(loss_fn)):
            raise ValueError("loss_fn must be callable (outputs, targets) -> loss.")
        self.options = chosen_options(options, LinearizationOptions)
        if held_out is not None and self.options.mode == "train":
            raise ValueError(
                'held_out is not for mode="train", where what a network says of an '
                'example depends on the others. Measure with mode="eval".'
            )
        self.name = self.options.name
        self.output_fn, self.held_out = output_fn, held_out
        self.twin: LinearizedTwin | None = None
        if twin:
            self.twin = LinearizedTwin(loss_fn, output_fn, self.options.mode)
        self.kernels = KernelSeries()
        self._loss = LossOfProbe(loss_fn, "LinearizationMonitor")
        self._probe: Probe | None = None
        self._point: LinearizationPoint | None = None
        self._digest = ""
        self._parted = {"": math.nan, "twin_": math.nan}
        self._initial_accuracy = math.nan

    @property
    def point(self) -> LinearizationPoint | None:
        """θ₀; None before the first measurement."""
        return self._point

    def start(self, probe: Probe) -> None:
        """Take the examples that are watched.

        Args:
            probe: The same for the whole run; with targets, for the loss.

        Raises:
            ProbeError: If a loss is asked for and there are no targets.
            ProbeMismatchError: If earlier measurements were made on other examples.
        """
        if probe.targets is None and self._loss.loss_fn is not None:
            raise ProbeError(
                "LinearizationMonitor: the probe has no targets to take a loss of. "
                "Pass Probe(inputs, targets), or no loss_fn."
            )
        held_out = None if self.held_out is None else self.held_out.digest
        digest = probe.digest if held_out is None else f"{probe.digest} {held_out}"
        if self._digest not in ("", digest):
            raise ProbeMismatchError(
                "LinearizationMonitor: earlier measurements of this run were made on "
                f"other examples (hash {self._digest[:8]}) than this probe of "
                f"{probe.n} (hash {digest[:8]}), or with another held_out. Pass the "
                "same ones (Probe.save and Probe.load keep one), or start a new run."
            )
        self._probe, self._digest = probe, digest

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """The network on the probe now, beside its linearizations.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            `output_distance`, ‖f − f_lin‖/‖f − f₀‖ over all outputs, NaN where f = f₀;
            `loss`, L(f), and `loss_gap`, L(f_lin) − L(f); `agreement`, the share of
            examples with the same largest output; `parting_step`, the first measured
            step with a distance beyond the threshold, NaN before. With a twin the same
            of the twin's own weights (`twin_output_distance`, …), and `twin_loss`, its
            loss. With `held_out` the accuracies of the network and of regression by
            its kernel, now and at θ₀.

        Raises:
            RuntimeError: If `start` was not called.
            ValueError: If `loss_fn` returns something else than one number.
            ProbeError: If a label is not among the outputs.
            UnsupportedModelError: If J has no products on this model, or its parameters
                are not those of the first measurement.
            MemoryBudgetError: If one of them does not fit.
        """
        probe = self._probe
        if probe is None:
            raise RuntimeError("LinearizationInstrument: call start(probe) first.")
        found: dict[str, float | Tensor] = {}
        point = self._point or LinearizationPoint.of(model)
        moved: dict[str, Params] = {"": dict(model.named_parameters())}
        if self.twin is not None and not self.twin.lost:
            moved["twin_"] = self.twin.parameters or point.parameters
        changes = {who: point.displacement(named) for who, named in moved.items()}
        compared = self._accuracies(model, probe, step)
        with measuring(model, self.options.mode):
            f = probe_outputs(model, probe.inputs, self.output_fn)
            point.put_into(model)
            f0 = probe_outputs(model, probe.inputs, self.output_fn)
            linear = self._linearized(model, probe, f0, changes)
        loss_fn, y = self._loss.of(probe, f)
        if loss_fn is not None:
            found["loss"] = loss_value(loss_fn, f, y)
        for who, other in linear.items():
            distance = float((f - other).norm() / (f - f0).norm())
            if math.isnan(self._parted[who]) and distance > self.options.threshold:
                self._parted[who] = float(step)
            found[f"{who}output_distance"] = distance
            found[f"{who}parting_step"] = self._parted[who]
            if loss_fn is not None:
                loss = loss_value(loss_fn, other, y)
                found |= (
                    {"twin_loss": loss} if who else {"loss_gap": loss - found["loss"]}
                )
            if _are_classes(probe.targets, f):
                found[f"{who}agreement"] = (
                    (f.argmax(1) == other.argmax(1)).double().mean()
                )
        self._point = point
        scalars = {f"{self.name}/{tag}": v for tag, v in (found | compared).items()}
        return Measurement(step, scalars=numbers(scalars))

    def _linearized(
        self, model: nn.Module, probe: Probe, f0: Tensor, changes: dict[str, Params]
    ) -> dict[str, Tensor]:
        """f₀ + J₀Δθ for each Δθ, of a model that stands at θ₀."""
        moving = {
            name
            for change in changes.values()
            for name, tensor in change.items()
            if bool((tensor != 0).any())
        }
        with TangentOperator(
            model,
            probe.inputs,
            parameters=(lambda name, _: name in moving) if moving else None,
            output_fn=self.output_fn,
            mode=self.options.mode,
            memory_budget=self.options.memory_budget,
        ) as operator:
            if not moving:
                return dict.fromkeys(changes, f0)
            return {
                who: f0
                + widened(
                    operator.jvp({name: change[name] for name in moving})
                ).view_as(f0)
                for who, change in changes.items()
            }

    def _accuracies(
        self, model: nn.Module, probe: Probe, step: int
    ) -> dict[str, float | Tensor]:
        held_out = self.held_out
        if held_out is None:
            return {}
        with measuring(model, "eval"):
            f = probe_outputs(model, held_out.inputs, self.output_fn)
        labels = checked_labels("the probe", probe, f)
        asked = checked_labels("held_out", held_out, f)
        request = Request(
            outputs="trace",
            output_fn=self.output_fn,
            memory_budget=self.options.memory_budget,
        )
        x = joined(probe.inputs, held_out.inputs)
        parts, _ = self.kernels.measure(model, x, request, step)
        ntk, c = parts[""].to(f.device), f.shape[1]
        now = kernel_accuracy(ntk, labels, asked, c, ridge=self.options.ridge)
        if self._point is None:
            self._initial_accuracy = now
        return {
            "network_accuracy": accuracy(f, asked),
            "after_kernel_accuracy": now,
            "initial_kernel_accuracy": self._initial_accuracy,
        }

    def state_dict(self) -> dict[str, Any]:
        """θ₀ and its buffers, what was found once for all, and the twin."""
        return {
            "point": None if self._point is None else self._point.state_dict(),
            "digest": self._digest,
            "parted": dict(self._parted),
            "initial_accuracy": self._initial_accuracy,
            "twin": {} if self.twin is None else self.twin.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        point = state["point"]
        self._point = None if point is None else LinearizationPoint(**point)
        self._digest = state["digest"]
        self._parted = dict(state["parted"])
        self._initial_accuracy = state["initial_accuracy"]
        if self.twin is not None:
            self.twin.load_state_dict(state["twin"])


def _are_classes(targets: Tensor | None, outputs: Tensor) -> bool:
    if targets is None or targets.is_floating_point() or targets.ndim != 1:
        return False
    return outputs.ndim == 2 and outputs.shape[1] > 1
