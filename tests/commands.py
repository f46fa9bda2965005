"""The command `ntk-train`, run in an empty directory."""

import logging
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

from ntk_callbacks.cli import main

QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]

TINY = ["experiment=mlp", "model.width=4", "callbacks=none", *QUIET]


@pytest.fixture
def ntk_train(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty directory; returns what it printed."""
    (tmp_path / "with space").mkdir()
    monkeypatch.chdir(tmp_path / "with space")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    handlers, interrupt = logging.root.handlers[:], signal.getsignal(signal.SIGINT)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["ntk-train", *words])
        main()
        return capsys.readouterr().out

    yield run
    logging.root.handlers[:] = handlers
    signal.signal(signal.SIGINT, interrupt)  # Lightning ignores it after a first one


def checkpoint(name):
    (path,) = Path("outputs", name).glob("*/checkpoints/last.ckpt")
    return path


class InterruptAt(pl.Callback):
    """Ctrl-C after some update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt
