"""Whether a fit has come to its end: whatever the schedule, that step is measured."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def is_last_step(trainer: Any, ends_epoch: bool) -> bool:
    """Whether the fit ends with the update just made, as far as can be known.

    Args:
        trainer: The Lightning trainer, inside `fit`.
        ends_epoch: Whether an epoch ends with this update too.

    Returns:
        False also where another callback is yet to stop the run.
    """
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    if not ends_epoch:
        return False
    epochs = trainer.current_epoch + 1
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return True
    may_stop = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (
        trainer.min_steps or 0
    )
    return bool(trainer.should_stop and may_stop)


def weight_sums(model: nn.Module) -> list[int]:
    """The sum of the bytes of every parameter: exact in any dtype, NaN included."""
    # A shard is left out: summing one can wait for other processes.
    return [
        int(p.detach().reshape(-1).view(torch.uint8).sum())
        for p in model.parameters()
        if not (is_lazy(p) or "DTensor" in type(p).__name__)
    ]
