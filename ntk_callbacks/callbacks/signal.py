"""SignalMonitor: signals and gradients by depth while a network trains."""

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.engine.layer_calls import LayerFilter
from ntk_callbacks.instruments.signal import GradientOf, SignalInstrument
from ntk_callbacks.theory.activations import Activation


class SignalMonitor(Monitor):
    """Logs how signals and gradients fare with depth, beside mean-field theory.

    Of the linear and convolutional layers, in the order in which they are called, with
    h their outputs: `signal/q_first` and `signal/q_last` (mean h²), `signal/c_first`
    and `signal/c_last` (mean correlation of two examples, 1 where all look alike),
    `signal/chi` (growth per layer of the squared gradient on its way back, 1 at
    criticality), `signal/xi_q` and `signal/xi_c` (fitted depth scales in layers, NaN
    where q or c decays like no exponential). Where one layer is given φ of what the
    one before returns: `signal/q_mean_field_error` and `signal/c_mean_field_error`
    (mean |q/q̂ − 1| and |c − ĉ|, each layer predicted from the one before and the
    layer's own σ_w and σ_b), `signal/xi_q_mean_field` and `signal/xi_c_mean_field` (the
    depth scales of an endless network of such layers). By depth, as vectors:
    `signal/q_by_depth` and the like.
    `signal_statistics` says how each is defined.

    Args:
        probe: As in `NTKMonitor`; at least two examples have a correlation.
        every: As in `NTKMonitor`.
        layers: None for linear and convolutional layers; a regular expression on their
            names; types, or a predicate `(name, module)`, which alone decide.
        activation: φ between the layers, a name in `theory.ACTIVATIONS` or a callable;
            None recognizes it.
        gradient_of: `"outputs"` (in random directions) or `"loss"` (cross-entropy or
            ½|f − y|², by the targets of the probe).
        output_fn: As in `NTKMonitor`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        per_layer: One curve for each layer too: `signal_layers/q/<layer>`, `…/c/…`,
            `…/gradient_square/…` and `…/chi/…`, that between a layer and the next.
        name: Group of the tags; tells two monitors apart.
        history: As in `JacobianMonitor`.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = SignalMonitor(probe=32, every="5 per decade", activation="tanh")

    References:
        Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232.
    """

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        layers: LayerFilter = None,
        activation: Activation | None = None,
        gradient_of: GradientOf = "outputs",
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        per_layer: bool = False,
        name: str = "signal",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            SignalInstrument(
                layers=layers,
                activation=activation,
                gradient_of=gradient_of,
                output_fn=output_fn,
                mode=mode,
                per_layer=per_layer,
                name=name,
            ),
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(name, mode, layers, gradient_of),
            history=history,
        )
