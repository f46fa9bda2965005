"""JacobianMonitor: singular values of the input-output Jacobian while training."""

from ntk_callbacks._types import Mode, OutputFunction
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.callbacks.probe_source import ProbeSource, checked_probe
from ntk_callbacks.instruments.jacobian import JacobianInstrument


class JacobianMonitor(Monitor):
    """Logs the singular values s of ∂f/∂x: does the network keep signals apart?

    Over all examples of the probe: `jacobian/singular_value_max`,
    `jacobian/singular_value_min`, `jacobian/mean_square` (⟨s²⟩, 1 at criticality) and
    `jacobian/log_std` (standard deviation of ln s, 0 for an isometry up to scale);
    `jacobian/condition_number` is the median over the examples of s_max/s_min. Where a
    logger draws, a histogram of log10 s.

    Args:
        probe: As in `NTKMonitor`; inputs must be floating (images, features).
        every: As in `NTKMonitor`.
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

    References:
        Pennington, Schoenholz, Ganguli 2017, arXiv:1711.04735.
    """

    def __init__(
        self,
        probe: ProbeSource = 64,
        every: Every = "epoch",
        *,
        output_fn: OutputFunction | None = None,
        mode: Mode = "eval",
        memory_budget: int | str | None = None,
        name: str = "jacobian",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            JacobianInstrument(
                output_fn=output_fn,
                mode=mode,
                memory_budget=memory_budget,
                name=name,
            ),
            probe=checked_probe(probe),
            every=every,
            on_error=on_error,
            settings=(name, mode),
            history=history,
        )
