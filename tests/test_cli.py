"""`ntk-train` as a user meets it: help, typos, sweeps, loggers, and going on."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from one_of_a_kind import quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def equal(a, b):
    """Equality of nested checkpoints to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)  # the first kernel velocity is NaN


def test_help_lists_groups_and_describes_every_experiment(ntk_train, capsys):
    with pytest.raises(SystemExit) as stop:
        ntk_train("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    conf = Path(__file__).parents[1] / "conf"
    for group in (p for p in conf.iterdir() if p.is_dir()):
        options = ", ".join(sorted(p.stem for p in group.iterdir()))
        assert f"{group.name}: {options}" in text
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    for experiment in (conf / "experiment").iterdir():
        (described,) = [line for line in lines if line[:1] == [experiment.stem]]
        # The same words as at the top of the file.
        assert described[1] in experiment.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.widht=3"],
            r"model\.widht does not exist; did you mean width\? Valid: ",
        ),
        (
            ["modle=mlp"],
            r"modle does not exist; did you mean model\? Valid: callbacks, ",
        ),
        (["experimnet=mlp"], r"experimnet .*; did you mean experiment\?"),
        (
            ["experiment=mpl"],
            r"experiment=mpl .*; did you mean mlp\? Valid: .*cnn, ",
        ),
        (
            ["optimizer=sdg"],
            r"optimizer=sdg .* sgd\? Valid: adam, adamw, momentum, sgd",
        ),
        (["model.activation=rleu"], "activation is 'rleu', expected one of relu, tanh"),
        (
            ["model.parametrization=nkt"],
            "model.parametrization is 'nkt', .*standard, ntk",
        ),
        (["model.width=wide"], "model.width is 'wide', expected int"),
        (
            ["model.width=-3"],
            "model: MLP: width is -3, expected a whole number of at least 1",
        ),
        (["model.width=null"], "MLP: width is None"),
        (["optimizer.lr=fast"], "optimizer.lr is 'fast', expected float"),
        (["trainer.devices=-5"], "trainer: `devices` .* int > 0"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["trainer.accelerator=gpuu"], "trainer: .*'gpuu'.*names are: .*cpu"),
        (
            ["trainer.precision=31"],
            "trainer.precision is 31, expected one of .*32-true",
        ),
        (
            ["trainer.gradient_clip_algorithm=norm"],
            r"write \+trainer\.gradient_clip_al",
        ),
        (["trainer.max_epoch=1"], r"did you mean max_epochs\? Valid: accelerator, "),
        (["+trainer.max_epoch=1"], r"trainer\.max_epoch .*; did you mean max_epochs\?"),
        (["+modle=3"], r"modle is no key of a run; did you mean model\?"),
        (["+callbacks.x._target_=torch.nope"], "callbacks.x._target_: .*torch.nope"),
        (["data.batch_size=0"], "Digits: batch_size is 0"),
        (["seed=-1"], "seed is -1, expected a whole number"),
        (["model.width=${nope}"], "nope"),
        (["model.width=[1"], r"\[1"),
        (
            ["ckpt=last"],
            r"ckpt=last: no run of 'mlp' has .*looked for .*outputs/mlp/\*",
        ),
        (["ckpt=a/b.ckpt"], "ckpt: .*a/b.ckpt is not a file"),
        (["ckpt=nope"], "ckpt: .*nope is not a file"),
        (["name=${oc.env:NOT_SET}"], "Environment variable 'NOT_SET' not found"),
        (
            ["callbacks=ntk", "callbacks.ntk.outputs=foo"],
            r"write \+callbacks.ntk.outputs=….*outputs is 'foo', expected one of full",
        ),
        (["data=mnist", "data.download=false"], "Put the unpacked files .*`data.root="),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_a_line_that_names_it(ntk_train, words, message):
    with pytest.raises(SystemExit, match=f"(?s)^ntk-train: .*{message}") as stop:
        ntk_train(*TINY, *words)
    assert str(stop.value).count("\n") < 3
    assert not re.search("object_type|full_key|raised while", str(stop.value))
    assert not list(Path().glob("outputs/*/*/events*"))


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_directory_that_cannot_be_made_is_told_in_a_line(ntk_train, sweep):
    Path("outputs").write_text("a file where a folder is to be made")
    Path("multirun").write_text("the same")
    with pytest.raises(SystemExit, match=r"^ntk-train: .*hydra\.run\.dir=") as stop:
        ntk_train(*sweep, *TINY)
    assert re.search("outputs|multirun", str(stop.value))
    assert "\n" not in str(stop.value)


def test_typos_in_the_files_of_a_user_are_found_together(ntk_train, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "wide.yaml").write_text(
        "# @package _global_\nmodel:\n  widht: 512\nchekpoint: null\n"
        "optimizer:\n  lr: fast\n"
    )
    with pytest.raises(SystemExit) as stop:
        ntk_train("--config-dir", str(tmp_path / "mine"), "experiment=wide")
    message = str(stop.value)
    assert "chekpoint is no key of a run; did you mean checkpoint?" in message
    assert "model.widht does not exist; did you mean width? Valid: in_shape" in message
    assert "optimizer.lr is 'fast', expected float" in message


def test_the_traceback_can_be_had(ntk_train, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="activation is 'rleu'") as error:
        ntk_train(*TINY, "model.activation=rleu")
    assert "expected one of" in str(error.value.__cause__)
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_a_run_ends_with_the_table_and_where_to_look(ntk_train):
    out = ntk_train(*TINY, "trainer.max_epochs=2")
    assert "💡" not in out
    *_, run_directory, command = out.splitlines()
    path = Path(run_directory.removeprefix("Run directory: "))
    assert shlex.split(command) == ["tensorboard", "--logdir", str(path)]
    assert path.parent == Path.cwd() / "outputs" / "mlp"
    assert list(path.glob("events.out.tfevents*"))
    events = EventAccumulator(str(path)).Reload()
    for tag in ("train/loss", "train/accuracy", "test/loss", "test/accuracy"):
        first, last = events.Scalars(tag)
        assert (first.step, last.step) == (23, 46)
        (row,) = [line.split() for line in out.splitlines() if line.startswith(tag)]
        cells = [f"{e.value:.4g} ({e.step})" for e in (first, last)]
        assert row == [tag, *" ".join(cells).split()]


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


def test_a_sweep_trains_every_combination(ntk_train):
    words = [*TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    out = ntk_train("-m", *words, "seed=0,1", "model.depth=1,2")
    folders = sorted(
        path.parents[1].name
        for path in Path().glob("multirun/mlp/*/*/.hydra/config.yaml")
    )
    assert [folder[:2] for folder in folders] == ["0_", "1_", "2_", "3_"]
    assert "model.depth=2" in folders[3]
    assert "seed=1" in folders[3]
    assert out.count("Run directory: ") == 4
    with pytest.raises(SystemExit, match="ckpt=last goes on with one run"):
        ntk_train("-m", *words, "seed=0,1", "ckpt=last")


def test_data_that_does_not_describe_itself_is_refused(ntk_train):
    data = "data={_target_: lightning.pytorch.LightningDataModule}"
    with pytest.raises(
        SystemExit, match="data: LightningDataModule must say its `shape`"
    ):
        ntk_train(*TINY, "~data", f"+{data}")


class InterruptAt(pl.Callback):
    """Ctrl-C after some update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ckpt=last"], "ckpt=last: no run of 'mlp'"),
        (["ckpt=nope"], "ckpt: "),
    ],
    ids=["last", "nope"],
)
def test_our_own_sentence_is_told_without_hydras_words(ntk_train, words, sentence):
    with pytest.raises(SystemExit) as stop:
        ntk_train(*TINY, *words)
    assert str(stop.value).startswith(f"ntk-train: {sentence}")
    assert "\n" not in str(stop.value)


def test_runs_that_start_in_one_second_do_not_share_a_directory(ntk_train):
    now = "hydra.run.dir='${run_directory:${name},${ckpt},now}'"
    outs = [ntk_train(*TINY, "trainer.max_epochs=1", now) for _ in range(3)]
    for out, name in zip(outs, ("now", "now_1", "now_2"), strict=True):
        folder = Path("outputs", "mlp", name)
        assert f"Run directory: {folder.resolve()}\n" in out
        assert (folder / "checkpoints" / "last.ckpt").is_file()
        assert (folder / ".hydra" / "config.yaml").is_file()
    assert len([*Path("outputs", "mlp").iterdir()]) == len(outs)


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


@pytest.mark.slow
def test_two_processes_train_and_one_reports(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ntk_callbacks.cli",
            *TINY,
            "trainer=ddp",
            "trainer.max_epochs=1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert run.stdout.count("Run directory: ") == 1
    assert "(12)" in run.stdout  # 1438 examples, two times 64 of them in a step
    assert "sync_dist" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["experiment=mlp"],
        ["experiment=cnn"],
        ["experiment=resnet"],
        ["experiment=mlp", "model.parametrization=ntk", "optimizer.lr=5"],
        ["experiment=cnn", "model.parametrization=ntk", "optimizer.lr=3"],
        ["experiment=resnet", "model.parametrization=ntk", "optimizer.lr=1"],
    ],
    ids=" ".join,
)
def test_experiments_reach_95_percent_with_their_defaults(ntk_train, words):
    out = ntk_train(*words, "callbacks=none", *QUIET)
    (row,) = [line.split() for line in out.splitlines() if line.startswith("test/acc")]
    assert float(row[3]) >= 0.95
