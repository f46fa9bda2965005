"""LinearizationMonitor: where a network leaves its linearization, and for what."""

from os import PathLike
from typing import Any

from torch.optim import Optimizer

from ntk_callbacks._types import OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.namespaces import rank_zero_warn
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.callbacks.twin_training import TwinTraining
from ntk_callbacks.instruments.instrument import chosen_options
from ntk_callbacks.instruments.linearization import LinearizationInstrument
from ntk_callbacks.instruments.linearization_options import LinearizationOptions
from ntk_callbacks.instruments.probe_loss import ProbeLoss
from ntk_callbacks.probe import Probe


class LinearizationMonitor(Monitor):
    """Logs how far a network has left its linearization f_lin(θ) = f₀ + J₀(θ − θ₀).

    With f the outputs of the probe, θ₀ the weights of the first measurement and
    J = ∂f/∂θ:

    - `linear/output_distance`, ‖f − f_lin(θ)‖/‖f − f₀‖ over all outputs: 0 while linear
      theory holds, of order 1 where it says nothing of what was learned; NaN at θ₀;
    - `linear/loss`, L(f), and `linear/loss_gap`, L(f_lin(θ)) − L(f);
    - `linear/agreement`, the share of examples with the same largest output, of
      classifiers;
    - `linear/parting_step`, the first measured step at which the distance is beyond
      `LinearizationOptions(threshold=0.1)`; NaN until then.

    With `twin=True` the same of a linearized twin, f₀ + J₀(θ′ − θ₀), that trains beside
    the network: on the same batches, with a copy of its optimizer that follows its
    rates, accumulation and clipping: `linear/twin_output_distance`, `linear/twin_loss`
    (L of the twin itself), `linear/twin_agreement` and `linear/twin_parting_step`. It
    takes a training step or two for each of the network's, in full precision and
    without dropout; BatchNorm keeps the statistics of θ₀, or with `mode="train"` uses
    those of each batch. What a training step does beyond `loss_fn` of a batch `(x, y)`
    (augmentation, penalties, noise on gradients) the twin does not; where gradients
    show it, and no dropout hides it, a warning says so. It needs automatic optimization
    on one process, and an optimizer that steps without a closure.

    With `held_out` accuracies on those examples: `linear/network_accuracy`, and of
    kernel regression from the probe with the traced kernel,
    `linear/after_kernel_accuracy` for the kernel now and
    `linear/initial_kernel_accuracy` for that of θ₀: what the kernel has learned.

    Args:
        probe: As in `NTKMonitor`; with targets, for the loss.
        every: As in `NTKMonitor`.
        loss_fn: `(outputs, targets) -> ()`, the loss of the probe, on which the twin
            trains too; by default the mean cross-entropy if the targets are integer
            labels `(n,)`.
        output_fn: As in `NTKMonitor`.
        twin: Whether the linearized twin trains.
        held_out: Labeled examples that are not trained on: a `Probe`, or the path of a
            saved one.
        options: `LinearizationOptions`: threshold, ridge, mode, memory budget.
        name: Group of the tags, `"linear"`; tells two monitors apart. Like `history`,
            the same as in `options`, and goes before it.
        history: As in `JacobianMonitor`.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = LinearizationMonitor(probe=64, every="5 per decade", twin=True)

    References:
        Lee et al. 2019, arXiv:1902.06720; Chizat, Oyallon, Bach 2019, arXiv:1812.07956;
        Fort et al. 2020, arXiv:2010.15110; Long 2021, arXiv:2105.10585.
    """

    instrument: LinearizationInstrument

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        loss_fn: ProbeLoss | None = None,
        output_fn: OutputFunction | None = None,
        twin: bool = False,
        held_out: Probe | str | PathLike[str] | None = None,
        options: LinearizationOptions | None = None,
        name: str | None = None,
        history: History | None = None,
        on_error: OnError = "warn",
    ) -> None:
        instrument = LinearizationInstrument(
            loss_fn=loss_fn,
            output_fn=output_fn,
            twin=twin,
            held_out=_checked_held_out(held_out),
            options=chosen_options(
                options, LinearizationOptions, name=name, history=history
            ),
        )
        chosen = instrument.options
        twin_of_run = instrument.twin
        self._training = None if twin_of_run is None else TwinTraining(twin_of_run)
        super().__init__(
            instrument,
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(chosen.name, chosen.mode, chosen.threshold, twin),
            history=chosen.history,
        )

    def _reset(self) -> None:
        super()._reset()
        if self._training is not None:
            self._training.loss.restart()

    # The twin -----------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure step 0; refuse a twin that could not follow."""
        super().on_train_start(trainer, pl_module)
        if self._trains_twin(trainer):
            self._try(TwinTraining.check, trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._training is not None:
            self._training.batch = batch if self._trains_twin(trainer) else None
            self._training.alone = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Add the gradient of the twin on the batch."""
        if self._training is not None and self._trains_twin(trainer):
            given = trainer, pl_module, self.instrument.point, self.progress.step
            self._try(self._training.accumulate, *given)

    def on_before_zero_grad(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Forget with the network the gradients of batches that made no step."""
        if self._training is not None and self._trains_twin(trainer):
            self._try(self._training.forget, pl_module)

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Step the twin; the network steps next."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._training is not None and self._trains_twin(trainer):
            given = trainer, pl_module, optimizer, self._differentiated
            self._try(self._training.step, *given)

    def _trains_twin(self, trainer: Any) -> bool:
        twin = self.instrument.twin
        if twin is None or twin.lost or self.instrument.point is None:
            return False
        if self.failures.off:
            twin.lose()  # it misses what comes now
        return not twin.lost and self._active(trainer)

    def _try(self, work: Any, *arguments: Any) -> None:
        """Do this for the twin; if it fails, go on without one."""
        try:
            work(*arguments)
        except Exception as error:
            if self.failures.on_error == "raise":
                raise
            assert self.instrument.twin is not None
            self.instrument.twin.lose()
            rank_zero_warn(
                f"{self._who}: the linearized twin is off for the rest of this run, "
                f"after step {self.progress.step} ({type(error).__name__}: {error}). "
                "The other curves and training go on."
            )

    # State --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As that of any monitor; the twin as it is, whatever was measured last."""
        state = super().state_dict()
        twin = self.instrument.twin
        if twin is None:
            return state
        instrument = {**state["instrument"], "twin": twin.state_dict()}
        return {**state, "instrument": instrument}

    def _take_back(self) -> None:
        if self.progress.before is not None:
            self.progress.before = self.state_dict()  # the twin trained on since
        super()._take_back()


def _checked_held_out(held_out: Any) -> Probe | None:
    if held_out is None or isinstance(held_out, Probe):
        return held_out
    if isinstance(held_out, str | PathLike):
        return Probe.load(str(held_out))
    raise ValueError(
        f"held_out is a {type(held_out).__name__}; expected Probe(inputs, labels) of "
        "examples that are not trained on, or the path of a saved one."
    )
