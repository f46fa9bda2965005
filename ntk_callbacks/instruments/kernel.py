"""The empirical NTK on a fixed probe: spectrum, drift, alignment."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ntk_callbacks._types import (
    Grouping,
    Kernel,
    Mode,
    OutputFunction,
    Outputs,
    ParameterFilter,
)
from ntk_callbacks.engine.arguments import Request
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.series import KernelSeries
from ntk_callbacks.errors import ProbeMismatchError
from ntk_callbacks.guard import measuring
from ntk_callbacks.instruments.instrument import (
    checked_name,
    monitor_tag,
    numbers,
    one_of,
    tag_name,
)
from ntk_callbacks.instruments.kernel_sketch import (
    SKETCH_METRICS,
    KernelSketch,
    sketched,
)
from ntk_callbacks.instruments.kernel_view import (
    KernelMetric,
    KernelView,
    chosen_metrics,
)
from ntk_callbacks.layout import as_matrix
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement

_MOST_OUTPUTS = 2048  # of a traced kernel, which takes a backward pass for each


@dataclass(frozen=True)
class NTKOptions:
    """The less common choices of an NTK measurement.

    Args:
        mode: `"eval"`, or `"train"` for the joint-batch kernel through BatchNorm.
        route: `"auto"` or one of the engine's routes.
        memory_budget: Working memory in bytes or as `"2GiB"`; None for a quarter of
            what is free.
        dense_limit: With `outputs="auto"`, kernels with more rows n·c than this are
            traced over the outputs; from 2048 outputs c on they are not formed at all.
        name: Group of the tags, `"ntk"`; set it to tell two monitors apart.
        history: Whether `NTKMonitor` keeps its measurements for `load_history` in the
            folder of the run, or in which other folder.
        keep_kernels: Keep the traced kernel there too, the examples ordered by class.

    Raises:
        ValueError: If an option is not understood.
    """

    mode: Mode = "eval"
    route: str = "auto"
    memory_budget: int | str | None = None
    dense_limit: int = 2048
    name: str = "ntk"
    history: bool | str | PathLike[str] = True
    keep_kernels: bool = False

    def __post_init__(self) -> None:
        one_of("mode", self.mode, get_args(Mode))
        one_of("route", self.route, ("auto", *ROUTES))
        memory_bytes(self.memory_budget, torch.device("cpu"))
        checked_name(self.name)


class KernelInstrument:
    """Measures the empirical NTK of a model on a probe.

    Args:
        outputs: As in `empirical_ntk`; `"matrix-free"` for estimates from products with
            a kernel that is not formed; or `"auto"`: `"full"` up to
            `options.dense_limit` rows, `"trace"` up to 2048 outputs, and
            `"matrix-free"` beyond, as for language models.
        metrics: None for all of `METRICS`; names of some; or `{name: function of a
            KernelView}` for names of your own (they replace the standard ones).
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
        metrics: Sequence[str] | Mapping[str, KernelMetric] | None = None,
        parameters: ParameterFilter = None,
        by: Grouping = None,
        output_fn: OutputFunction | None = None,
        options: NTKOptions | None = None,
    ) -> None:
        one_of("outputs", outputs, ("auto", "matrix-free", *get_args(Outputs)))
        self.outputs = outputs
        self._outputs: str | None = None if outputs == "auto" else outputs
        self.metrics = chosen_metrics(metrics)
        self.parameters = parameters
        self.by = by
        self.output_fn = output_fn
        self.options = options or NTKOptions()
        self.name = self.options.name
        self._request()  # refuses what no model could take
        self._series = KernelSeries(self.options.route)
        self._probe: Probe | None = None
        self._reference: Kernel | None = None
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

    def _with_matrix(self, model: nn.Module, probe: Probe, step: int) -> Measurement:
        request = self._request(self._outputs)
        parts, error = self._series.measure(model, probe.inputs, request, step)
        ntk = torch.stack(list(parts.values())).sum(0) if self.by else parts[""]
        reference, previous, steps = self._compared(ntk, step)
        view = KernelView(ntk, reference, previous, steps, probe.targets)
        measurement = self._measurement(view, parts, step)
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

    def _measurement(
        self, view: KernelView, parts: dict[str, Kernel], step: int
    ) -> Measurement:
        name = self.name
        found = {
            f"{name}/{metric}": function(view)
            for metric, function in self.metrics.items()
        }
        if self.by is not None:
            for part, kernel in parts.items():
                trace = as_matrix(kernel).diagonal().sum()
                found[f"{name}_modules/trace/{tag_name(part)}"] = trace
        eigenvalues = view.eigenvalues
        return Measurement(
            step,
            scalars=numbers(found),
            vectors={f"{name}/eigenvalues_log10": eigenvalues[eigenvalues > 0].log10()},
            matrices={f"{name}/kernel": view.by_class},
        )

    def state_dict(self) -> dict[str, Any]:
        """Θ₀, the previous kernel, and what they were measured on."""
        return {
            "reference": self._reference,
            "previous": self._previous,
            "previous_step": self._previous_step,
            "digest": self._digest,
            "outputs": self._outputs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._reference = state["reference"]
        self._previous = state["previous"]
        self._previous_step = state["previous_step"]
        self._digest = state["digest"]
        if self.outputs == "auto":
            self._outputs = state["outputs"]
