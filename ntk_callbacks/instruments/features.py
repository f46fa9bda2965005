"""Features of the last hidden layer, and the gates that switch while they move."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from ntk_callbacks import metrics
from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.engine.activation_patterns import (
    ActivationPattern,
    activation_patterns,
    pattern_change,
)
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.engine.features import check_layer, layer_features
from ntk_callbacks.errors import ProbeMismatchError
from ntk_callbacks.instruments.instrument import (
    checked_name,
    numbers,
    one_of,
    tag_name,
)
from ntk_callbacks.instruments.kernel_view import KernelView, labeled
from ntk_callbacks.layout import symmetric, widened
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement

Patterns = dict[str, ActivationPattern]


class FeatureInstrument:
    """The conjugate kernel of a layer, and the activation patterns of all gates.

    Args:
        layer: As in `conjugate_kernel`: None for what the last layer reads.
        output_fn: `(model, x) -> (n, ...)`; default `model(x)`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        patterns: Compare activation patterns too. Two of them are kept (the first and
            the previous one), also in checkpoints: one bit each for every activation
            of the probe and elbow of its gate.
        per_layer: Report the changes and dead units of every gate too.
        name: Group of the tags.

    Raises:
        ValueError: If an argument is not understood.
    """

    def __init__(
        self,
        *,
        layer: str | None = None,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        patterns: bool = True,
        per_layer: bool = False,
        name: str = "features",
    ) -> None:
        check_layer(layer)
        check_selection(output_fn=output_fn)
        one_of("mode", mode, get_args(Mode))
        self.name = checked_name(name)
        self.layer = layer
        self.output_fn = output_fn
        self.mode = mode
        self.patterns = patterns
        self.per_layer = per_layer
        self._probe: Probe | None = None
        self._reference: Tensor | None = None
        self._first: Patterns | None = None
        self._previous: Patterns | None = None
        self._digest = ""

    def start(self, probe: Probe) -> None:
        """Take the examples whose features are measured.

        Args:
            probe: The same for the whole run.

        Raises:
            ProbeMismatchError: If restored references were measured on another probe.
        """
        if self._reference is not None and self._digest != probe.digest:
            raise ProbeMismatchError(
                f"FeatureMonitor: the reference was measured on other inputs (hash "
                f"{self._digest[:8]}) than this probe of {probe.n} examples (hash "
                f"{probe.digest[:8]}). Pass the same probe (Probe.save and Probe.load "
                "keep one), or start a new run."
            )
        self._probe = probe
        self._digest = probe.digest

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Features and patterns now, compared with the first and the previous ones.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            Scalars of the conjugate kernel and, if there are gates, of their patterns;
            the spectrum of the kernel, and the kernel by class.

        Raises:
            RuntimeError: If `start` was not called.
            ProbeMismatchError: If other gates were called than at the first.
        """
        if self._probe is None:
            raise RuntimeError("FeatureInstrument: call start(probe) first.")
        x, targets = self._probe.inputs, self._probe.targets
        settings: dict[str, Any] = {"output_fn": self.output_fn, "mode": self.mode}
        rows = widened(layer_features(model, x, layer=self.layer, **settings))
        kernel = symmetric(rows @ rows.mT / rows.shape[1])
        found = activation_patterns(model, x, **settings) if self.patterns else {}
        reference = kernel if self._reference is None else self._reference.to(kernel)
        first = found if self._first is None else self._first
        view = KernelView(kernel, reference, None, 0, targets)
        scalars = self._of_kernel(view) | self._of_patterns(found, first)
        self._reference, self._first, self._previous = reference, first, found
        values = view.eigenvalues
        return Measurement(
            step,
            scalars=numbers(scalars),
            vectors={f"{self.name}/eigenvalues_log10": values[values > 0].log10()},
            matrices={f"{self.name}/kernel": view.by_class},
        )

    def _of_kernel(self, view: KernelView) -> dict[str, Tensor | float | None]:
        name, kernel, first = self.name, view.ntk, view.reference
        return {
            f"{name}/target_alignment": _alignment(kernel, view.targets),
            f"{name}/cka_to_init": metrics.cka(kernel, first),
            f"{name}/relative_change": metrics.relative_change(kernel, first),
            f"{name}/participation_ratio": metrics.participation_ratio(
                view.eigenvalues
            ),
            f"{name}/entropy_rank": metrics.entropy_rank(view.eigenvalues),
        }

    def _of_patterns(
        self, found: Patterns, first: Patterns
    ) -> dict[str, Tensor | float | None]:
        if not (found or first):
            return {}
        name, previous = self.name, self._previous
        flat = {k: p for k, p in found.items() if p.dead is not None}
        try:
            scalars: dict[str, Tensor | float | None] = {
                f"{name}/pattern_change": pattern_change(found, first),
                f"{name}/pattern_change_recent": (
                    torch.nan if previous is None else pattern_change(found, previous)
                ),
                f"{name}/dead_units": _dead_share(flat) if flat else None,
            }
        except ValueError as error:
            raise ProbeMismatchError(
                f"FeatureMonitor: {error} Start a new run, or pass patterns=False."
            ) from error
        if self.per_layer:
            change, dead = f"{name}_layers/pattern_change", f"{name}_layers/dead_units"
            for layer, pattern in found.items():
                share = pattern_change({layer: pattern}, {layer: first[layer]})
                scalars[f"{change}/{tag_name(layer)}"] = share
            for layer, pattern in flat.items():
                share = _dead_share({layer: pattern})
                scalars[f"{dead}/{tag_name(layer)}"] = share
        return scalars

    def state_dict(self) -> dict[str, Any]:
        """The first kernel, the first and the previous patterns, and of what."""
        return {
            "reference": self._reference,
            "first": _stored(self._first),
            "previous": _stored(self._previous),
            "digest": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._reference = state["reference"]
        self._first = _restored(state["first"])
        self._previous = _restored(state["previous"])
        self._digest = state["digest"]


def _alignment(kernel: Tensor, targets: Tensor | None) -> Tensor | None:
    """With real targets, or one class for each example: not the tokens of a text."""
    if targets is None:
        return None
    if not targets.is_floating_point() and targets.numel() != len(targets):
        return None
    return metrics.target_alignment(*labeled(kernel, targets.to(kernel.device)))


def _dead_share(patterns: Patterns) -> float:
    """Share of the units that are flat on all examples."""
    units = sum(pattern.units for pattern in patterns.values())
    return sum(pattern.dead or 0 for pattern in patterns.values()) / units


def _stored(patterns: Patterns | None) -> dict[str, dict[str, Any]] | None:
    """Tensors and numbers alone, which `torch.load(weights_only=True)` reads."""
    if patterns is None:
        return None
    return {
        name: {"bits": p.bits, "size": p.size, "units": p.units, "dead": p.dead}
        for name, p in patterns.items()
    }


def _restored(state: dict[str, dict[str, Any]] | None) -> Patterns | None:
    if state is None:
        return None
    return {
        name: ActivationPattern(**{**fields, "bits": fields["bits"].cpu()})
        for name, fields in state.items()
    }
