"""NTKMonitor: the empirical neural tangent kernel while a network trains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer

from ntk_callbacks._types import Grouping, OutputFunction, Outputs, ParameterFilter
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.gradients import share_left, skips_step
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.loss_check import LossCheck
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.instruments.instrument import chosen_options
from ntk_callbacks.instruments.kernel import KernelInstrument, NTKOptions
from ntk_callbacks.instruments.kernel_view import KernelMetric
from ntk_callbacks.instruments.predicted_update import held_gradients


class NTKMonitor(Monitor):
    """Logs the spectrum, drift and alignment of the empirical NTK on a fixed probe.

    Scalars, all of the kernel Θ on the probe: `ntk/trace`, `ntk/eigenvalue_max`,
    `ntk/eigenvalue_min`, `ntk/condition_number`, `ntk/participation_ratio`,
    `ntk/entropy_rank`, `ntk/relative_change` and `ntk/kernel_distance` from the first
    measurement, `ntk/kernel_velocity` (kernel distance per step since the previous
    one), `ntk/target_alignment` (if the probe has targets), `ntk/off_diagonal_share`
    (if all outputs are kept) and `ntk/max_learning_rate` (for ½ Σ (f − y)² over the
    probe). Where a logger draws: a histogram of log10 λ and the traced kernel as an
    image, the examples ordered by class, colored from its smallest to its largest
    entry at each step. `metrics` documents each formula. `monitor/audit_error` holds
    two examples of each kernel against plain autograd; `monitor/seconds` is what the
    measurement took.

    On demand, `metrics="all"` or by name:

    - `scale_change`, `shape_change`: the two parts of `relative_change`, along Θ₀ and
      across it, whose squares add up to its square; `drift_noise_floor`: how much
      `relative_change` would vary with other examples, from two halves of the probe;
    - `subspace_angle`, `subspace_overlap`: largest angle, and mean squared cosine of
      the angles, between the spaces of the 8 top eigenvectors now and at the start;
    - `class_blocks`: an image of the mean kernel between classes, and `class_ratio`,
      its mean within classes over that between classes;
    - `residual_modes`: `ntk_modes/residual/<k>`, the gradient r of the loss by the
      outputs along each of the 8 top modes of the kernel before,
      `ntk_modes/decay_measured/<k>`, how much of it is left since then, and
      `ntk_modes/decay_predicted/<k>`, what SGD should have left: ∏(1 − ηsλ) over the
      updates, with momentum what its velocity at the measurement before leads to;
    - `sharpness`, the largest eigenvalue of the Gauss-Newton matrix of the loss on the
      probe, preconditioned as the optimizer does it, `sharpness_limit`, where the
      optimizer becomes unstable (2/η, with momentum or Adam's form), and their ratio.
      Without `NTKOptions(loss=…)` these and the residuals are those of the mean
      cross-entropy of labels, against which the loss of the first batch is held, or of
      1/(2n) Σ (f − y)²; a warning says where that is not, or need not be, the loss;
    - `batchnorm_gap`: relative difference of the pseudo-NTK through batch statistics
      from that through running ones, if the model has them; costs a second kernel;
    - `trace_share`, `drift_share`: with `by`, what each part adds to the trace, and to
      the squared drift, as `ntk_modules/trace_share/…` and `…/drift_share/…`.

    Monitors of one trainer that need the same kernel measure it once.

    Args:
        probe: A number of training examples to draw (fixed by a seed, without touching
            the loader), a `Probe`, a tensor of inputs, or the path of a saved probe.
        every: `"epoch"`, `"3 epochs"`, n or `"n steps"`, `"5 per decade"`, a schedule,
            or a function `step -> bool`. Step 0 and the last step are always measured.
        outputs: As in `empirical_ntk`; `"auto"` keeps all outputs up to 2048 rows n·c,
            traces them beyond, and above 2048 outputs (language models) measures
            `"matrix-free"`: estimates from products with a kernel that is not formed.
        metrics: None for those above; `"all"`; names of some; or `{name: function of a
            KernelView}` of your own.
        parameters: As in `empirical_ntk`.
        by: As in `empirical_ntk`; adds the trace of each part as `ntk_modules/trace/…`.
        output_fn: `(model, x) -> (n, ...)` where the module's `forward` is not what to
            measure, for example `lambda module, x: module.net(x)`.
        options: `NTKOptions`: mode, route, memory budget, kept kernels, and the loss
            that is trained.
        name: Group of the tags, `"ntk"`; tells two monitors apart. Like `history`, the
            same as in `options`, and goes before it.
        history: Whether measurements are kept for `load_history` in the folder of the
            run, or in which other folder.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = NTKMonitor(probe=128, every="5 per decade")
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", logger=False)

    References:
        Jacot, Gabriel, Hongler 2018, arXiv:1806.07572; Fort et al. 2020,
        arXiv:2010.15110 (distance, velocity); Cohen et al. 2021, arXiv:2103.00065, and
        2022, arXiv:2207.14484 (edge of stability).
    """

    instrument: KernelInstrument

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        outputs: Outputs | Literal["auto", "matrix-free"] = "auto",
        metrics: (
            Literal["all"] | Sequence[str] | Mapping[str, KernelMetric] | None
        ) = None,
        parameters: ParameterFilter = None,
        by: Grouping = None,
        output_fn: OutputFunction | None = None,
        options: NTKOptions | None = None,
        name: str | None = None,
        history: History | None = None,
        on_error: OnError = "warn",
    ) -> None:
        instrument = KernelInstrument(
            outputs=outputs,
            metrics=metrics,
            parameters=parameters,
            by=by,
            output_fn=output_fn,
            options=chosen_options(options, NTKOptions, name=name, history=history),
        )
        super().__init__(
            instrument,
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(instrument.options.name, outputs, parameters, by),
            history=instrument.options.history,
            keep_matrices=instrument.options.keep_kernels,
        )
        self._loss_check = LossCheck(output_fn)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Foresee the loss of the first batch, if labels were taken for its."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.instrument.loss.guessed and self._active(trainer):
            self._loss_check.foresee(trainer, pl_module, batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Hold it against the real one."""
        super().on_before_backward(trainer, pl_module, loss)
        self._loss_check.compare(trainer, loss.detach())

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: Optimizer
    ) -> None:
        """Note what SGD goes by, if a decay is to be predicted from it.

        Of a step that moves nothing too: a gradient scaler skips it, or `training_step`
        returned no loss. Of one that is clipped, how far it goes.
        """
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if "residual_modes" in self.instrument.metrics and self._active(trainer):
            # A step after the last one: what was measured there is taken back first.
            self._take_back()
            self.instrument.optimizers = tuple(trainer.optimizers)
            self.instrument.count_step(share=self._share(trainer, pl_module, optimizer))
            self.instrument.optimizers = ()

    def _share(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> float:
        """What part of its gradient the next step goes by."""
        given = trainer, pl_module
        try:
            gradients = held_gradients(pl_module, optimizer)
            if not gradients or skips_step(*given, gradients, self._differentiated):
                return 0.0
            return share_left(*given, optimizer, gradients)
        except Exception:  # of gradients of a strange kind, say: no reason to stop
            if self.failures.on_error == "raise":
                raise
            return math.nan

    def _measure(self, trainer: Any, pl_module: Any, scheduled: bool = True) -> None:
        # Not kept: a monitor that is sent to another process would take them along.
        self.instrument.optimizers = tuple(trainer.optimizers)
        try:
            super()._measure(trainer, pl_module, scheduled)
        finally:
            self.instrument.optimizers = ()
