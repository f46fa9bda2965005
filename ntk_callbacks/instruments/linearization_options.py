"""The less common choices of a comparison with the linearized network."""

import math
from dataclasses import dataclass
from os import PathLike
from typing import get_args

import torch

from ntk_callbacks._types import Mode
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.instruments.instrument import checked_name, one_of


@dataclass(frozen=True)
class LinearizationOptions:
    """The less common choices of a comparison with the linearized network.

    Args:
        threshold: Output distance beyond which network and linearization have parted.
        ridge: Of kernel regression, in units of the mean eigenvalue tr Θ/n; ≥ 0.
        mode: `"eval"` or `"train"`, as in `empirical_ntk`.
        memory_budget: Bytes, or `"2GiB"`, that products and kernels may take.
        name: Group of the tags; tells two monitors apart.
        history: As in `JacobianMonitor`.

    Raises:
        ValueError: If an option is not understood.

    Example:
        >>> LinearizationOptions(threshold=0.5).ridge
        0.001
    """

    threshold: float = 0.1
    ridge: float = 1e-3
    mode: Mode = "eval"
    memory_budget: int | str | None = None
    name: str = "linear"
    history: bool | str | PathLike[str] = True

    def __post_init__(self) -> None:
        for option in ("threshold", "ridge"):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise ValueError(f"{option}={value}; expected a finite number ≥ 0.")
        one_of("mode", self.mode, get_args(Mode))
        memory_bytes(self.memory_budget, torch.device("cpu"))
        checked_name(self.name)
