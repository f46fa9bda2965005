"""Singular values of Jacobians: dynamical isometry, as a whole, by depth, by time."""

import warnings
from functools import reduce
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from ntk_callbacks import metrics
from ntk_callbacks._types import Inputs, Mode, OutputFunction
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.engine.input_jacobian import (
    input_jacobian_shape,
    input_singular_values,
)
from ntk_callbacks.engine.layer_calls import LayerFilter, check_layers
from ntk_callbacks.engine.layer_jacobians import input_spectra, jacobian_by_depth
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.engine.state_jacobians import jacobian_by_time
from ntk_callbacks.instruments.instrument import checked_name, numbers, one_of
from ntk_callbacks.instruments.jacobian_profile import (
    Scalars,
    Vectors,
    by_depth,
    by_time,
)
from ntk_callbacks.nested import leaves
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement

By: TypeAlias = Literal["depth", "time"]

_WIDEST = 1024  # values of one example up to which all of them are computed
_EXAMPLES = 8  # of the probe, where each takes many products or many Jacobians


class JacobianInstrument:
    """Singular values s of ∂f/∂x, pooled over the examples of the probe.

    Args:
        by: None; `"depth"`: Jacobians between layers too; `"time"`: between the states
            of recurrent modules. These are taken at the first 8 examples.
        layers: Which layers or recurrent modules, as in `jacobian_by_depth` and
            `jacobian_by_time`.
        per_layer: By depth: report the numbers of every layer too.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes that the Jacobians held at a time may take.
        name: Group of the tags.

    Raises:
        ValueError: If an argument is not understood.
    """

    def __init__(
        self,
        *,
        by: By | None = None,
        layers: LayerFilter = None,
        per_layer: bool = False,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "jacobian",
    ) -> None:
        check_selection(output_fn=output_fn)
        check_layers(layers)
        if by is not None:
            one_of("by", by, get_args(By))
        elif layers is not None or per_layer:
            raise ValueError(
                "JacobianMonitor: layers= and per_layer= say whose Jacobians are taken "
                'inside the network. Pass by="depth" or by="time" too.'
            )
        self.name = checked_name(name)
        one_of("mode", mode, get_args(Mode))
        memory_bytes(memory_budget, torch.device("cpu"))
        self.by = by
        self.layers = layers
        self.per_layer = per_layer
        self.output_fn = output_fn
        self.mode = mode
        self.memory_budget = memory_budget
        self._probe: Probe | None = None
        self._told = False

    def start(self, probe: Probe) -> None:
        """Take the examples the Jacobians are taken at."""
        self._probe = probe

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Singular values of the model now.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            Largest, smallest and mean squared value and the standard deviation of ln s
            over all examples; the median over the examples of s_max/s_min, the mean of
            the isometry gap. Values that are round-off, up to ε‖J‖, count as zero. Of
            integer inputs only what lies inside the network.

        Raises:
            RuntimeError: If `start` was not called.
        """
        if self._probe is None:
            raise RuntimeError("JacobianInstrument: call start(probe) first.")
        x = self._probe.inputs
        scalars: Scalars = {}
        vectors: Vectors = {}
        if self.by is None or any(t.is_floating_point() for t in leaves(x)):
            shape = input_jacobian_shape(
                model, x, output_fn=self.output_fn, mode=self.mode
            )
            whole = self._all if min(shape) <= _WIDEST else self._extremes
            scalars, vectors = whole(model, x)
        if self.by is not None:
            inside = self._inside(model, x)
            scalars, vectors = scalars | inside[0], vectors | inside[1]
        return Measurement(step, scalars=numbers(scalars), vectors=vectors)

    def _all(self, model: nn.Module, x: Inputs) -> tuple[Scalars, Vectors]:
        values = input_singular_values(
            model,
            x,
            output_fn=self.output_fn,
            mode=self.mode,
            memory_budget=self.memory_budget,
        )
        # What is left where a narrow layer or a dead unit takes the rank away.
        round_off = values.norm(dim=1, keepdim=True) * _precision(model)
        values = values.masked_fill(values <= round_off, 0.0)
        ratios = values[:, 0] / values[:, -1]
        pooled = values.flatten()
        return {
            f"{self.name}/singular_value_max": values.max(),
            f"{self.name}/singular_value_min": values.min(),
            f"{self.name}/mean_square": metrics.mean_square(values),
            f"{self.name}/condition_number": ratios.median(),
            f"{self.name}/isometry_gap": metrics.isometry_gap(values).mean(),
            f"{self.name}/log_std": metrics.log_std(values),
        }, {f"{self.name}/singular_values_log10": pooled[pooled > 0].log10()}

    def _extremes(self, model: nn.Module, x: Inputs) -> tuple[Scalars, Vectors]:
        """The same by products; the spread of ln s would take every value."""
        found = input_spectra(
            model, x, output_fn=self.output_fn, mode=self.mode, count=_EXAMPLES
        )
        return {
            f"{self.name}/singular_value_max": found.largest.max(),
            f"{self.name}/singular_value_min": found.smallest.min(),
            f"{self.name}/mean_square": found.mean_square.mean(),
            f"{self.name}/condition_number": found.condition_number.median(),
            f"{self.name}/isometry_gap": found.isometry_gap.mean(),
        }, {}

    def _inside(self, model: nn.Module, x: Inputs) -> tuple[Scalars, Vectors]:
        measured = jacobian_by_depth if self.by == "depth" else jacobian_by_time
        found = measured(
            model,
            x,
            layers=self.layers,
            output_fn=self.output_fn,
            mode=self.mode,
            count=_EXAMPLES,
        )
        if isinstance(found, dict):
            return by_time(self.name, found)
        if len(found.names) == 1 and not self._told:
            self._told = True
            warnings.warn(
                f"JacobianMonitor: only one layer, {found.names[0]!r}, was called, so "
                "that there are no Jacobians between layers. layers=… takes others: "
                'types, names or a predicate; by="time" follows recurrent modules.',
                stacklevel=2,
            )
        return by_depth(self.name, found, self.per_layer)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is carried from one measurement to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _precision(model: nn.Module) -> float:
    """Relative round-off of a Jacobian; half precision is measured as float32."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.finfo(reduce(torch.promote_types, floating, torch.float32)).eps
