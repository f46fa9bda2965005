"""`ntk-replay`: a run that kept checkpoints is measured again, to the last bit."""

import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import (
    JacobianMonitor,
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    Probe,
    SignalMonitor,
    load_history,
)
from ntk_callbacks.cli import main as train
from ntk_callbacks.cli_replay import main


class Net(LightningModule):
    """Saves its hyperparameters, so that its class is enough to build it."""

    def __init__(self, width=4, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        layers = (nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh())
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.rate)


class Wide(Net):
    """Another model: built, but of another shape than what is in the checkpoints."""

    def __init__(self, width=5, rate=0.1):
        super().__init__(width=9)


def net():
    return Net(width=6)


def no_module():
    return "a text"


def examples():
    x = torch.randn(12, 3)
    return TensorDataset(x, torch.arange(12) % 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run that measured every second step, with its weights there."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        train_here()
    return folder


@pytest.fixture
def live(trained, tmp_path, monkeypatch):
    """What that run measured, in a copy of its folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return load_history("live")


def train_here():
    torch.manual_seed(0)
    data = examples()
    Probe(*data[:6]).save("probe.pt")
    settings = {"on_error": "raise", "history": "live"}
    options = NTKOptions(history="live", keep_kernels=True)
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[
            NTKMonitor("probe.pt", 2, options=options, on_error="raise"),
            ParameterDriftMonitor(2, **settings),
            JacobianMonitor("probe.pt", 2, **settings),
            SignalMonitor("probe.pt", 2, **settings),
            Starts("kept/0.ckpt"),
            ModelCheckpoint("kept", "{step}", save_top_k=-1, every_n_train_steps=2),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(net(), DataLoader(data, batch_size=3, shuffle=True))


class Starts(ModelCheckpoint):
    """Keeps the initialization too."""

    def __init__(self, path):
        super().__init__(Path(path).parent, save_top_k=0)
        self.path = path

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


ALL = ["--monitors", "ntk,params,jacobian,signal"]
NET = ["--model", f"{__name__}:Net", "--probe", "probe.pt"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file, whatever name pytest gave it."""
    monkeypatch.setitem(sys.modules, "of_the_test", sys.modules[Net.__module__])


NET = ["--model", "of_the_test:Net", "--probe", "probe.pt"]


def same_histories(left, right):
    compared = {tag for tag in left if not tag.startswith("monitor/seconds")}
    assert compared == {tag for tag in right if not tag.startswith("monitor/seconds")}
    for tag in compared:
        assert [*left[tag].steps] == [*right[tag].steps], tag
        for one, other in zip(left[tag].values, right[tag].values, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=tag)


def test_replay_equals_what_was_measured_live_to_the_last_bit(live, capsys):
    main(["kept", *ALL, *NET, "--out", "again"])
    replayed = load_history("again")
    assert [*replayed["ntk/trace"].steps] == [0, 2, 4, 6, 8]
    kernels = "ntk/kernel"
    assert kernels in live
    assert kernels not in replayed  # not asked for
    without = {tag: live[tag] for tag in live if tag != kernels}
    same_histories(without, replayed)
    output = capsys.readouterr()
    assert "ntk/trace" in output.out
    assert output.out.endswith("History: again/ntk_history\n")
    assert output.err.splitlines()[-1] == "step 8: kept/step=8.ckpt"
    for monitor in ("ntk", "jacobian", "signal"):
        found, expected = (h.conventions[monitor] for h in (replayed, live))
        assert found["probe_digest"] == expected["probe_digest"]
        assert found["replayed"] is True


def test_a_function_gives_the_model_too_in_any_order_of_the_files(live):
    files = sorted(map(str, Path("kept").glob("*.ckpt")), reverse=True)
    main([*files, *files[:1], *NET, "--out", "class"])
    main([*files, *("--model", "of_the_test:net"), *NET[2:], "--out", "function"])
    same_histories(load_history("class"), load_history("function"))


def test_a_second_replay_supersedes_the_first(live):
    main(["kept", *NET])
    main(["kept/step=4.ckpt", "kept/step=8.ckpt", *NET])
    again = load_history("kept/replay")
    assert [*again["ntk/relative_change"].steps] == [4, 8]
    assert again["ntk/relative_change"].values[0] == 0.0


def refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    message = str(stop.value)
    assert message.startswith("ntk-replay: ")
    assert "\n" not in message
    return message


def test_mistakes_are_told_in_one_line(live, capsys):
    Path("bad.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, "weights.ckpt")
    torch.save({"global_step": 1, "state_dict": {}, "code": examples}, "code.ckpt")
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/one.ckpt").write_bytes(Path("kept/step=2.ckpt").read_bytes())
    Probe(torch.zeros(2, 7)).save("wrong.pt")
    wrong = ["--model", "of_the_test:Net", "--probe", "wrong.pt"]
    for words, expected in [
        (["nowhere.ckpt", *NET], "no file 'nowhere.ckpt'"),
        (["bad.ckpt", *NET], "'bad.ckpt' is no checkpoint that can be read"),
        (["weights.ckpt", *NET], "no checkpoint of a training run"),
        (["code.ckpt", *NET], "if you trust it, --trust"),
        (["empty", *NET], "'empty' holds no .ckpt file"),
        (["kept/step=2.ckpt", "other", *NET], "are of several runs"),
        (["kept"], "is no run of ntk-train, so --model is needed"),
        (["kept", *NET[:2]], "no training data to draw 64 examples from"),
        (["kept", *NET[:2], "--probe", "gone.pt"], "there is no file 'gone.pt'"),
        (["kept", *wrong], "step 0: "),
        (["kept", *wrong], "Net was called with torch.float32 (2, 7)."),
        (["kept", *NET, "--out", "bad.ckpt"], "Not a directory: 'bad.ckpt/ntk_hist"),
        (["kept", "--model", "of_the_test:ALL"], "of_the_test:ALL' cannot be called"),
        (["kept", "--model", "of_the_test:same_histories"], "missing 2 required pos"),
        (["kept", "--model", "of_the_test"], "expected package.module:Class"),
        (["kept", "--model", "of_the_test:Gone"], "no attribute 'Gone'"),
        (["kept", "--model", "gone_module:Net"], "No module named 'gone_module'"),
        (["kept", "--model", "of_the_test:Wide"], "cannot be built from"),
        (["kept", "--model", "of_the_test:no_module"], "returned a str"),
        (["kept", *NET, "--monitors", "ntk,kernel"], "'kernel' is none of ntk,"),
        (["kept", *NET, "--monitors", "prediction"], "gradients of a step"),
        (["kept", *NET, "--out", "live"], "holds what a run measured itself"),
    ]:
        message = refused(words, capsys)
        assert expected in message, (words, message)
    assert not Path("kept/replay/ntk_history").exists() or load_history("kept/replay")


def test_a_checkpoint_with_code_is_read_if_trusted(live):
    saved = torch.load("kept/step=2.ckpt", weights_only=True)
    torch.save({**saved, "code": examples}, "code.ckpt")
    main(["code.ckpt", *NET, "--trust", "--monitors", "params"])
    assert "params/displacement" in load_history("replay")


def test_a_run_of_ntk_train_needs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        *("experiment=mlp", "name=short", "seed=3", "model.width=8"),
        *("trainer.max_epochs=3", "trainer.enable_progress_bar=false"),
        *("callbacks.ntk.probe=5", "callbacks.jacobian.probe=4"),
        '+callbacks.ntk.options={_target_:ntk_callbacks.NTKOptions,mode:"train"}',
        *("checkpoint.filename='{step}'", "+checkpoint.save_top_k=-1"),
    ]
    monkeypatch.setattr(sys, "argv", ["ntk-train", *words])
    train()
    (run,) = Path("outputs/short").iterdir()
    main([str(run)])
    live, replayed = load_history(run), load_history(run / "replay")
    assert [*replayed["ntk/trace"].steps] == [0, 23, 46, 69]
    same_histories(live, replayed)
    ignored = {"history", "replayed"}
    for monitor, expected in live.conventions.items():
        found = replayed.conventions[monitor]
        for key in expected.keys() - ignored:
            assert found[key] == expected[key], (monitor, key)
