"""The less common choices of an NTK measurement."""

from dataclasses import dataclass
from os import PathLike
from typing import get_args

import torch

from ntk_callbacks._types import Mode
from ntk_callbacks.engine.exact import ROUTES
from ntk_callbacks.engine.memory import memory_bytes
from ntk_callbacks.instruments.instrument import checked_name, one_of
from ntk_callbacks.theory.scales import Loss


@dataclass(frozen=True)
class NTKOptions:
    """The less common choices of an NTK measurement.

    Args:
        mode: `"eval"`, or `"train"` for the joint-batch kernel through BatchNorm.
        route: `"auto"`, `"vmap"` or `"rows"`, as in `empirical_ntk`.
        memory_budget: Working memory in bytes or as `"2GiB"`; None for a quarter of
            what is free.
        dense_limit: With `outputs="auto"`, kernels with more rows n·c than this are
            traced over the outputs; of more than 2048 outputs c none is formed at all.
        name: Group of the tags, `"ntk"`; set it to tell two monitors apart.
        history: Whether `NTKMonitor` keeps its measurements for `load_history` in the
            folder of the run, or in which other folder.
        keep_kernels: Keep the traced kernel there too, the examples ordered by class.
        loss: What is trained, a name in `theory.loss_scale`, for residuals and
            sharpness: `"mse_mean"` for `MSELoss()`. None is `"cross_entropy_mean"` for
            class labels, and `"half_mean"`, 1/(2n) Σ (f − y)², for real targets, which
            is told once, for they may be trained in any way.

    Raises:
        ValueError: If an option is not understood.

    Example:
        >>> NTKOptions(mode="train", name="ntk_train").dense_limit
        2048
    """

    mode: Mode = "eval"
    route: str = "auto"
    memory_budget: int | str | None = None
    dense_limit: int = 2048
    name: str = "ntk"
    history: bool | str | PathLike[str] = True
    keep_kernels: bool = False
    loss: Loss | None = None

    def __post_init__(self) -> None:
        one_of("mode", self.mode, get_args(Mode))
        one_of("route", self.route, ("auto", *ROUTES))
        memory_bytes(self.memory_budget, torch.device("cpu"))
        checked_name(self.name)
        if self.loss is not None:
            one_of("loss", self.loss, get_args(Loss))
