"""Signals and gradients by depth: does the network pass them on?"""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.engine.layer_calls import LayerFilter, check_layers
from ntk_callbacks.engine.signals import SignalStatistics, signal_statistics
from ntk_callbacks.instruments.instrument import (
    checked_name,
    numbers,
    one_of,
    tag_name,
)
from ntk_callbacks.instruments.signal_maps import (
    MeanFieldComparison,
    compared,
    unpredicted,
)
from ntk_callbacks.metrics.depth import depth_scale_fit
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement
from ntk_callbacks.theory.activations import (
    Activation,
    check_elementwise,
    elementwise,
)

GradientOf: TypeAlias = Literal["outputs", "loss"]


class SignalInstrument:
    """Size and correlation of pre-activations, and size of gradients, by depth.

    Args:
        layers: As in `signal_statistics`.
        activation: φ between the layers, a name in `theory.ACTIVATIONS` or a callable;
            None recognizes one of these names from what the layers return and get.
        gradient_of: `"outputs"` (in random directions), or `"loss"` (cross-entropy or
            ½|f − y|², by the targets of the probe).
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        per_layer: Report the numbers of every layer too.
        name: Group of the tags.

    Raises:
        ValueError: If an argument is not understood.
    """

    def __init__(
        self,
        *,
        layers: LayerFilter = None,
        activation: Activation | None = None,
        gradient_of: GradientOf = "outputs",
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        per_layer: bool = False,
        name: str = "signal",
    ) -> None:
        check_layers(layers)
        check_selection(output_fn=output_fn)
        if activation is not None:
            check_elementwise(elementwise(activation))
        self.name = checked_name(name)
        one_of("gradient_of", gradient_of, get_args(GradientOf))
        one_of("mode", mode, get_args(Mode))
        self.layers = layers
        self.activation = activation
        self.gradient_of = gradient_of
        self.output_fn = output_fn
        self.mode = mode
        self.per_layer = per_layer
        self._probe: Probe | None = None
        # Whether φ was alone between layers at the first measurement: curves that come
        # and go with its recognition would have gaps that mean nothing.
        self._predicted: bool | None = None

    def start(self, probe: Probe) -> None:
        """Take the examples whose signals are measured.

        Args:
            probe: Examples, and targets if the gradient is that of the loss.

        Raises:
            ValueError: If the targets are missing.
        """
        if self.gradient_of == "loss" and probe.targets is None:
            raise ValueError(
                'SignalMonitor: gradient_of="loss" needs targets and the probe has '
                'none. Pass Probe(inputs, targets), or gradient_of="outputs".'
            )
        self._probe = probe

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Signals of the model now.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            q and c of the first and the last layer, the geometric mean of χ, fitted
            depth scales (NaN without a fit), and, where φ alone lies between layers,
            the distances from the mean-field maps and the depth scales that they
            predict, NaN where it no longer does.

        Raises:
            RuntimeError: If `start` was not called.
        """
        if self._probe is None:
            raise RuntimeError("SignalInstrument: call start(probe) first.")
        found = signal_statistics(
            model,
            self._probe.inputs,
            targets=self._probe.targets if self.gradient_of == "loss" else None,
            layers=self.layers,
            output_fn=self.output_fn,
            mode=self.mode,
        )
        theory = compared(found, self.activation)
        if self._predicted is None:
            self._predicted = theory is not None
        theory = (theory or unpredicted(found)) if self._predicted else None
        return Measurement(
            step,
            scalars=numbers(self._scalars(found, theory)),
            vectors=self._vectors(found, theory),
        )

    def _scalars(
        self, found: SignalStatistics, theory: MeanFieldComparison | None
    ) -> dict[str, Tensor | float | None]:
        q, c, chi = found.q, found.c, found.chi
        name = self.name
        scalars: dict[str, Tensor | float | None] = {
            f"{name}/q_first": q[0],
            f"{name}/q_last": q[-1],
            f"{name}/c_first": c[0],
            f"{name}/c_last": c[-1],
            f"{name}/chi": _geometric_mean(chi),
            # The last layer is read out by few units, whose scatter is no decay.
            f"{name}/xi_q": depth_scale_fit(q[:-1]).xi,
            f"{name}/xi_c": depth_scale_fit(c[:-1]).xi,
        }
        if theory is not None:
            scalars |= {
                f"{name}/q_mean_field_error": theory.q_error,
                f"{name}/c_mean_field_error": theory.c_error,
                f"{name}/xi_q_mean_field": theory.xi_q,
                f"{name}/xi_c_mean_field": theory.xi_c,
            }
        if self.per_layer:
            by_depth = {"q": q, "c": c, "gradient_square": found.gradient_square}
            by_depth["chi"] = chi  # of a layer and the next one; the last has none
            scalars |= {
                f"{name}_layers/{what}/{tag_name(layer)}": value
                for what, values in by_depth.items()
                for layer, value in zip(found.names, values, strict=False)
            }
        return scalars

    def _vectors(
        self, found: SignalStatistics, theory: MeanFieldComparison | None
    ) -> dict[str, Tensor]:
        vectors = {
            "q": found.q,
            "c": found.c,
            "gradient_square": found.gradient_square,
            "chi": found.chi,
        }
        if theory is not None:
            vectors |= {
                "q_mean_field": theory.q,
                "c_mean_field": theory.c,
                "chi_mean_field": theory.chi,
            }
        return {f"{self.name}/{k}_by_depth": vector for k, vector in vectors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Whether the curves of mean-field theory are among those of this run."""
        return {"predicted": self._predicted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._predicted = state.get("predicted")  # earlier versions did not keep it


def _geometric_mean(chi: Tensor) -> Tensor | float:
    """The growth per layer of the whole way back; NaN for a single layer."""
    return chi.log().mean().exp() if len(chi) else torch.nan
