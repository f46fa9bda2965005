"""FeatureMonitor: what the last layer reads, and which gates switch, in training."""

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.instruments.features import FeatureInstrument


class FeatureMonitor(Monitor):
    """Logs how the features of the last hidden layer move, and how many gates switch.

    Of the conjugate kernel K of the features, their Gram matrix divided by their
    number: `features/target_alignment` (centered alignment with the targets, if the
    probe has some), `features/cka_to_init` (the same with the first K),
    `features/relative_change` (‖K − K₀‖/‖K₀‖), `features/participation_ratio` and
    `features/entropy_rank` (how many directions the features fill; the mean counts as
    one). Of the ReLU-like gates of the whole network, if it has any:
    `features/pattern_change` (share of the activations on another linear piece of
    their gate than at the start), `features/pattern_change_recent` (than at the
    previous measurement, NaN at the first) and `features/dead_units` (share of units
    that are flat on the whole probe). Histogram: `features/eigenvalues_log10`; image:
    `features/kernel`, by class. In the lazy regime features and patterns stay.

    Args:
        probe: As in `NTKMonitor`.
        every: As in `NTKMonitor`.
        layer: None for what the last layer with weights reads; the name of a layer
            whose output is meant; `""` for the outputs of `output_fn`. See
            `conjugate_kernel`.
        output_fn: As in `NTKMonitor`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        patterns: False leaves the gates out, whose patterns take two bits for each
            activation of the probe, in memory and in checkpoints.
        per_layer: One curve for each call of a gate too:
            `features_layers/pattern_change/<layer>`, `…/dead_units/<layer>`.
        name: Group of the tags; tells two monitors apart.
        history: As in `JacobianMonitor`.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = FeatureMonitor(probe=128, every="5 per decade", per_layer=True)

    References:
        Kornblith et al. 2019, arXiv:1905.00414 (CKA); Baratin et al. 2021,
        arXiv:2008.00938 (alignment); Hanin, Rolnick 2019, arXiv:1906.00904 (patterns).
    """

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        layer: str | None = None,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        patterns: bool = True,
        per_layer: bool = False,
        name: str = "features",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            FeatureInstrument(
                layer=layer,
                output_fn=output_fn,
                mode=mode,
                patterns=patterns,
                per_layer=per_layer,
                name=name,
            ),
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(name, mode, layer, patterns),
            history=history,
        )
