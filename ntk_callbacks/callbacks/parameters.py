"""ParameterDriftMonitor: how far the weights travel while a network trains."""

from ntk_callbacks._types import ParameterFilter
from ntk_callbacks.callbacks.as_schedule import Every
from ntk_callbacks.callbacks.failures import OnError
from ntk_callbacks.callbacks.history import History
from ntk_callbacks.callbacks.monitor import Monitor
from ntk_callbacks.instruments.parameters import ParameterDriftInstrument


class ParameterDriftMonitor(Monitor):
    """Logs displacement, path length and direction of the weights.

    `params/displacement` is ‖θₜ−θ₀‖₂/‖θ₀‖₂ (small in the lazy regime), also for every
    tensor as `params_tensors/displacement/<name>`; `params/path_length` is
    Σ‖θᵢ₊₁−θᵢ‖₂/‖θ₀‖₂ over the measured points; `params/cosine_to_init` is the cosine of
    θₜ and θ₀.

    Args:
        every: As in `NTKMonitor`.
        parameters: As in `empirical_ntk`; chosen at the first measurement.
        per_tensor: One curve for each tensor too.
        name: Group of the tags; tells two monitors apart.
        history: Whether measurements are kept for `load_history` in the folder of the
            run, or in which other folder.
        on_error: `"warn"` skips what fails; `"raise"` raises.

    Raises:
        ValueError: If an argument is not understood.

    Example:
        >>> monitor = ParameterDriftMonitor(every="100 steps", per_tensor=False)

    References:
        Chizat, Oyallon, Bach 2019, arXiv:1812.07956.
    """

    def __init__(
        self,
        every: Every = "epoch",
        *,
        parameters: ParameterFilter = None,
        per_tensor: bool = True,
        name: str = "params",
        history: History = True,
        on_error: OnError = "warn",
    ) -> None:
        super().__init__(
            ParameterDriftInstrument(
                parameters=parameters, per_tensor=per_tensor, name=name
            ),
            probe=None,
            every=every,
            on_error=on_error,
            settings=(name, parameters),
            history=history,
        )
