"""What monitors keep is what they logged, wherever the run goes on."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import RESUMED_MID_EPOCH
from interrupted import Repeatable
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitored import Plain, Recorder, fit, loader, same, seeded, three_monitors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks import (
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    Probe,
    load_history,
)
from ntk_callbacks.reporting.history import history_folders
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

pytestmark = RESUMED_MID_EPOCH


def test_history_holds_what_the_loggers_got(tmp_path):
    table, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="board")
    fit(Plain(), three_monitors(3), logger=[table, board])
    history = load_history(table.log_dir)
    with Path(table.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["step"] != ""]
    events = EventAccumulator(
        board.log_dir, size_guidance={"scalars": 0, "histograms": 0}
    ).Reload()
    assert len(history.scalars) > 25
    for tag in history.scalars:
        series = history[tag]
        logged = [(int(row["step"]), float(row[tag])) for row in rows if row[tag]]
        assert series.steps.tolist() == [step for step, _ in logged]
        np.testing.assert_array_equal(series.values, [value for _, value in logged])
        drawn = events.Scalars(tag)
        assert series.steps.tolist() == [event.step for event in drawn]
        np.testing.assert_allclose(
            series.values, [event.value for event in drawn], rtol=1e-6
        )
    for tag in history.vectors:
        series = history[tag]
        counts = [(e.step, e.histogram_value.num) for e in events.Histograms(tag)]
        lengths = [len(values) for values in series.values]
        assert [*zip(series.steps.tolist(), lengths, strict=True)] == counts
    assert not Path(board.log_dir, FOLDER).exists()


def test_conventions_say_what_the_numbers_mean(tmp_path):
    probe = Probe(torch.randn(4, 3), torch.arange(4) % 2)
    options = NTKOptions(mode="train", keep_kernels=True)
    monitor = NTKMonitor(probe, 3, outputs="trace", options=options, on_error="raise")
    fit(Plain(), [monitor, ParameterDriftMonitor(3)], logger=CSVLogger(tmp_path))
    (run,) = history_folders(tmp_path)
    history = load_history(run)
    found = history.conventions["ntk"]
    assert found["outputs"] == "trace"
    assert found["mode"] == "train"
    assert found["scaling"] is None
    assert found["dtype"] == "float32"
    assert found["probe_digest"] == probe.digest
    assert found["probe_examples"] == 4
    assert found["parameter_count"] == 26
    assert {"version", "torch", "seed", "torch_seed", "model"} <= found.keys()
    assert history.conventions["params"]["probe_digest"] is None
    assert [kernel.shape for kernel in history["ntk/kernel"].values] == [(4, 4)] * 4


def test_outputs_that_were_chosen_automatically_are_named(tmp_path):
    fit(Plain(), [NTKMonitor(4, 3)], logger=CSVLogger(tmp_path))
    (run,) = history_folders(tmp_path)
    assert load_history(run).conventions["ntk"]["outputs"] == "full"


def curves(run):
    """Everything but times, which no run repeats."""
    history = load_history(run)
    return {
        tag: {"steps": history[tag].steps.tolist(), "values": [*history[tag].values]}
        for tag in history
        if not tag.startswith("monitor/")
    }


def plain(value):
    if isinstance(value, np.ndarray | np.generic):
        return torch.as_tensor(value)
    return value


def same_curves(left, right):
    for found in (left, right):
        for series in found.values():
            series["values"] = [plain(value) for value in series["values"]]
    same(left, right)


def trained(folder, ckpt_path=None, steps=12):
    seeded()
    settings = {"max_steps": steps, "train": loader(15, 5), "ckpt_path": ckpt_path}
    logger = CSVLogger(folder, "", "")
    return fit(Repeatable(), three_monitors(5), logger=logger, **settings)


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_resumed_run_leaves_the_history_of_an_unbroken_one(tmp_path):
    """Beyond the checkpoint, and off the schedule, measurements are superseded."""
    trained("whole")
    short = trained("broken", steps=6)  # measured at 6, which is no multiple of 5
    short.trainer.save_checkpoint("6.ckpt")
    assert load_history("broken")["ntk/trace"].steps.tolist() == [0, 5, 6]
    trained("broken", ckpt_path="6.ckpt", steps=11)
    assert load_history("broken")["ntk/trace"].steps.tolist() == [0, 5, 10, 11]
    trained("broken", ckpt_path="6.ckpt")
    assert load_history("broken")["ntk/trace"].steps.tolist() == [0, 5, 10, 12]
    same_curves(curves("broken"), curves("whole"))
    trained("elsewhere", ckpt_path="6.ckpt")
    whole, elsewhere = curves("whole"), curves("elsewhere")
    scalars = load_history("whole").scalars
    same_curves(
        *({t: c for t, c in x.items() if t in scalars} for x in (whole, elsewhere))
    )
    assert elsewhere["ntk/eigenvalues_log10"]["steps"] == [10, 12]


def test_fit_that_goes_on_with_the_same_objects(tmp_path):
    monitors = three_monitors(5)
    run = fit(Plain(), monitors, logger=CSVLogger(tmp_path, "", ""), max_steps=6)
    run.trainer.fit_loop.epoch_loop.max_steps = 12
    run.trainer.fit(run.model, loader())
    assert load_history(tmp_path)["ntk/trace"].steps.tolist() == [0, 5, 10, 12]


def test_where_a_history_lies(tmp_path):
    def files():
        return sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("*"))

    def monitor(**settings):
        return [ParameterDriftMonitor(3, on_error="raise", **settings)]

    fit(Plain(), monitor(), logger=False)
    fit(Plain(), monitor(), logger=Recorder())
    fit(Plain(), monitor(), logger=CSVLogger("csv"), fast_dev_run=True)
    fit(Plain(), monitor(history=False), logger=False, default_root_dir="root")
    assert not list(tmp_path.rglob(FOLDER))
    fit(Plain(), monitor(), logger=False, default_root_dir="root")
    fit(Plain(), monitor(history="chosen"), logger=False)
    fit(Plain(), monitor(history=Path("path")), logger=CSVLogger("csv"))
    fit(Plain(), monitor(), logger=[Recorder(), TensorBoardLogger("board")])
    assert [str(run) for run in history_folders(".")] == [
        *("board/lightning_logs/version_0", "chosen", "path", "root")
    ]


class Remote(Recorder):
    """A logger that keeps its files on a server, as those of services do."""

    def __init__(self, save_dir):
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def version(self):
        return "abc"


def test_loggers_without_a_folder_of_the_run():
    for folder in ("mine", "s3://bucket/logs"):
        fit(
            Plain(), [ParameterDriftMonitor(3, on_error="raise")], logger=Remote(folder)
        )
    assert [str(run) for run in history_folders(".")] == ["mine/recorder/abc"]


@pytest.mark.parametrize("value", [3, None, 0.5, "", b"run"])
def test_history_that_is_no_path(value):
    with pytest.raises(ValueError, match="expected True, False, or the path"):
        ParameterDriftMonitor(history=value)


@pytest.mark.parametrize("when", [0, 6], ids=["from the start", "in the middle"])
def test_failing_disk_warns_once_and_training_goes_on(when, monkeypatch):
    """Root writes into read-only folders, so the disk itself refuses."""
    append = HistoryFile.append

    def full(self, measurement, *args):
        if measurement.step >= when:
            raise OSError(28, "No space left on device")
        append(self, measurement, *args)

    monkeypatch.setattr(HistoryFile, "append", full)
    recorder = Recorder()
    seeded()
    monitor = ParameterDriftMonitor(3, history="run")
    with pytest.warns(UserWarning, match="No space left") as caught:
        run = fit(Plain(), [monitor], logger=recorder)
    texts = [str(w.message) for w in caught if "No space" in str(w.message)]
    assert len(texts) == 1
    assert f"history in {Path('run').absolute()}" in texts[0]
    assert [*recorder.measured()] == [0, 3, 6, 8]
    if when:
        assert load_history("run")["params/displacement"].steps.tolist() == [0, 3]
    seeded()
    same(run.model.state_dict(), fit(Plain()).model.state_dict())


def test_folder_that_cannot_be_made_warns_once_and_training_goes_on():
    Path("taken").write_text("a file where the folder should be")
    monitor = ParameterDriftMonitor(3, history="taken")
    with pytest.warns(UserWarning, match="did not take the measurement") as caught:
        fit(Plain(), [monitor])
    assert len([w for w in caught if "history in" in str(w.message)]) == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    fit(Plain(), [ParameterDriftMonitor(3, history="run", on_error="raise")])
    assert not Path("run").exists()
