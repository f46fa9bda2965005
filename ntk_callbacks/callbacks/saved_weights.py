"""Weights out of checkpoints that Lightning wrote, in the order of training."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def by_step(paths: Iterable[Path], trust: bool = False) -> dict[int, Path]:
    """Checkpoints by completed optimizer updates.

    Args:
        paths: Files, in any order; of several of one step the first is taken.
        trust: Read files that hold more than tensors and plain data, which can run any
            code.

    Returns:
        Step -> file, the steps increasing.

    Raises:
        ValueError: If a file is no checkpoint of a training run.
    """
    found: dict[int, Path] = {}
    for path in paths:
        found.setdefault(int(contents(path, trust)["global_step"]), path)
    return dict(sorted(found.items()))


def contents(path: Path, trust: bool = False) -> dict[str, Any]:
    """What a checkpoint holds; large tensors are read when they are used.

    Args:
        path: The file.
        trust: As in `by_step`.

    Returns:
        A dict with `state_dict` and `global_step` at least.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a training run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        found = torch.load(path, "cpu", weights_only=not trust, mmap=True)
    except Exception as error:  # whatever unpickling something else may raise
        first, *_ = str(error).splitlines() or [""]
        unsafe = "weights_only" in str(error) or "Weights only" in str(error)
        hint = (
            " It holds more than tensors and plain data; if you trust it, --trust "
            "reads it."
            if unsafe and not trust
            else ""
        )
        raise ValueError(
            f"{str(path)!r} is no checkpoint that can be read "
            f"({type(error).__name__}: {first}).{hint}"
        ) from error
    keys = ("state_dict", "global_step")
    if not (isinstance(found, dict) and all(key in found for key in keys)):
        raise ValueError(
            f"{str(path)!r} is no checkpoint of a training run: expected a dict with "
            "state_dict and global_step, as Lightning writes it."
        )
    return found


def load_weights(model: nn.Module, path: Path, trust: bool = False) -> None:
    """Give a model the weights of a checkpoint.

    Args:
        model: What the checkpoint was written for.
        path: The file.
        trust: As in `by_step`.

    Raises:
        ValueError: If it is no checkpoint, or one of another model.
    """
    weights = contents(path, trust)["state_dict"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        parts = [part.strip().rstrip(". ") for part in str(error).splitlines()[1:]]
        raise ValueError(
            f"{str(path)!r} was written for another model than "
            f"{type(model).__name__}: {'; '.join(parts)}."
        ) from error
