"""JacobianMonitor: singular values of the input-output Jacobian while training."""

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.engine.layer_calls import LayerFilter
from ntk_callbacks.instruments.jacobian import By, JacobianInstrument


class JacobianMonitor(Monitor):
    """Logs the singular values s of ∂f/∂x: does the network keep signals apart?

    Over all examples of the probe: `jacobian/singular_value_max`,
    `jacobian/singular_value_min`, `jacobian/mean_square` (⟨s²⟩, 1 at criticality) and
    `jacobian/log_std` (standard deviation of ln s, 0 for an isometry up to scale);
    `jacobian/condition_number` is the median over the examples of s_max/s_min,
    `jacobian/isometry_gap` the mean of max |s²/⟨s²⟩ − 1|. Where a logger draws, a
    histogram of log10 s. With more than 1024 values of each example, those of the first
    8 examples, by products with J: ⟨s²⟩ is an estimate, s_min NaN where it is not
    found, and there is no `log_std`.

    `by="depth"` adds the layer-to-layer Jacobians ∂h_{l+1}/∂h_l, those from the input
    ∂h_l/∂x and to the output ∂f/∂h_l, h_l the outputs of linear and convolutional
    layers in the order in which they are called: `jacobian/step_mean_square` (geometric
    mean over the layers), `jacobian/step_singular_value_max`, `…_min` (over all),
    `jacobian/step_isometry_gap` (mean), and vectors by depth, such as
    `jacobian/to_output_mean_square_by_depth`. `by="time"` adds ∂z_{t+1}/∂z_t and
    ∂z_T/∂z_t between the states z of recurrent modules, as
    `jacobian_time/step_mean_square/<module>` and the like. Both at the first 8
    examples: `jacobian_by_depth` and `jacobian_by_time` say how, and which numbers are
    estimates.

    Args:
        probe: As in `NTKMonitor`; inputs must be floating (images, features), but for
            what `by` adds.
        every: As in `NTKMonitor`.
        by: None, `"depth"` or `"time"`: what is measured inside the network. Takes many
            backward passes: choose `every` and `layers` with care for large networks.
        layers: None for linear and convolutional layers, or for all recurrent modules;
            a regular expression on their names; types, or a predicate `(name, module)`.
        per_layer: By depth, one curve for each layer too:
            `jacobian_layers/step_mean_square/<layer>` and the like.
        output_fn: As in `NTKMonitor`.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes, or `"2GiB"`, that the Jacobians held at a time may take.
        name: Group of the tags; tells two monitors apart.
        history: Whether measurements are kept for `load_history` in the folder of the
            run, or in which other folder.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = JacobianMonitor(probe=32, every="3 epochs")
        >>> inside = JacobianMonitor(every="5 per decade", by="depth")

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735; Chen, Pennington,
        Schoenholz 2018, arXiv:1806.05394 (by time).
    """

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        by: By | None = None,
        layers: LayerFilter = None,
        per_layer: bool = False,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "jacobian",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            JacobianInstrument(
                by=by,
                layers=layers,
                per_layer=per_layer,
                output_fn=output_fn,
                mode=mode,
                memory_budget=memory_budget,
                name=name,
            ),
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(name, mode) if by is None else (name, mode, by, layers),
            history=history,
        )
