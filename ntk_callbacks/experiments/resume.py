"""Which checkpoint a run goes on from, and which directory it goes on in.

A run keeps `<run directory>/checkpoints/last.ckpt`, written at the end of every epoch.
A resumed run goes on in the directory of its checkpoint, so that its curves continue,
and starts with the first epoch that was not completed.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
JOBS = "jobs"


def run_directory(
    name: str, ckpt: str | None, fresh: str, outputs: str | Path = "outputs"
) -> Path:
    """Directory of the run: the one of its checkpoint, or a new one.

    Args:
        name: Name of the experiment.
        ckpt: None for a new run; `"last"` for the newest run of that name; or the path
            of a checkpoint, whose directory is used if it is a run directory.
        fresh: Name of a new directory, below `<outputs>/<name>`; where there is one of
            that name, as of a run that was started in the same second, `<fresh>_1`, ….
        outputs: Where runs are kept.

    Returns:
        The directory, which need not exist if it is a new one.

    Raises:
        FileNotFoundError: If there is no such checkpoint; says where was looked.
    """
    new = _free(Path(outputs, name, fresh))
    if ckpt is None:
        return new
    if ckpt != "last":
        folder = existing_checkpoint(ckpt).parent
        return folder.parent if folder.name == CHECKPOINTS else new
    pattern = f"*/{CHECKPOINTS}/{LAST}"
    found = [
        *Path(outputs, name).glob(pattern),
        *Path(outputs, name).glob(f"*/{JOBS}/*.json"),  # of a study
    ]
    if not found:
        raise FileNotFoundError(
            f"ckpt=last: no run of {name!r} has a checkpoint, looked for "
            f"{Path(outputs, name).resolve()}/{pattern}. "
            "Start one without ckpt, or give the path of a checkpoint."
        )
    return max(found, key=lambda path: path.stat().st_mtime).parents[1]


def _free(folder: Path) -> Path:
    """The folder, or one with a number behind its name, that does not exist yet."""
    numbered = (folder.with_name(f"{folder.name}_{i}") for i in itertools.count(1))
    return next(
        path for path in itertools.chain([folder], numbered) if not path.exists()
    )


def existing_checkpoint(path: str | Path) -> Path:
    """Path of a checkpoint file.

    Args:
        path: The file.

    Returns:
        The same path.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt: {path.resolve()} is not a file. Give the path of a .ckpt file, or "
            '"last" for the newest run of the experiment.'
        )
    return path


def check_checkpoint(path: Path, module: nn.Module, max_epochs: int | None) -> str:
    """Make sure that training can go on from a checkpoint, before it starts.

    Args:
        path: A checkpoint written by Lightning.
        module: The module to be trained on; it is given the weights.
        max_epochs: Epochs the whole run shall have; None or -1: no limit.

    Returns:
        One line that says from where training goes on.

    Raises:
        ValueError: If the file is no checkpoint, was written for another model, or
            belongs to a run that has done all its epochs.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        epochs: int = progress["current"]["processed"]
        step: int = checkpoint["global_step"]
        weights = checkpoint["state_dict"]
    except Exception as error:  # whatever unpickling something else may raise
        raise ValueError(
            f"ckpt: {path} is not a checkpoint of a training run "
            f"({type(error).__name__}: {error})."
        ) from error
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"ckpt: {path} was written for another model; resume with the settings of "
            f"that run. {error}"
        ) from error
    if max_epochs is not None and 0 <= max_epochs <= epochs:
        raise ValueError(
            f"ckpt: {path} has done its {epochs} epochs, and trainer.max_epochs is "
            f"{max_epochs}. Raise trainer.max_epochs to train on, or give the path of "
            "the checkpoint of another run."
        )
    return f"Resuming {path} after epoch {epochs}, step {step}."
