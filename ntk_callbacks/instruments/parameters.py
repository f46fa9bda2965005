"""How far the weights have traveled from where they started."""

import warnings
from typing import Any

import torch
from torch import nn

from ntk_callbacks import metrics
from ntk_callbacks._types import ParameterFilter, Params
from ntk_callbacks.engine.arguments import check_selection
from ntk_callbacks.errors import UnsupportedModelError
from ntk_callbacks.functional import select_parameters
from ntk_callbacks.instruments.instrument import checked_name, numbers, tag_name
from ntk_callbacks.metrics.drift import distance, norm
from ntk_callbacks.probe import Probe
from ntk_callbacks.record import Measurement


class ParameterDriftInstrument:
    """Displacement, path length and direction of the weights.

    The parameters are chosen at the first measurement and stay the same afterwards.

    Args:
        parameters: As in `empirical_ntk`.
        per_tensor: Report the displacement of every tensor too. Tensors that start at
            zero have no scale of their own: they count in the total alone.
        name: Group of the tags.
    """

    def __init__(
        self,
        *,
        parameters: ParameterFilter = None,
        per_tensor: bool = True,
        name: str = "params",
    ) -> None:
        check_selection(parameters)
        self.name = checked_name(name)
        self.parameters = parameters
        self.per_tensor = per_tensor
        self._reference: Params = {}
        self._previous: Params = {}
        self._path = 0.0
        self._told = False

    def start(self, probe: Probe) -> None:
        """Weights are measured without inputs."""

    def measure(self, model: nn.Module, step: int) -> Measurement:
        """Where the weights are now.

        Args:
            model: Left exactly as it was.
            step: Completed optimizer updates.

        Returns:
            Displacement ‖θₜ−θ₀‖/‖θ₀‖ in total and per tensor; path length
            Σ‖θᵢ₊₁−θᵢ‖/‖θ₀‖ over the measured points, a lower bound of the length of
            the true path; cosine of the angle between θₜ and θ₀.

        Raises:
            UnsupportedModelError: If parameters of the first measurement are gone.
        """
        named = dict(model.named_parameters())
        names = list(self._reference) or select_parameters(model, self.parameters)
        gone = [name for name in names if name not in named]
        if gone:
            raise UnsupportedModelError(
                f"ParameterDriftMonitor: the model no longer has {gone}, which it had "
                "at the first measurement. Start a new run."
            )
        self._tell_of_others(model, names)
        now = {name: named[name].detach().clone() for name in names}
        reference = _beside(self._reference, now) if self._reference else now
        previous = _beside(self._previous, now) if self._previous else now
        start = norm(reference)
        path = self._path + float(distance(now, previous))
        found = {
            f"{self.name}/displacement": metrics.displacement(now, reference),
            f"{self.name}/path_length": path / start,
            f"{self.name}/cosine_to_init": metrics.cosine_similarity(now, reference),
        }
        if self.per_tensor:
            # A group of its own: some loggers forbid a tag that begins another tag.
            group = f"{self.name}_tensors/displacement"
            found |= {
                f"{group}/{tag_name(name)}": metrics.displacement(
                    {name: now[name]}, {name: reference[name]}
                )
                for name in names
                if reference[name].any()
            }
        self._reference, self._previous, self._path = reference, now, path
        return Measurement(step, scalars=numbers(found))

    def _tell_of_others(self, model: nn.Module, names: list[str]) -> None:
        """Warn once of layers that thaw, or are added, later: nobody measures them."""
        if self._told or callable(self.parameters):
            return
        try:
            others = sorted({*select_parameters(model, self.parameters)} - {*names})
        except ValueError:  # all of them are frozen now
            return
        if others:
            self._told = True
            warnings.warn(
                f"ParameterDriftMonitor: {len(others)} parameters that were frozen or "
                f"not there at the first measurement are trained now ({others[0]}, "
                f"…), but {self.name}/… stay about the {len(names)} that were trained "
                "then. Pass parameters=lambda name, parameter: True to measure frozen "
                "ones from the start.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """θ₀, the previous weights and the path so far: two copies of the weights."""
        return {
            "reference": self._reference,
            "previous": self._previous,
            "path": self._path,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._reference = state["reference"]
        self._previous = state["previous"]
        self._path = state["path"]


@torch.no_grad()
def _beside(params: Params, now: Params) -> Params:
    """Restored tensors on the devices of the present ones."""
    return {name: value.to(now[name].device) for name, value in params.items()}
