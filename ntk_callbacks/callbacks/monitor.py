"""The Lightning shell around an instrument: when it measures, and what if it fails."""

import math
import time
from itertools import takewhile
from typing import Any

from torch.optim import Optimizer

from ntk_callbacks.callbacks.as_schedule import Every, as_schedule
from ntk_callbacks.callbacks.callback_metrics import publish, share
from ntk_callbacks.callbacks.ending import is_last_step, weight_sums
from ntk_callbacks.callbacks.failures import Failures, OnError
from ntk_callbacks.callbacks.history import History, MonitorHistory
from ntk_callbacks.callbacks.namespaces import (
    Callback,
    be_callback_of_both,
    rank_zero_warn,
)
from ntk_callbacks.callbacks.precautions import (
    mute,
    refuse_same_name,
    refuse_sharded,
    stable_text,
)
from ntk_callbacks.callbacks.probe_source import probe_of
from ntk_callbacks.callbacks.progress import Progress
from ntk_callbacks.callbacks.uncounted import UncountedUpdates
from ntk_callbacks.callbacks.when import When
from ntk_callbacks.engine.series import share_kernels
from ntk_callbacks.guard import isolated_rng, quietly
from ntk_callbacks.instruments.instrument import Instrument, monitor_tag
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.introduction import introduce
from ntk_callbacks.reporting.loggers import report


