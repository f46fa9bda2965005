"""Runs of `ntk-train` that are interrupted, and how they go on."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from commands import TINY, InterruptAt, checkpoint
from one_of_a_kind import quick

ntk_train = commands.ntk_train


def equal(a, b):
    """Equality of nested checkpoints to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)  # the first kernel velocity is NaN


def test_the_csv_logger_keeps_what_came_before_a_resumed_run(ntk_train):
    first = ntk_train(*TINY, "logger=csv", "trainer.max_epochs=1")
    second = ntk_train(*TINY, "logger=csv", "trainer.max_epochs=2", "ckpt=last")
    files = [
        Path(out.splitlines()[-1].removeprefix("Metrics: ")) for out in (first, second)
    ]
    assert files[0] != files[1]
    for file, step in zip(files, (23, 46), strict=True):
        assert [row.split(",")[0] for row in file.read_text().splitlines()] == [
            "step",
            f"{step}",
            f"{step}",
        ]


@pytest.mark.parametrize(
    "words",
    quick(
        [
            ["experiment=mlp"],
            ["experiment=resnet", "model.width=4"],
            ["optimizer=adam"],
            [
                "callbacks=default",
                "callbacks.ntk.probe=4",
                "callbacks.jacobian.probe=4",
            ],
        ],
        "experiment=mlp",
        "callbacks=default callbacks.ntk.probe=4 callbacks.jacobian.probe=4",
        ids=" ".join,
    ),
)
def test_a_resumed_run_ends_where_an_unbroken_one_ends(ntk_train, words):
    words = [*TINY, *words, "trainer.max_epochs=3"]
    ntk_train(*words, "name=unbroken")
    stop = (
        f"+callbacks.stop={{_target_: {InterruptAt.__module__}.InterruptAt, step: 30}}"
    )
    with pytest.raises(SystemExit):
        ntk_train(*words, "name=broken", stop)
    last = checkpoint("broken")
    half = torch.load(last, weights_only=True)
    assert half["global_step"] == 23  # the second epoch is begun anew
    out = ntk_train(*words, "name=broken", "ckpt=last")
    assert f"Resuming {last.resolve()} after epoch 1, step 23." in out
    assert checkpoint("broken") == last  # no second directory
    broken, unbroken = (
        torch.load(checkpoint(name), weights_only=True)
        for name in ("broken", "unbroken")
    )
    assert broken["global_step"] == 69
    assert not equal(broken["state_dict"], half["state_dict"])
    for key in ("state_dict", "optimizer_states", "classifier_history"):
        assert equal(broken[key], unbroken[key])
    for key in unbroken["callbacks"]:  # the histories of the monitors
        if not key.startswith("ModelCheckpoint"):  # it holds paths
            assert equal(broken["callbacks"][key], unbroken["callbacks"][key])


def test_an_interrupted_run_says_how_to_go_on(ntk_train, capsys):
    stop = (
        f"+callbacks.stop={{_target_: {InterruptAt.__module__}.InterruptAt, step: 30}}"
    )
    with pytest.raises(SystemExit):
        ntk_train(*TINY, stop)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[0] == "ntk-train"
    command = [word for word in command[1:] if not word.startswith("+callbacks.stop")]
    assert "Resuming" in ntk_train(*command, "trainer.max_epochs=2")


def test_a_run_interrupted_at_once_has_nothing_to_resume(ntk_train, capsys):
    stop = (
        f"+callbacks.stop={{_target_: {InterruptAt.__module__}.InterruptAt, step: 3}}"
    )
    with pytest.raises(SystemExit):
        ntk_train(*TINY, stop)
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["run_directory", "build"])  # composing, importing
def test_ctrl_c_before_training_ends_in_one_line(ntk_train, part, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ntk_callbacks.cli.{part}", interrupted)
    with pytest.raises(SystemExit) as stop:
        ntk_train(*TINY)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "ntk-train: interrupted.\n"


def test_ckpt_last_is_the_newest_run_of_that_name(ntk_train):
    words = [*TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
    for run in ("old", "new"):
        ntk_train(*words, f"hydra.run.dir=outputs/mlp/{run}")
    os.utime("outputs/mlp/old/checkpoints/last.ckpt", (0, 0))
    ntk_train(*words, "name=other")
    out = ntk_train(*words, "ckpt=last", "trainer.max_epochs=2")
    assert str(Path("outputs/mlp/new").resolve()) in out
    out = ntk_train(
        *words, "trainer.max_epochs=2", "ckpt=outputs/mlp/old/checkpoints/last.ckpt"
    )
    assert str(Path("outputs/mlp/old").resolve()) in out


def test_a_checkpoint_that_cannot_go_on_is_refused(ntk_train):
    words = [*TINY, "trainer.max_epochs=1"]
    ntk_train(*words)
    with pytest.raises(
        SystemExit, match=r"has done its 1 epochs.*Raise trainer\.max_ep"
    ):
        ntk_train(*words, "ckpt=last")
    with pytest.raises(SystemExit, match=r"(?s)was written for another model.*size"):
        ntk_train(*words, "ckpt=last", "model.width=5")
    Path("junk.ckpt").write_text("junk")
    with pytest.raises(SystemExit, match=r"junk\.ckpt is not a checkpoint"):
        ntk_train(*words, "ckpt=junk.ckpt")


@pytest.mark.slow
def test_ctrl_c_in_a_real_process_leaves_a_checkpoint_to_go_on_from(tmp_path):
    command = [sys.executable, "-m", "ntk_callbacks.cli", *TINY]
    with subprocess.Popen(
        [*command, "trainer.max_epochs=100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("outputs/mlp/*/checkpoints/last.ckpt")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode != 0
    assert "Go on with:" in out
    (path,) = tmp_path.glob("outputs/mlp/*/checkpoints/last.ckpt")
    epochs = torch.load(path, weights_only=True)["epoch"] + 1
    resumed = subprocess.run(
        [*command, f"trainer.max_epochs={epochs + 1}", "ckpt=last"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert f"after epoch {epochs}," in resumed.stdout
