"""LightningCLI builds every monitor from a file and trains with it."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from monitored import Plain, loader

from ntk_callbacks import Probe

MONITORS = {
    "NTKMonitor": {
        "probe": 4,
        "every": "2 steps",
        "outputs": "full",
        "metrics": ["trace", "eigenvalue_max"],
        "by": {"first": r"net\.0"},
        "parameters": "net",
        "options": {
            "class_path": "ntk_callbacks.NTKOptions",
            "init_args": {"mode": "train", "memory_budget": "1GiB", "name": "ntk"},
        },
    },
    "ParameterDriftMonitor": {"every": 2, "per_tensor": False, "parameters": "weight"},
    "JacobianMonitor": {
        "probe": 4,
        "every": 2,
        "mode": "train",
        "memory_budget": 10**8,
    },
    "SignalMonitor": {
        "probe": 4,
        "every": 2,
        "layers": "net",
        "activation": "tanh",
        "gradient_of": "loss",
    },
    "FeatureMonitor": {"probe": 4, "every": 2, "layer": "net.1", "per_layer": True},
    "PredictionMonitor": {"probe": 4, "every": 2, "per_class": True},
    "LinearizationMonitor": {
        "probe": 4,
        "every": 2,
        "twin": True,
        "held_out": "held_out.pt",
        "options": {
            "class_path": "ntk_callbacks.LinearizationOptions",
            "init_args": {"threshold": 0.2},
        },
    },
}
GROUPS = ("ntk", "params", "jacobian", "signal", "features", "prediction", "linear")


class Classifier(Plain):
    """With arguments of plain types, as LightningCLI wants them."""

    def __init__(self):
        super().__init__()


class Examples(LightningDataModule):
    def train_dataloader(self):
        return loader()


def run(callbacks, tmp_path, monkeypatch):
    """One epoch of 4 steps, configured by a file."""
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": {"class_path": "monitored.Recorder"},
        "callbacks": callbacks,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # which LightningCLI sets for good
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(path)])
    cli = LightningCLI(
        Classifier,
        Examples,
        save_config_callback=None,
        seed_everything_default=1,
    )
    return cli.trainer.logger.measured()


def configured(name, **arguments):
    return {"class_path": f"ntk_callbacks.{name}", "init_args": arguments}


def test_every_monitor_with_its_defaults_and_all_of_them_at_once(tmp_path, monkeypatch):
    callbacks = [
        configured(name, **({} if name == "ParameterDriftMonitor" else {"probe": 4}))
        for name in MONITORS
    ]
    measured = run(callbacks, tmp_path, monkeypatch)
    assert [*measured] == [0, 4]
    assert {tag.split("/")[0] for tag in measured[4]} >= {*GROUPS}


def test_every_argument_that_a_file_can_hold(tmp_path, monkeypatch):
    Probe(torch.ones(4, 3), torch.arange(4) % 2).save("held_out.pt")
    callbacks = [
        configured(name, on_error="raise", **arguments)
        for name, arguments in MONITORS.items()
    ]
    measured = run(callbacks, tmp_path, monkeypatch)
    assert [*measured] == [0, 2, 4]
    tags = {*measured[4]}
    assert {tag.split("/")[0] for tag in tags} >= {*GROUPS}
    assert {"ntk_modules/trace/first", "linear/after_kernel_accuracy"} <= tags
    assert "prediction_classes/loss_change_actual/1" in tags
    assert "linear/twin_loss" in tags
    assert "ntk/condition_number" not in tags


@pytest.mark.parametrize("name", MONITORS)
def test_argument_that_a_monitor_lacks_is_refused(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run([configured(name, evry=2)], tmp_path, monkeypatch)
    assert "evry" in capsys.readouterr().err


def test_wrong_value_is_refused_with_what_is_expected(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="every='sometimes' is not understood"):
        run([configured("NTKMonitor", every="sometimes")], tmp_path, monkeypatch)
