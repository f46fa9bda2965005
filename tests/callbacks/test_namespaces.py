"""Monitors are callbacks of both names of Lightning, and load only the one in use."""

import subprocess
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
from scripts import run_script

from ntk_callbacks.callbacks.namespaces import be_callback_of_both, module_classes

TURNS_TO_THE_OTHER_NAME = """
import sys
import lightning.pytorch
from ntk_callbacks import NTKMonitor, PredictionMonitor
monitor = PredictionMonitor()
assert "pytorch_lightning" not in sys.modules
import pytorch_lightning
quiet = dict(logger=False, enable_checkpointing=False, accelerator="cpu")
for namespace in (pytorch_lightning, lightning.pytorch):
    trainer = namespace.Trainer(callbacks=NTKMonitor(), **quiet)
    assert any(type(part) is NTKMonitor for part in trainer.callbacks)
    assert isinstance(monitor, namespace.Callback)
"""
ASKS_FOR_MONITORS_FIRST = """
from ntk_callbacks import NTKMonitor
import lightning.pytorch
import pytorch_lightning
assert issubclass(NTKMonitor, lightning.pytorch.Callback)
assert issubclass(NTKMonitor, pytorch_lightning.Callback)
"""


def test_a_program_that_uses_one_name_does_not_load_the_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TURNS_TO_THE_OTHER_NAME)
    code, _, errors = run_script(script, tmp_path)
    assert code == 0, errors


@pytest.mark.slow
def test_monitors_that_are_asked_for_first_are_callbacks_of_both_at_once():
    code = [sys.executable, "-W", "ignore", "-c", ASKS_FOR_MONITORS_FIRST]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_joins_once_and_only_what_is_loaded(monkeypatch):
    class Mine(lightning.pytorch.Callback):
        pass

    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "pytorch_lightning")
        be_callback_of_both(Mine)
        assert Mine.__bases__ == (lightning.pytorch.Callback,)
        assert module_classes() == [lightning.pytorch.LightningModule]
    for _ in range(2):
        be_callback_of_both(Mine)
        assert Mine.__bases__ == (
            lightning.pytorch.Callback,
            pytorch_lightning.Callback,
        )
    assert module_classes()[1] is pytorch_lightning.LightningModule
