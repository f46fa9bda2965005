"""One training run from the first batch to the lines it ends with."""

import logging
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ntk_callbacks.experiments.resume import CHECKPOINTS, LAST
from ntk_callbacks.reporting.summary import History, summary_table

_say = rank_zero_only(print)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run needs.

    Args:
        trainer: Its `default_root_dir` is the run directory.
        module: What is trained.
        data: What it is trained on.
        checkpoint: Where to go on from, or None for a new run.
        command: The words that started the run, for saying how to resume it.
    """

    trainer: Trainer
    module: LightningModule
    data: LightningDataModule
    checkpoint: Path | None
    command: Sequence[str]


def train(run: Run) -> float | None:
    """Train, then print the table, the run directory and where the curves are.

    Args:
        run: What to train, and how.

    Returns:
        Test accuracy after the last epoch, for sweepers; None if it was not measured.

    Raises:
        SystemExit: On Ctrl-C, after saying how to go on.
    """
    # The data sets are tensors in memory, which worker processes would only copy.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning's own
    try:
        run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.checkpoint)
    except SystemExit:  # how Lightning ends on Ctrl-C
        _say(_how_to_resume(run))
        raise
    _say(f"\n{_report(run)}")
    accuracy = run.trainer.callback_metrics.get("test/accuracy")
    return None if accuracy is None else float(accuracy)


def tidy_output() -> None:
    """Print each message of Lightning once, and none of its hints at other products."""
    # Imported after Hydra set up logging, Lightning prints by itself and through Hydra.
    logging.getLogger("lightning").handlers.clear()
    for package in ("lightning.pytorch", "pytorch_lightning"):
        logger = logging.getLogger(f"{package}.utilities.rank_zero")
        logger.addFilter(lambda record: "💡 Tip" not in record.getMessage())


def _report(run: Run) -> str:
    trainer: Any = run.trainer  # `callbacks` is set by a part that is not annotated
    monitors = [run.module, *trainer.callbacks]
    histories: list[History] = [m.history for m in monitors if hasattr(m, "history")]
    directory = trainer.default_root_dir
    lines = [summary_table(histories), "", f"Run directory: {directory}"]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            log_dir = Path(logger.log_dir)  # without the slash of an empty version
            lines.append(f"tensorboard --logdir {shlex.quote(str(log_dir))}")
        elif isinstance(logger, CSVLogger):
            lines.append(f"Metrics: {Path(logger.log_dir, 'metrics.csv')}")
    return "\n".join(lines)


def _how_to_resume(run: Run) -> str:
    checkpoint = Path(run.trainer.default_root_dir, CHECKPOINTS, LAST)
    if not checkpoint.is_file():
        return "Interrupted before the first epoch ended: there is nothing to resume."
    words = [word for word in run.command if not word.startswith("ckpt=")]
    # Quotes, because the directories of sweeps have = in their names.
    resume = f"ckpt='{checkpoint}'" if "=" in str(checkpoint) else f"ckpt={checkpoint}"
    return f"Interrupted. Go on with:\n{shlex.join([*words, resume])}"
