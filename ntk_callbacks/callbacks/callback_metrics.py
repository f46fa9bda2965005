"""Measured values where EarlyStopping, ModelCheckpoint and schedulers look for them.

They read `trainer.callback_metrics`, whatever their place among the callbacks. A value
stays there until the next measurement: a callback that looks more often than the
monitor measures sees it again.
"""

from collections.abc import Sequence
from typing import Any

import torch


def publish(trainer: Any, history: Sequence[tuple[int, dict[str, float]]]) -> None:
    """Put the latest values where callbacks with a `monitor` argument find them.

    Args:
        trainer: The trainer, inside `fit`.
        history: What was measured; non-finite numbers stay as they are.
    """
    latest = history[-1][1] if history else {}
    found = {tag: torch.tensor(value) for tag, value in latest.items()}
    trainer.callback_metrics.update(found)


def share(
    trainer: Any, history: Sequence[tuple[int, dict[str, float]]], group: str
) -> None:
    """Publish the latest values in every process: all of them stop, or none does.

    To be called in every process after every update, since which are measured is known
    to rank zero alone. The processes wait for one another where an epoch ends, and
    after each update only if somebody asked for one of the values.

    Args:
        trainer: The trainer, inside `fit`.
        history: What was measured, on rank zero.
        group: Of the tags of the monitor.
    """
    if trainer.world_size > 1 and (trainer.is_last_batch or asked(trainer, group)):
        publish(trainer, trainer.strategy.broadcast(list(history[-1:])))


def asked(trainer: Any, group: str) -> bool:
    """Whether a callback or a learning-rate scheduler monitors a tag of a group.

    Args:
        trainer: The trainer, inside `fit`.
        group: Such as `ntk`, whose modules are in the group `ntk_modules`.

    Returns:
        The same in every process.
    """
    monitored = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
    monitored += [config.monitor for config in trainer.lr_scheduler_configs]
    return any(str(tag).startswith((f"{group}/", f"{group}_")) for tag in monitored)
