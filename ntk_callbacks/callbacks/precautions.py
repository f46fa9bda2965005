"""What a monitor does before it touches a module that is being trained."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ntk_callbacks.errors import UnsupportedModelError


def mute(pl_module: nn.Module) -> None:
    """Let a `forward` that calls `self.log` log nothing; the guard puts `log` back."""
    for module in pl_module.modules():
        if hasattr(module, "log_dict") and hasattr(module, "log"):
            vars(module).update(log=_log_nothing, log_dict=_log_nothing)


def _log_nothing(*_args: Any, **_options: Any) -> None:
    return None


def refuse_same_name(who: str, name: str, others: Iterable[str]) -> None:
    """Before any training: two monitors of one name write over one another.

    Args:
        who: The class of the monitor.
        name: Group of its tags.
        others: Those of the other monitors of the trainer.

    Raises:
        ValueError: If one of them is the same.
    """
    if name in others:
        raise ValueError(
            f"{who}: another monitor writes to the tags {name}/… too. Give one of them "
            f'another name: {who}(name="{name}_test").'
        )


def refuse_sharded(trainer: Any) -> None:
    """Before anything touches the weights: reading a shard can wait for others.

    Args:
        trainer: The trainer, whose strategy says where the weights are.

    Raises:
        UnsupportedModelError: If no process has them whole.
    """
    strategy = type(trainer.strategy).__name__
    if any(kind in strategy for kind in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise UnsupportedModelError(
            f"the weights are sharded by {strategy}; measurements need them whole on "
            "one process. Train with DDP or on one device to measure."
        )


def stable_text(value: Any) -> str:
    """The same text in every process, unlike the repr of a function."""
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return str(value)