class Monitor(Callback):
    """Measures when the schedule says so; training stays bit for bit as it was.

    Step 0 (before the first update) and the last step are always measured. Rank zero
    measures and logs; the other processes are not involved.

    Args:
        instrument: What to measure.
        probe: What `checked_probe` returns; None for an instrument that needs none.
        every: See `as_schedule`.
        on_error: `"warn"` skips a measurement that fails, and turns the monitor off
            if it refuses the model or fails three times in a row; `"raise"` raises.
        settings: What tells this monitor from another of its type, for checkpoints.
        history: Whether measurements are kept in files beside the loggers, or in which
            folder; see `MonitorHistory`.
        keep_matrices: Keep matrices such as kernels there too.

    Raises:
        ValueError: If an argument is not understood.
    """

    def __init__(
        self,
        instrument: Instrument,
        *,
        probe: int | Probe | None,
        every: Every,
        on_error: OnError,
        settings: tuple[Any, ...],
        history: History = True,
        keep_matrices: bool = False,
    ) -> None:
        be_callback_of_both(Monitor)
        super().__init__()
        self._who = type(self).__name__
        self.failures = Failures(self._who, on_error)
        self.instrument = instrument
        self._pristine = instrument.state_dict()
        self.when = When(as_schedule(every), self._who)
        self.progress = Progress(instrument)
        self.history = self.progress.history
        """(step, {tag: value}) of every measurement of this run."""
        self.source = probe
        """What to measure on, or how many training examples to draw."""
        self._settings = " ".join(stable_text(value) for value in settings)
        self.kept = MonitorHistory(instrument, history, keep_matrices)
        self._uncounted = UncountedUpdates(self._who)
        self._trainer = 0
        self._reset()

    def _reset(self) -> None:
        self.progress.restart()
        self.kept.restart()
        self.when.restart()
        self.failures.restart()
        self._started = self._introduced = self._restored = self._differentiated = False
        self._last_weights: list[int] | None = None

    @property
    def state_key(self) -> str:
        """Names the state in checkpoints; differs between differing monitors."""
        return self._generate_state_key(
            every=self.when.schedule.text, settings=self._settings
        )

    def __repr__(self) -> str:
        source = self.source.n if isinstance(self.source, Probe) else self.source
        on = "" if source is None else f", probe={source}"
        every = self.when.schedule.text
        return f"{self._who}(name={self.instrument.name!r}{on}, every={every!r})"

    # When ---------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse two monitors that write the same tags; let them share their kernels.

        Args:
            trainer: The trainer.
            pl_module: Its module.
            stage: Only `"fit"` matters.

        Raises:
            ValueError: If another monitor has the same name.
        """
        monitors = _monitors_of(trainer)
        others = [m.instrument.name for m in monitors if m is not self]
        refuse_same_name(self._who, self.instrument.name, others)
        with isolated_rng():  # run-time type checkers draw which items they check
            share_kernels(monitor.instrument for monitor in monitors)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure step 0, or go on where a checkpoint stopped."""
        fits_on = trainer.global_step > 0 and self._trainer == id(trainer)
        if not (self._restored or fits_on):  # another run, perhaps of a used object
            self._reset()
            self.instrument.load_state_dict(self._pristine)
        self._trainer, self._restored = id(trainer), False
        self.when.start_clock()
        self._uncounted.begin(trainer, pl_module, _monitors_of(trainer)[:1] == [self])
        missed, owed = self.progress.advance(trainer.global_step), self.progress.owed
        if missed or owed:  # interrupted before our hook behind an update, or in it
            self._take_back()
        if self.progress.measured < 0:
            self.progress.step = self.kept.since = trainer.global_step
            if self.progress.step > 0:
                rank_zero_warn(
                    f"{self._who}: the checkpoint holds no earlier measurement. "
                    f"References are taken now, after {self.progress.step} updates."
                )
            self._measure(trainer, pl_module)
        elif owed:
            self._measure(trainer, pl_module)
        elif missed:
            self._measure_if_due(trainer, pl_module, ends_epoch=trainer.is_last_batch)
        publish(trainer, self.history)
        share(trainer, self.history, self.instrument.name)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """No loss of this batch is differentiated yet; perhaps none will be."""
        self._differentiated = False

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note the loss, if the schedule asks for it."""
        self._differentiated = True
        if self._active(trainer):
            self.when.note_loss(self.progress.step + 1, loss)

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Note learning rates, if the schedule asks for them."""
        if self.when.schedule.events and self._active(trainer):
            groups = [g for o in trainer.optimizers for g in o.param_groups]
            rates = [float(group.get("lr", math.nan)) for group in groups]
            self.when.note_update(self.progress.step + 1, rates)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after an optimizer update, if it is due."""
        if not self.progress.advance(trainer.global_step):
            return
        self._take_back()
        # Before validation, whose end is when checkpoints are written by default.
        self._measure_if_due(trainer, pl_module, ends_epoch=trainer.is_last_batch)
        share(trainer, self.history, self.instrument.name)

    def on_late_loss(self, trainer: Any, pl_module: Any, loss: float) -> None:
        """Measure the update just made if its loss, told only now, makes it due."""
        if self._active(trainer) and self.when.note_late_loss(self.progress.step, loss):
            # A final measurement was on schedule after all.
            self.progress.before = None
            self._measure_if_due(trainer, pl_module, ends_epoch=trainer.is_last_batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure what the last batch could not know of: early stops, skipped steps."""
        self._uncounted.end_epoch(trainer, pl_module)
        self._measure_if_due(trainer, pl_module, ends_epoch=True)
        if self.progress.measured != self.progress.step and self._active(trainer):
            self._last_weights = weight_sums(pl_module)
        else:
            self._last_weights = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the last step if another callback stopped the run after ours."""
        missed = (
            self.progress.measured != self.progress.step
            and self._last_weights is not None
        )
        # Weight-averaging callbacks put other weights into the module at this point.
        if missed and weight_sums(pl_module) == self._last_weights:
            self._measure(trainer, pl_module, scheduled=False)
        if self._active(trainer):
            failures = self.kept.finish(trainer.loggers, self.history)
            self.failures.not_taken(failures, self.progress.step)

    def _measure_if_due(self, trainer: Any, pl_module: Any, ends_epoch: bool) -> None:
        if self.progress.measured == self.progress.step:
            return
        epoch = trainer.current_epoch + 1 if ends_epoch else None
        if self.when.due(self.progress.step, epoch):
            self._measure(trainer, pl_module)
        elif is_last_step(trainer, ends_epoch):
            self._measure(trainer, pl_module, scheduled=False)

    # What ---------------------------------------------------------------------------

    def _measure(self, trainer: Any, pl_module: Any, scheduled: bool = True) -> None:
        self.progress.begin(scheduled)
        if self._active(trainer):
            self._take(trainer, pl_module)
        self.progress.end(scheduled)

    def _take(self, trainer: Any, pl_module: Any) -> None:
        start = time.perf_counter()
        try:
            refuse_sharded(trainer)
            with quietly(pl_module):
                mute(pl_module)
                if not self._started and self.source is not None:
                    probe = probe_of(trainer, self.source)
                    self.instrument.start(probe)
                    self.kept.probe = probe
                self._started = True
                measurement = self.instrument.measure(pl_module, self.progress.step)
        except Exception as error:
            self._skip(trainer, error)
            return
        self.failures.none()
        # Not in the history: a resumed run could not repeat it.
        self.history.append((measurement.step, dict(measurement.scalars)))
        publish(trainer, self.history)
        tag = monitor_tag("seconds", self.instrument.name)
        measurement.scalars[tag] = time.perf_counter() - start
        with isolated_rng():  # loggers that wait and try again draw how long
            self._report(trainer, pl_module, measurement)
        self.when.spent(time.perf_counter() - start)

    def _report(self, trainer: Any, pl_module: Any, measurement: Measurement) -> None:
        failures = report(measurement, trainer.loggers)
        if not self._introduced:
            monitors = _monitors_of(trainer)
            laid_out = any(m._introduced for m in monitors)
            groups = [] if laid_out else [m.instrument.name for m in monitors]
            self._introduced = True
            own = self.instrument.name
            failures += introduce(measurement.scalars, own, groups, trainer.loggers)
        failures += self.kept.keep(measurement, trainer, pl_module, self.progress)
        self.failures.not_taken(failures, measurement.step)

    def _skip(self, trainer: Any, error: Exception) -> None:
        before = takewhile(lambda other: other is not self, _monitors_of(trainer))
        self.failures.skip(error, self.progress.step, [m.failures for m in before])

    def _active(self, trainer: Any) -> bool:
        return bool(trainer.is_global_zero) and not self.failures.off

    # State --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the curves of an unbroken one."""
        return {**self.progress.state_dict(), "events": self.when.state_dict()}

    def _take_back(self) -> None:
        self.progress.take_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._reset()
        self._restored = True
        self.progress.load_state_dict(state_dict)
        # Checkpoints of earlier versions do not have it.
        self.when.load_state_dict(state_dict.get("events", {}))


be_callback_of_both(Monitor)


def _monitors_of(trainer: Any) -> list[Monitor]:
    return [monitor for monitor in trainer.callbacks if isinstance(monitor, Monitor)]
