"""The empirical NTK on a fixed probe: spectrum, drift, alignment."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ntk_callbacks._types import (
    Grouping,
    Kernel,
    OutputFunction,
    Outputs,
    ParameterFilter,
)
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.series import KernelSeries
from ntk_callbacks.errors import ProbeMismatchError
from ntk_callbacks.guard import measuring
from ntk_callbacks.instruments.instrument import (
    chosen_options,
    monitor_tag,
    numbers,
    one_of,
)
from ntk_callbacks.instruments.kernel_descent import descent_of
from ntk_callbacks.instruments.kernel_details import chosen_metrics, part_traces
from ntk_callbacks.instruments.kernel_loss import LossOfKernel
from ntk_callbacks.instruments.kernel_modes import ResidualModes
from ntk_callbacks.instruments.kernel_needs import tell_missing
from ntk_callbacks.instruments.kernel_options import NTKOptions as NTKOptions
from ntk_callbacks.instruments.kernel_sketch import (
    SKETCH_METRICS,
    KernelSketch,
    sketched,
)
from ntk_callbacks.instruments.kernel_source import KernelSource
from ntk_callbacks.instruments.kernel_stability import unwrapped
from ntk_callbacks.instruments.kernel_view import KernelMetric, KernelView
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement

_MOST_OUTPUTS = 2048  # of a traced kernel, which takes a backward pass for each


class KernelInstrument:
    """Measures the empirical NTK of a model on a probe.

    Args:
        outputs: As in `empirical_ntk`; `"matrix-free"` for estimates from products with
            a kernel that is not formed; or `"auto"`: `"full"` up to
            `options.dense_limit` rows, `"trace"` up to 2048 outputs, and
            `"matrix-free"` beyond, as for language models.
        metrics: None for all of `METRICS`; `"all"` for those of `DETAILS` too; names of
            some of both; or `{name: function of a KernelView}` for names of your own
            (they replace the standard ones).
        parameters: As in `empirical_ntk`.
        by: As in `empirical_ntk`; the trace of each part is reported too.
        output_fn: As in `empirical_ntk`.
        options: The less common choices.

    Raises:
        ValueError: If an argument is not understood.
    """

    def __init__(
        self,
        *,
        outputs: Outputs | Literal["auto", "matrix-free"] = "auto",
        metrics: (
            Literal["all"] | Sequence[str] | Mapping[str, KernelMetric] | None
        ) = None,
        parameters: ParameterFilter = None,
        by: Grouping = None,
        output_fn: OutputFunction | None = None,
        options: NTKOptions | None = None,
    ) -> None:
        one_of("outputs", outputs, ("auto", "matrix-free", *get_args(Outputs)))
        self.outputs = outputs
        self._outputs: str | None = None if outputs == "auto" else outputs
        self.metrics = chosen_metrics(metrics, split=by is not None)
        self._untold = metrics
        self.parameters = parameters
        self.by = by
        self.output_fn = output_fn
        self.options = chosen_options(options, NTKOptions)
        self.name = self.options.name
        self._request()  # refuses what no model could take
        self.kernels = KernelSeries(self.options.route)
        """Where kernels come from; see `share_kernels`."""
        self.optimizers: Sequence[Optimizer] = ()
        """What trains the model, for the details that need learning rates."""
        self.loss = LossOfKernel(self.options.loss)
        """What is trained, for the details that need to know it."""
        self._modes = ResidualModes()
        self._probe: Probe | None = None
        self._reference: Kernel | None = None
        self._reference_parts: dict[str, Kernel] = {}
        self._previous: Kernel | None = None
        self._previous_step = 0
        self._digest = ""

    def start(self, probe: Probe) -> None:
        """Take the probe the kernels are measured on.

        Args:
            probe: The same for the whole run.

        Raises:
            ProbeMismatchError: If restored kernels were measured on another probe.
        """
        if self._reference is not None and self._digest != probe.digest:
            raise ProbeMismatchError(
                f"NTKMonitor: the reference kernel was measured on other inputs (hash "
                f"{self._digest[:8]}) than this probe of {probe.n} examples (hash "
                f"{probe.digest[:8]}). Pass the same probe (Probe.save and Probe.load "
                "keep one), or start a new run."
            )
        self._probe = probe
        self._digest = probe.digest

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Kernel of the model now, compared with the first and the previous one.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            The chosen scalars, the spectrum and the heat map.

        Raises:
            RuntimeError: If `start` was not called.
            ProbeMismatchError: If the kernel changed its shape since the first.
        """
        if self._probe is None:
            raise RuntimeError("KernelInstrument: call start(probe) first.")
        if self._outputs is None:
            self._outputs = self._affordable_outputs(model, self._probe)
        if self._outputs == "matrix-free":
            return self._without_matrix(model, self._probe, step)
        return self._with_matrix(model, self._probe, step)

    def count_step(self, *, share: float = 1.0) -> None:
        """Note the settings of the update that `optimizers` are about to make.

        For `residual_modes`, whose predicted decay is then right for rates that change.
        Without it all updates since the last measurement count with the settings now.

        Args:
            share: What part of the gradient the update goes by: 0 if it is skipped,
                less than 1 if it is clipped, NaN if that is not known.
        """
        self._modes.step(descent_of(unwrapped(self.optimizers)), share)

    def _with_matrix(self, model: nn.Module, probe: Probe, step: int) -> Measurement:
        request = self._request(self._outputs)
        parts, error = self.kernels.measure(model, probe.inputs, request, step)
        ntk = (
            torch.stack(list(parts.values())).sum(0)
            if self.by is not None
            else parts[""]
        )
        first = self._reference is None
        reference, previous, steps = self._compared(ntk, step)
        if first and "drift_share" in self.metrics:
            self._reference_parts = dict(parts)
        source = KernelSource(
            *(model, probe.inputs, request, self.kernels, step),
            optimizers=unwrapped(self.optimizers),
            loss=self.loss,
        )
        view = KernelView(
            *(ntk, reference, previous, steps, probe.targets),
            parts=parts if self.by is not None else {},
            reference_parts={k: v.to(ntk) for k, v in self._reference_parts.items()},
            source=source,
            modes=self._modes,
        )
        measurement = self._measurement(view, step)
        if error is not None:
            measurement.scalars[monitor_tag("audit_error", self.name)] = error
        return measurement

    def _without_matrix(self, model: nn.Module, probe: Probe, step: int) -> Measurement:
        images, signs, largest = sketched(model, probe.inputs, self._request())
        reference, previous, steps = self._compared(images, step)
        sketch = KernelSketch(images, signs, largest, reference, previous, steps)
        wanted = {*self.metrics, *(["trace_error"] if "trace" in self.metrics else [])}
        found = {
            f"{self.name}/{metric}": function(sketch)
            for metric, function in SKETCH_METRICS.items()
            if metric in wanted
        }
        values = largest.eigenvalues
        return Measurement(
            step,
            scalars=numbers(found),
            vectors={f"{self.name}/eigenvalues_log10": values[values > 0].log10()},
        )

    def _request(self, outputs: str | None = "full") -> Request:
        return Request(
            outputs=outputs,
            by=self.by,
            parameters=self.parameters,
            output_fn=self.output_fn,
            mode=self.options.mode,
            memory_budget=self.options.memory_budget,
        )

    def _compared(self, ntk: Tensor, step: int) -> tuple[Tensor, Tensor | None, int]:
        """The first kernel, the previous one, updates since; this one is kept."""
        reference = ntk if self._reference is None else self._reference.to(ntk)
        if reference.shape != ntk.shape:
            raise ProbeMismatchError(
                f"NTKMonitor: the kernel has shape {tuple(ntk.shape)}, the reference "
                f"{tuple(reference.shape)}: the number of outputs changed. Start a new "
                "run."
            )
        previous = None if self._previous is None else self._previous.to(ntk)
        steps = step - self._previous_step
        self._reference, self._previous, self._previous_step = reference, ntk, step
        return reference, previous, steps

    def _affordable_outputs(self, model: nn.Module, probe: Probe) -> str:
        with measuring(model, self.options.mode), torch.no_grad():
            problem = self._request().problem(model, probe.inputs, None)
            c = problem.function({}, problem.x1).shape[1]
        limit = self.options.dense_limit
        if probe.n * c <= limit:
            return "full"
        found = (
            f"NTKMonitor: the kernel of {probe.n} examples and {c} outputs has "
            f"{probe.n * c} rows, more than {limit}. From here on {self.name}/… are "
        )
        change = "a smaller probe or NTKOptions(dense_limit=…) helps too."
        if c <= _MOST_OUTPUTS:
            warnings.warn(
                f"{found}those of the traced kernel (1/c) Σₖ Θ[:, :, k, k], without "
                f'max_learning_rate. outputs="full" keeps all outputs, {change}',
                stacklevel=2,
            )
            return "trace"
        warnings.warn(
            f"{found}estimates from products with the kernel, which is not formed: "
            f"{', '.join(SKETCH_METRICS)}. An output_fn that returns fewer numbers "
            f'(one token, say) gives all curves, outputs="pseudo" most, {change}',
            stacklevel=2,
        )
        return "matrix-free"

    def _measurement(self, view: KernelView, step: int) -> Measurement:
        name = self.name
        scalars: dict[str, Tensor | float | None] = {}
        matrices = {f"{name}/kernel": view.by_class}
        measured = {metric: function(view) for metric, function in self.metrics.items()}
        tell_missing(self._untold, measured)
        self._untold = None
        for metric, found in measured.items():
            if isinstance(found, Mapping):
                scalars |= {f"{name}_{end}": value for end, value in found.items()}
            elif isinstance(found, Tensor) and found.ndim == 2:
                matrices[f"{name}/{metric}"] = found
            else:
                scalars[f"{name}/{metric}"] = found
        scalars |= {f"{name}_{end}": t for end, t in part_traces(view).items()}
        eigenvalues = view.eigenvalues
        return Measurement(
            step,
            scalars=numbers(scalars),
            vectors={f"{name}/eigenvalues_log10": eigenvalues[eigenvalues > 0].log10()},
            matrices=matrices,
        )

    def state_dict(self) -> dict[str, Any]:
        """Θ₀, the previous kernel, and what they were measured on; more for details."""
        return {
            "reference": self._reference,
            "previous": self._previous,
            "previous_step": self._previous_step,
            "digest": self._digest,
            "outputs": self._outputs,
            "reference_parts": dict(self._reference_parts),
            "modes": self._modes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._reference = state["reference"]
        self._previous = state["previous"]
        self._previous_step = state["previous_step"]
        self._digest = state["digest"]
        # Checkpoints of earlier versions do not have these.
        self._reference_parts = dict(state.get("reference_parts", {}))
        self._modes.load_state_dict(state.get("modes"))
        if self.outputs == "auto":
            self._outputs = state["outputs"]
