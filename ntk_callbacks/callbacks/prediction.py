"""PredictionMonitor: what the kernel says of the next step, beside what it does."""

import time
from typing import Any

from torch.optim import Optimizer

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.ending import is_last_step
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.gradients import (
    OneEvaluation,
    clipped_by_trainer,
    skips_step,
    unscaled_gradients,
)
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.precautions import refuse_sharded
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.guard import isolated_rng
from ntk_callbacks.instruments.prediction import PredictionInstrument
from ntk_callbacks.instruments.probe_loss import ProbeLoss


class PredictionMonitor(Monitor):
    """Logs how well the tangent kernel predicts what a step does to the probe.

    Before a step the outputs f of the probe are predicted to first order in the step,
    JΔθ with J = ∂f/∂θ: once for the exact step Δθ of the optimizer (momentum, weight
    decay, Adam's scaling, rates by group, clipped and accumulated gradients), once for
    one of plain gradient descent at the same learning rate η, −η Θ(probe, batch) ∇_f L.
    After the step, at the step's own number:

    - `prediction/loss`, the loss L of the probe, after the step;
    - `prediction/loss_change_actual`, ΔL;
    - `prediction/loss_change_optimizer`, ∇_f L · JΔθ;
    - `prediction/loss_change_gradient_flow`, −η ∇_f L · Θ(probe, batch) ∇_f L;
    - `prediction/loss_change_linearized`, L(f + JΔθ) − L(f): off ΔL by the curvature of
      the network alone, where `…_optimizer` lacks that of the loss too;
    - `prediction/explained`, 1 − |ΔL − ∇_f L · JΔθ|/|ΔL|;
    - `prediction/output_cosine`, the cosine of JΔθ and the real Δf over all outputs;
    - `prediction/output_error`, ‖Δf − JΔθ‖/‖Δf‖;
    - `prediction/step_error`, ‖Δθ − predicted Δθ‖/‖Δθ‖: 0, unless code that runs after
      this callback changes gradients or weights.

    On demand `prediction_classes/loss_change_actual/<label>`, `…_optimizer/<label>` and
    `…_gradient_flow/<label>`, which add up over the labels. All changes are zero where
    a gradient scaler skips the step. `instrument.changes` holds every output.

    Where no update was predicted there is only `prediction/loss`: at the start, and at
    a last step that could not be foreseen. Costs two products J·v on the probe, three
    forward passes, and for the time of the step three copies of the weights; the
    weights and the state of the optimizer are copied once more to take the step aside.

    Args:
        probe: As in `NTKMonitor`; with targets, for the loss.
        every: As in `NTKMonitor`; asked for an update before it is made.
        loss_fn: `(outputs, targets) -> ()` in float64; by default the mean
            cross-entropy if the targets are integer labels `(n,)`. Without one only
            outputs are compared.
        output_fn: As in `NTKMonitor`.
        per_class: Log the changes of each class too; for the default loss.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes, or `"2GiB"`, that the products may take.
        name: Group of the tags; tells two monitors apart.
        history: As in `JacobianMonitor`.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = PredictionMonitor(probe=64, every="100 steps")

    References:
        Jacot, Gabriel, Hongler 2018, arXiv:1806.07572 (kernel gradient); Lee et al.
        2019, arXiv:1902.06720 (linearized networks).
    """

    instrument: PredictionInstrument

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        loss_fn: ProbeLoss | None = None,
        output_fn: OutputFunction | None = None,
        per_class: bool = False,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "prediction",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            PredictionInstrument(
                loss_fn=loss_fn,
                output_fn=output_fn,
                per_class=per_class,
                mode=mode,
                memory_budget=memory_budget,
                name=name,
            ),
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(name, mode, per_class),
            history=history,
        )

    def _reset(self) -> None:
        super()._reset()
        self._failed: Exception | None = None
        self._evaluation = OneEvaluation()

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Predict the update that is about to be made, if it is to be measured.

        Gradients are accumulated, reduced and unscaled by now, but not clipped.
        """
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._failed or not (self._active(trainer) and self._is_due(trainer)):
            return
        start = time.perf_counter()
        try:
            refuse_sharded(trainer)
            self._evaluation.check(trainer, optimizer)
            with isolated_rng():  # copying what an optimizer holds may run any code
                gradients = unscaled_gradients(trainer, optimizer, pl_module)
                if skips_step(trainer, pl_module, gradients, self._differentiated):
                    gradients = {}
                self.instrument.predict(
                    pl_module,
                    optimizer,
                    self.progress.step + 1,
                    gradients=gradients,
                    applied=clipped_by_trainer(
                        trainer, pl_module, optimizer, gradients
                    ),
                )
        except Exception as error:
            self._failed = error  # told when this update is measured
        self.when.prepared(time.perf_counter() - start)

    def _is_due(self, trainer: Any) -> bool:
        """Whether the next update will be measured, as far as can be known."""
        ends_epoch = trainer.is_last_batch
        epoch = trainer.current_epoch + 1 if ends_epoch else None
        if self.when.due(self.progress.step + 1, epoch) or is_last_step(
            trainer, ends_epoch
        ):
            return True
        steps = trainer.global_step + len(trainer.optimizers)
        return bool(trainer.max_steps != -1 and steps >= trainer.max_steps)

    def _take(self, trainer: Any, pl_module: Any) -> None:
        error, self._failed = self._failed, None
        if error is None:
            super()._take(trainer, pl_module)
        else:
            self._skip(trainer, error)
