"""Disks that are full, folders that others use: no number is lost, none is mixed up."""

import math
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from monitored import Plain, Recorder, fit, same, seeded

from ntk_callbacks import NTKMonitor, ParameterDriftMonitor, load_history
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
]


@contextmanager
def room_for(size):
    """A quota that the system itself enforces, on every file of this process."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def measurement(step, length=3, run=0.0):
    vectors = {"ntk/v": torch.full((length,), float(step))} if length else {}
    return Measurement(
        step, {"ntk/trace": run + step / 3, "ntk/odd": math.nan}, vectors
    )


def history_of(measurements):
    return [(m.step, m.scalars) for m in measurements]


def steps_of(folder, tag="ntk/trace"):
    return load_history(folder)[tag].steps.tolist()


def values_of(folder, tag="ntk/trace"):
    return load_history(folder)[tag].values.tolist()


# The file -----------------------------------------------------------------------------


@pytest.mark.parametrize("large", ["tensors", "line"])
def test_what_did_not_fit_is_added_when_there_is_room(large):
    file = HistoryFile(Path("run", FOLDER), "ntk")
    taken = [measurement(step) for step in range(5)]
    big = measurement(2, 10_000) if large == "tensors" else measurement(2)
    if large == "line":
        big.scalars.update({f"ntk/{i}": i / 3 for i in range(2000)})
    taken[2] = big
    file.append(taken[0], -1)
    file.append(taken[1], 0, history_of(taken[:1]))
    before = {path.name for path in file.folder.iterdir()}
    with room_for(20_000), pytest.raises(OSError, match="too large: 'run/ntk_hist"):
        file.append(taken[2], 1, history_of(taken[:2]))
    assert steps_of("run") == [0, 1]
    left = {path.name for path in file.folder.iterdir()} - before
    assert left == (set() if large == "tensors" else {"ntk-00000002.safetensors"})
    file.append(taken[3], 2, history_of(taken[:3]))
    file.append(taken[4], 3, history_of(taken[:4]))
    history = load_history("run")
    assert history["ntk/trace"].steps.tolist() == [0, 1, 2, 3, 4]
    assert history["ntk/trace"].values.tolist() == [m / 3 for m in range(5)]
    assert history["ntk/v"].steps.tolist() == [0, 1, 3, 4]


def test_a_folder_that_was_removed_is_written_anew():
    file = HistoryFile(Path("run", FOLDER), "ntk")
    file.conventions = {"seed": "3"}
    taken = [measurement(step) for step in range(3)]
    file.append(taken[0], -1)
    file.append(taken[1], 0, history_of(taken[:1]))
    shutil.rmtree("run")
    file.append(taken[2], 1, history_of(taken[:2]))
    assert values_of("run") == [0.0, 1 / 3, 2 / 3]
    assert load_history("run").conventions == {"ntk": {"seed": "3"}}


def test_of_two_processes_in_one_file_the_first_steps_aside():
    first, second = (HistoryFile(Path("run", FOLDER), "ntk") for _ in range(2))
    theirs = [measurement(step, run=7.0) for step in range(3)]
    first.append(measurement(0), -1)
    second.append(theirs[0], -1)
    for step in (1, 2):
        with pytest.raises(RuntimeError, match=r"another process writes to ntk\.jsonl"):
            first.append(measurement(step), step - 1, history_of([measurement(0)]))
        second.append(theirs[step], step - 1, history_of(theirs[:step]))
    assert values_of("run") == [7.0, 7 + 1 / 3, 7 + 2 / 3]


def test_a_run_that_goes_on_where_another_one_was_measured_takes_its_own_along():
    theirs = HistoryFile(Path("run", FOLDER), "ntk")
    for step in range(6):
        theirs.append(measurement(step, run=7.0), step - 1)
    ours = [measurement(step) for step in (0, 2, 4)]
    HistoryFile(Path("run", FOLDER), "ntk").append(ours[2], 2, history_of(ours[:2]))
    assert steps_of("run") == [0, 2, 4]
    assert values_of("run") == [0.0, 2 / 3, 4 / 3]


class Mortal(HistoryFile):
    """Fails when told to, with any part of its text on the disk."""

    torn = None

    def _add(self, rows):
        if self.torn is None:
            return super()._add(rows)
        Path("aside").mkdir(exist_ok=True)
        spare = HistoryFile(Path("aside"), "spare")
        spare.path.unlink(missing_ok=True)
        spare._add(rows)
        text = spare.path.read_bytes()
        with self.path.open("ab") as file:
            file.write(text[: int(self.torn * len(text))])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("seed", range(60))
def test_any_life_of_a_run_leaves_every_number_it_remembers(seed):
    """Failed and torn writes, kills, checkpoints, resumed runs, in any order."""
    chance = random.Random(seed)
    folder = Path("run", FOLDER)
    file, memory, step = Mortal(folder, "ntk"), [], 0
    saved = []
    for moment in range(40):
        event = chance.random()
        if event < 0.15:
            saved = [*memory]
        elif event < 0.3:  # killed, and resumed from the checkpoint
            memory = [*saved]
            file = Mortal(folder, "ntk")
        after = memory[-1][0] if memory else -1
        step = after + chance.randint(1, 3) if memory else 0
        taken = measurement(step, length=0, run=float(moment))
        fails = chance.random() < 0.3 and moment < 39
        file.torn = chance.choice([0.0, chance.random(), 1.0]) if fails else None
        try:
            file.append(taken, after, memory)
        except OSError:
            assert fails
        memory.append((step, taken.scalars))
    assert steps_of("run") == [step for step, _ in memory]
    assert values_of("run") == [row["ntk/trace"] for _, row in memory]


# Monitors -----------------------------------------------------------------------------


class DiskFull(Callback):
    """Between two steps the file of a monitor is one that has no room: /dev/full."""

    def __init__(self, begin, end, path="run/ntk_history/params.jsonl"):
        self.begin, self.end, self.path = begin, end, Path(path)

    def on_train_batch_start(self, trainer, *_):
        aside = self.path.with_suffix(".aside")
        if trainer.global_step == self.begin:
            self.path.rename(aside)
            self.path.symlink_to("/dev/full")
        elif trainer.global_step == self.end:
            aside.rename(self.path)

    def on_train_end(self, trainer, *_):
        if self.end is math.inf:  # room again just before the monitor's last attempt
            self.path.with_suffix(".aside").rename(self.path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("end", [5, math.inf], ids=["for a while", "until the end"])
def test_numbers_measured_while_the_disk_was_full_are_written_later(end):
    seeded()
    monitor = ParameterDriftMonitor(1, history="run")
    with pytest.warns(UserWarning, match="No space left") as caught:
        run = fit(Plain(), [DiskFull(2, end), monitor])
    (text,) = (str(w.message) for w in caught if "No space" in str(w.message))
    assert text.startswith(
        f"ParameterDriftMonitor: the history in {Path('run').absolute()} did not take "
        "the measurement of step 3 (OSError: [Errno 28]"
    )
    assert "written with the next measurement or at the end of the run" in text
    assert "history=<folder>" in text
    history = load_history("run")
    for tag in ("params/displacement", "params/path_length"):
        assert history[tag].steps.tolist() == [*range(9)]
        assert history[tag].values.tolist() == [row[tag] for _, row in monitor.history]
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


def resumed(first, then, folder="run"):
    """Six updates with some monitors, six more with others."""
    seeded()
    fit(Plain(), first, max_steps=6, logger=Recorder()).trainer.save_checkpoint(
        "6.ckpt"
    )
    fit(Plain(), then, max_steps=12, logger=Recorder(), ckpt_path="6.ckpt")
    return load_history(folder)["params/displacement"]


def drift(every, **settings):
    return ParameterDriftMonitor(every, history="run", on_error="raise", **settings)


def test_another_schedule_keeps_what_was_measured_before():
    with pytest.warns(UserWarning, match="no earlier measurement"):
        series = resumed([drift(2)], [drift(3)])
    assert series.steps.tolist() == [0, 2, 4, 6, 9, 12]
    assert series.values[3] == 0.0  # references are taken anew
    assert (series.values[[1, 2, 4, 5]] > 0).all()


def test_a_monitor_that_is_added_later_has_no_past():
    with pytest.warns(UserWarning, match="no earlier measurement"):
        resumed([drift(2)], [drift(2), NTKMonitor(4, 3, history="run")])
    assert steps_of("run") == [6, 9, 12]
    assert steps_of("run", "params/displacement") == [0, 2, 4, 6, 8, 10, 12]


def test_checkpoint_of_one_run_in_the_folder_of_another():
    """The curve is that of the weights that go on, from its first step."""
    seeded()
    ours = fit(Plain(), [drift(2)], max_steps=6)
    ours.trainer.save_checkpoint("ours.ckpt")
    wanted = load_history("run")["params/displacement"].values.tolist()
    shutil.rmtree("run")
    seeded(99)
    fit(Plain(), [drift(2)], max_steps=8)
    assert load_history("run")["params/displacement"].values[1] != wanted[1]
    fit(Plain(), [drift(2)], max_steps=8, ckpt_path="ours.ckpt")
    series = load_history("run")["params/displacement"]
    assert series.steps.tolist() == [0, 2, 4, 6, 8]
    assert series.values.tolist()[:4] == wanted


def test_a_new_run_in_the_folder_of_another_says_so_once():
    def monitors():
        return [drift(4), NTKMonitor(4, 4, history="run", on_error="raise")]

    fit(Plain(), [*monitors(), drift(4, name="params_b")])
    with pytest.warns(UserWarning, match="of another run") as caught:
        fit(Plain(), monitors())
    (text,) = (str(w.message) for w in caught if "another run" in str(w.message))
    assert str(Path("run", FOLDER).absolute()) in text
    assert "(ntk, params, params_b)" in text
    assert "Give each run a folder of its own" in text
    assert steps_of("run") == [0, 4, 8]


def test_two_runs_that_begin_at_once_in_one_folder():
    """Two jobs that got the same version of a logger."""
    other = HistoryFile(Path("run", FOLDER), "params")

    class Begins(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                other.append(Measurement(0, {"params/displacement": 7.0}), -1)

    seeded()
    monitor = ParameterDriftMonitor(2, history="run")
    with pytest.warns(UserWarning, match="another process writes to params") as caught:
        run = fit(Plain(), [Begins(), monitor])
    assert sum("another process" in str(w.message) for w in caught) == 1
    assert [step for step, _ in monitor.history] == [0, 2, 4, 6, 8]
    assert load_history("run")["params/displacement"].values.tolist() == [7.0]
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


# Where --------------------------------------------------------------------------------


def test_a_logger_that_cannot_say_where_its_files_are_is_passed_over():
    class Unreachable(Recorder):
        @property
        def log_dir(self):
            raise ConnectionError("the tracking server does not answer")

    monitor = ParameterDriftMonitor(4, on_error="raise")
    fit(Plain(), [monitor], logger=[Unreachable(), CSVLogger("csv", "", "")])
    assert steps_of("csv", "params/displacement") == [0, 4, 8]


def test_a_folder_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monitor = ParameterDriftMonitor(4, history="~/run", on_error="raise")
    fit(Plain(), [monitor])
    assert not Path("~").exists()
    assert steps_of("home/run", "params/displacement") == [0, 4, 8]
    assert load_history("~/run").folder == tmp_path / "home" / "run" / FOLDER


@pytest.mark.parametrize("where", ["s3://bucket/run", "gs://bucket", "file:///tmp/run"])
def test_a_folder_elsewhere_is_refused_before_any_training(where):
    with pytest.raises(ValueError, match="the path of a folder on this machine"):
        ParameterDriftMonitor(history=where)


def test_a_program_that_changes_its_working_directory(tmp_path, monkeypatch):
    class Moves(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                monkeypatch.chdir(tmp_path.parent)

    fit(Plain(), [Moves(), drift(1)])
    assert steps_of(tmp_path / "run", "params/displacement") == [*range(9)]
    assert not Path("run").exists()
