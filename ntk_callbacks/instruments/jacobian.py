"""Singular values of the input-output Jacobian: dynamical isometry."""

from typing import Any, get_args

import torch
from torch import nn

from ntk_callbacks import metrics
from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.engine.input_jacobian import input_singular_values
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.instruments.instrument import checked_name, numbers, one_of
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement


class JacobianInstrument:
    """Singular values s of ∂f/∂x, pooled over the examples of the probe.

    Args:
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
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "jacobian",
    ) -> None:
        check_selection(output_fn=output_fn)
        self.name = checked_name(name)
        one_of("mode", mode, get_args(Mode))
        memory_bytes(memory_budget, torch.device("cpu"))
        self.output_fn = output_fn
        self.mode = mode
        self.memory_budget = memory_budget
        self._probe: Probe | None = None

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
            over all examples; the median over the examples of s_max/s_min.

        Raises:
            RuntimeError: If `start` was not called.
        """
        if self._probe is None:
            raise RuntimeError("JacobianInstrument: call start(probe) first.")
        values = input_singular_values(
            model,
            self._probe.inputs,
            output_fn=self.output_fn,
            mode=self.mode,
            memory_budget=self.memory_budget,
        )
        ratios = values[:, 0] / values[:, -1]
        found = {
            f"{self.name}/singular_value_max": values.max(),
            f"{self.name}/singular_value_min": values.min(),
            f"{self.name}/mean_square": metrics.mean_square(values),
            f"{self.name}/condition_number": ratios.median(),
            f"{self.name}/log_std": metrics.log_std(values),
        }
        pooled = values.flatten()
        return Measurement(
            step,
            scalars=numbers(found),
            vectors={f"{self.name}/singular_values_log10": pooled[pooled > 0].log10()},
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing is carried from one measurement to the next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
