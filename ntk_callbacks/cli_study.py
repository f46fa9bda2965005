"""`ntk-train experiment=<study>`: jobs, a figure, a table and checked numbers."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

# What an experiment that is a study takes from the command line.
STUDY_KEYS = (
    *("study", "check", "experiment", "scale", "strict", "seed", "ckpt"),
    *("name", "run_dir", "hydra"),
)
_DEVICE_KEYS = ("trainer", "trainer.accelerator")


def foreign_keys(overrides: Sequence[str]) -> list[str]:
    """What was set on the command line and means nothing to a study.

    Args:
        overrides: `key=value` words.

    Returns:
        The keys.

    Example:
        >>> foreign_keys(["experiment=lazy_width", "study.seeds=2", "model.width=3"])
        ['model.width']
    """
    keys = [word.partition("=")[0].lstrip("+~") for word in overrides]
    return [
        key
        for key in keys
        if key.split(".")[0] not in STUDY_KEYS and key not in _DEVICE_KEYS
    ]


def run(config: dict[str, Any], overrides: Sequence[str]) -> float | None:
    """Run the study of a configuration, and print what it finds.

    Args:
        config: Composed and checked.
        overrides: The words that started the run.

    Returns:
        1 if all checks hold, else 0.

    Raises:
        ValueError: If a parameter, a check, the scale or a key is wrong.
        SystemExit: If `strict` and a check fails.
        KeyboardInterrupt: After saying how to go on.
    """
    from ntk_callbacks.studies.checks import Check
    from ntk_callbacks.studies.run_study import lines, run_study, scaled

    if foreign := foreign_keys(overrides):
        raise ValueError(
            f"experiment={config['name']} is a study with jobs of its own: "
            f"{', '.join(foreign)} means nothing to it. Set study.<parameter>: "
            f"{', '.join(k for k in config['study'] if k != '_target_')}."
        )
    if config["ckpt"] not in (None, "last"):
        raise ValueError(
            f"ckpt={config['ckpt']}: a study goes on with ckpt=last, in the newest run "
            "of its name."
        )
    given = {
        word.partition("=")[0].lstrip("+").removeprefix("study.") for word in overrides
    }
    node = scaled(config["study"], config["scales"], config["scale"], given)
    study = instantiate(node, _convert_="all")
    checks = {name: Check(**check) for name, check in config["check"].items()}
    folder = Path(config["run_dir"])
    device = _device(config["trainer"]["accelerator"])
    try:
        outcome = run_study(
            study, folder, checks=checks, device=device, seed=config["seed"]
        )
    except KeyboardInterrupt:
        words = [word for word in overrides if not word.startswith("ckpt=")]
        print(
            "Interrupted. Go on with the jobs that are left:\n"
            + shlex.join(["ntk-train", *words, "ckpt=last"])
        )
        raise
    print("\n" + "\n".join(lines(outcome)))
    print(f"\nRun directory: {folder}\nFigure: {folder / 'figure.png'}")
    print(f"tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")
    if config["strict"] and not outcome.passed:
        sys.exit(f"ntk-train: {config['name']}: a check failed.")
    return float(outcome.passed)


def _device(accelerator: str) -> str:
    """Where torch computes, for an accelerator in the words of Lightning."""
    import torch

    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator
