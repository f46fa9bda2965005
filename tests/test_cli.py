"""`ntk-train` as a user meets it: help, typos, sweeps, loggers."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from commands import QUIET, TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ntk_train = commands.ntk_train


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
