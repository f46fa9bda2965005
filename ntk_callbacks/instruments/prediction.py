"""What a step of the optimizer should do to the probe, and what it did."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.products import TangentOperator
from ntk_callbacks.errors import ProbeError
from ntk_callbacks.guard import measuring
from ntk_callbacks.instruments.instrument import checked_name, numbers, one_of
from ntk_callbacks.instruments.predicted_update import (
    PredictedUpdate,
    held_gradients,
)
from ntk_callbacks.instruments.prediction_scores import (
    OutputChanges,
    class_scores,
    loss_scores,
    output_scores,
)
from ntk_callbacks.instruments.probe_loss import (
    LossOfProbe,
    ProbeLoss,
    are_labels,
    loss_value,
    not_labels,
    probe_outputs,
)
from ntk_callbacks.layout import widened
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement


class PredictionInstrument:
    """Predicts a step's effect on the probe from the tangent kernel, and checks it.

    `predict` before the optimizer steps, `measure` after. No kernel is formed: its
    product with the gradient of the batch, Θ(probe, batch) ∇_f L, is J ∂L/∂θ, one
    product of the probe's Jacobian J = ∂f/∂θ with what is in `.grad`.

    Args:
        loss_fn: `(outputs, targets) -> ()`, the loss of the probe, given the outputs in
            float64 as the model shapes them; by default the mean cross-entropy of
            logits `(n, c)` if the targets are integer labels `(n,)`. Without one only
            outputs are compared.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        per_class: Report the loss changes of each class too; for the default loss.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Working memory of the products, in bytes or as `"2GiB"`.
        name: Group of the tags.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(net.weight)
        >>> instrument = PredictionInstrument(loss_fn=nn.functional.mse_loss)
        >>> instrument.start(Probe(torch.ones(1, 1), torch.zeros(1, 1)))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 1)).square().sum().backward()
        >>> instrument.predict(net, sgd, 1)
        >>> sgd.step()
        >>> found = instrument.measure(net, 1).scalars
        >>> round(found["prediction/loss_change_optimizer"], 4)  # 2 f Δf, Δf = −0.2
        -0.4
        >>> round(found["prediction/loss_change_actual"], 4)  # 0.8² − 1
        -0.36
    """

    def __init__(
        self,
        *,
        loss_fn: ProbeLoss | None = None,
        output_fn: OutputFunction | None = None,
        per_class: bool = False,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "prediction",
    ) -> None:
        check_selection(output_fn=output_fn)
        if not (loss_fn is None or callable(loss_fn)):
            raise ValueError("loss_fn must be callable (outputs, targets) -> loss.")
        if per_class and loss_fn is not None:
            raise ValueError(
                "per_class=True needs the default loss, a mean over labeled examples; "
                "what part of another loss belongs to a class is not known. Leave out "
                "one of per_class and loss_fn."
            )
        one_of("mode", mode, get_args(Mode))
        memory_bytes(memory_budget, torch.device("cpu"))
        self.name = checked_name(name)
        self.loss_fn = loss_fn
        self.output_fn = output_fn
        self.per_class = per_class
        self.mode: Mode = mode
        self.memory_budget = memory_budget
        self._changes: OutputChanges | None = None
        self._loss_of = LossOfProbe(loss_fn, "PredictionMonitor")
        self._probe: Probe | None = None
        self._pending: PredictedUpdate | None = None

    @property
    def changes(self) -> OutputChanges | None:
        """Every output at the last update that was predicted and measured."""
        return self._changes

    def start(self, probe: Probe) -> None:
        """Take the examples that are watched.

        Args:
            probe: With targets, for the loss.

        Raises:
            ProbeError: If a loss or classes are asked for and there are no targets.
        """
        if probe.targets is None and (self.loss_fn is not None or self.per_class):
            raise ProbeError(
                "PredictionMonitor: the probe has no targets to take a loss of. Pass "
                "Probe(inputs, targets), or neither loss_fn nor per_class."
            )
        self._probe = probe

    def predict(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        *,
        gradients: Mapping[str, Tensor] | None = None,
        applied: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the weights before a step, and the step that the optimizer would take.

        Runs no model. Predictions of the same update add up: of several optimizers, or
        of several steps of one. Holds three copies of the weights until `measure`.

        Args:
            model: The module that is trained; left exactly as it was.
            optimizer: Steps next, without a closure; left exactly as it was.
            step: The update that this makes, counted from 1.
            gradients: Parameter name -> gradient of the loss of the batch; by default
                what is in `.grad` of the parameters that the optimizer holds.
            applied: The same as the optimizer will see it, after clipping.

        Raises:
            UnsupportedModelError: If the step of this optimizer cannot be predicted.
        """
        if gradients is None:
            gradients = held_gradients(model, optimizer)
        if self._pending is None or self._pending.step != step:
            self._pending = PredictedUpdate(step)
        self._pending.add(
            model, optimizer, gradients, gradients if applied is None else applied
        )

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """The probe after a step, beside what was predicted before it.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            The loss of the probe and, if this update was predicted: how much it changed
            (`actual`), how much to first order by the step of the optimizer and by one
            of plain gradient descent, and how much if outputs moved in a straight line
            (`linearized`, the loss at f + J Δθ); the share that the optimizer's step
            explained; cosine and relative error of the predicted output changes; the
            relative error of the predicted step itself.

        Raises:
            RuntimeError: If `start` was not called.
            ValueError: If `loss_fn` returns something else than one number.
            ProbeError: If a label is not among the outputs.
            UnsupportedModelError: If J has no products on this model.
            MemoryBudgetError: If one of them does not fit.
        """
        pending, self._pending = self._pending, None
        if self._probe is None:
            raise RuntimeError("PredictionInstrument: call start(probe) first.")
        if pending is not None and pending.step != step:
            pending = None
        found: dict[str, Tensor | float] = {}
        if pending is not None:  # before a forward pass that may write to the weights
            found[f"{self.name}/step_error"] = pending.error(model)
        with measuring(model, self.mode):
            after = probe_outputs(model, self._probe.inputs, self.output_fn)
            loss_fn, y = self._loss(self._probe, after)
            if loss_fn is not None:
                found[f"{self.name}/loss"] = loss_value(loss_fn, after, y)
            if pending is not None:
                before, changes = self._compared(model, self._probe, pending, after)
                scores = output_scores(changes)
                if loss_fn is not None:
                    scores |= loss_scores(loss_fn, before, after, y, changes)
                found |= {f"{self.name}/{score}": v for score, v in scores.items()}
                if self.per_class:
                    shares = class_scores(y, changes)
                    found |= {f"{self.name}_classes/{k}": v for k, v in shares.items()}
                self._changes = changes
        return Measurement(step, scalars=numbers(found))

    def _loss(self, probe: Probe, outputs: Tensor) -> tuple[ProbeLoss | None, Tensor]:
        y = probe.targets
        if self.per_class and y is not None and not are_labels(y, outputs):
            raise ProbeError(
                f"{not_labels(y, outputs)}, which per_class=True needs. Leave it out."
            )
        return self._loss_of.of(probe, outputs)

    def _compared(
        self, model: nn.Module, probe: Probe, pending: PredictedUpdate, after: Tensor
    ) -> tuple[Tensor, OutputChanges]:
        """Outputs before the step, and J there times both predicted steps."""
        for name, value in pending.before.items():
            model.get_parameter(name).data.copy_(value)
        before = probe_outputs(model, probe.inputs, self.output_fn)
        with TangentOperator(
            model,
            probe.inputs,
            parameters=lambda name, _: name in pending.before,
            output_fn=self.output_fn,
            mode=self.mode,
            memory_budget=self.memory_budget,
        ) as operator:
            products = [operator.jvp(pending.change), operator.jvp(pending.flow)]
        flat = before.reshape(operator.n, operator.c)
        by_optimizer, by_flow = (widened(p).view_as(flat) for p in products)
        actual = (after - before).view_as(flat)
        return before, OutputChanges(pending.step, flat, actual, by_optimizer, by_flow)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is carried from one update to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore; what was predicted of another run is dropped."""
        self._pending = self._changes = None
