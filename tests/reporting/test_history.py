"""What monitors keep can be read back, whatever happened to the run meanwhile."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupted import Repeatable
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from monitored import Plain, Recorder, fit, loader, same, seeded, three_monitors
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks import (
    NTKMonitor,
    NTKOptions,
    ParameterDriftMonitor,
    Probe,
    load_history,
)
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history import history_folders
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
]


def measurement(step):
    return Measurement(
        step,
        {"ntk/trace": step / 3, "ntk/velocity": math.nan},
        {"ntk/eigenvalues": torch.arange(step % 3 + 1).double() + step},
        {"ntk/kernel": torch.eye(2) * step},
    )


def written(steps, folder="run", **settings):
    file = HistoryFile(Path(folder, FOLDER), "ntk", **settings)
    after = -1
    for step in steps:
        file.append(measurement(step), after)
        after = step
    return Path(folder)


def check(history, steps):
    """Every number is the one that was measured, to the last bit."""
    assert history["ntk/trace"].steps.tolist() == [*steps]
    assert history["ntk/trace"].values.tolist() == [step / 3 for step in steps]
    assert np.isnan(history["ntk/velocity"].values).all()
    spectra = history["ntk/eigenvalues"]
    assert spectra.steps.tolist() == [*steps]
    for step, values in zip(steps, spectra.values, strict=True):
        assert values.dtype == np.float64
        assert values.tolist() == measurement(step).vectors["ntk/eigenvalues"].tolist()


# The file -------------------------------------------------------------------------


def test_what_was_written_is_read():
    history = load_history(written([0, 2, 5]))
    check(history, [0, 2, 5])
    assert [*history] == ["ntk/trace", "ntk/velocity", "ntk/eigenvalues"]
    assert "ntk/kernel" not in history
    assert repr(history).endswith("3 quantities, steps 0 to 5)")


def test_matrices_are_kept_on_request():
    history = load_history(written([0, 4], matrices=True))
    kernels = history["ntk/kernel"]
    assert kernels.steps.tolist() == [0, 4]
    np.testing.assert_array_equal(kernels.values[1], 4 * np.eye(2))
    assert history.matrices == ("ntk/kernel",)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-300, 0.1, -0.0])
def test_a_number_is_kept_to_the_last_bit_and_the_file_is_strict_json(value):
    file = HistoryFile(Path("run", FOLDER), "ntk")
    file.append(Measurement(0, {"v": value}), -1)
    (found,) = load_history("run")["v"].values.tolist()
    assert repr(found) == repr(value)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in (file.folder / "ntk.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "vector",
    [
        torch.tensor([1.5, 2.5]).bfloat16(),
        torch.tensor([1.5, 2.5]).half(),
        torch.tensor([1.5, 2.5, 9.0, 9.0])[:2],
        torch.tensor([[1.5, 0.0], [2.5, 0.0]])[:, 0],
        torch.tensor([1.5, 2.5], requires_grad=True),
    ],
    ids=["bfloat16", "half", "view", "strided", "gradient"],
)
def test_any_vector_becomes_an_array(vector):
    file = HistoryFile(Path("run", FOLDER), "ntk")
    file.append(Measurement(0, {}, {"v": vector, "same": vector}), -1)
    history = load_history("run")
    assert history["v"].values[0].tolist() == [1.5, 2.5]
    assert history["same"].values[0].tolist() == [1.5, 2.5]


def test_tensors_are_plain_safetensors():
    folder = written([3]) / FOLDER
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="np") as file:
        assert [*file.keys()] == ["ntk/eigenvalues"]


def test_names_of_monitors_do_not_meet():
    for name in ("ntk", "ntk/test", "ntk.test"):
        file = HistoryFile(Path("run", FOLDER), name)
        file.append(Measurement(1, {f"{name}/trace": 1.0}), -1)
    assert {*load_history("run")} == {"ntk.test/trace", "ntk/test/trace", "ntk/trace"}


# What is void, what is torn ---------------------------------------------------------


def test_steps_beyond_those_a_run_goes_on_from_are_superseded():
    folder = written([0, 2, 4, 6])
    again = HistoryFile(folder / FOLDER, "ntk")
    again.append(measurement(4), after=2)
    check(load_history(folder), [0, 2, 4])
    again.append(measurement(6), after=4)
    again.append(measurement(8), after=6)
    check(load_history(folder), [0, 2, 4, 6, 8])


def test_a_new_run_in_the_same_folder_begins_anew():
    written([0, 2, 4])
    check(load_history(written([0, 3])), [0, 3])


def test_a_run_that_goes_on_elsewhere_takes_what_it_remembers_along():
    file = HistoryFile(Path("elsewhere", FOLDER), "ntk")
    earlier = [
        (0, {"ntk/trace": 0.0}),
        (2, {"ntk/trace": 2 / 3}),
        (5, {"ntk/trace": 9}),
    ]
    file.append(measurement(4), after=2, earlier=earlier)
    history = load_history("elsewhere")
    assert history["ntk/trace"].steps.tolist() == [0, 2, 4]
    assert history["ntk/trace"].values.tolist() == [0, 2 / 3, 4 / 3]
    assert history["ntk/eigenvalues"].steps.tolist() == [4]


def test_torn_at_any_byte_it_loads_up_to_the_last_complete_measurement(tmp_path):
    folder = written([0, 1, 2])
    path = folder / FOLDER / "ntk.jsonl"
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(ends[1], len(whole) + 1):
        path.write_bytes(whole[:size])
        # Without its newline a line is complete; the first is that of conventions.
        complete = sum(size >= end for end in ends) - 1
        check(load_history(folder), range(complete))


def test_tens_of_thousands_of_measurements_are_read_in_seconds():
    """It took minutes when each line looked at all lines before it."""
    folder = written([0])
    with (folder / FOLDER / "ntk.jsonl").open("a") as file:
        for step in range(1, 40_001):
            row = {"step": step, "after": step - 1, "scalars": {"ntk/trace": step / 3}}
            file.write(json.dumps(row) + "\n")
    begun = time.process_time()
    trace = load_history(folder)["ntk/trace"]
    assert time.process_time() - begun < 20
    assert trace.steps.tolist() == [*range(40_001)]
    assert trace.values.tolist() == [step / 3 for step in range(40_001)]


@pytest.mark.parametrize("torn", [0, 1, 30, -1])
def test_a_run_goes_on_after_a_torn_line(torn):
    folder = written([0, 1])
    path = folder / FOLDER / "ntk.jsonl"
    line = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(line[:torn])
    again = HistoryFile(folder / FOLDER, "ntk")
    again.conventions = {"seed": "of the second process"}
    again.append(measurement(2), after=1)
    history = load_history(folder)
    check(history, [0, 1, 2])
    assert history.conventions["ntk"] == again.conventions


def test_zeros_after_a_power_failure_are_no_measurement():
    folder = written([0, 1])
    with (folder / FOLDER / "ntk.jsonl").open("ab") as file:
        file.write(b"\0" * 512)
    check(load_history(folder), [0, 1])
    HistoryFile(folder / FOLDER, "ntk").append(measurement(2), after=1)
    check(load_history(folder), [0, 1, 2])


WRITER = """
import sys
from pathlib import Path
import torch
from ntk_callbacks.record import Measurement
from ntk_callbacks.reporting.history_file import HistoryFile
file = HistoryFile(Path(sys.argv[1]), "ntk")
first = int(sys.argv[2])
for step in range(first, 10**6):
    scalars = {f"ntk/{i}": float(step) for i in range(200)}
    vectors = {"ntk/v": torch.full((20_000,), float(step))}
    file.append(Measurement(step, scalars, vectors), step - 1)
"""


@pytest.mark.slow
def test_killed_while_it_writes():
    """A real kill -9, at three moments that nobody chose; then the run goes on."""
    folder, first = Path("run", FOLDER), 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(folder.absolute()), str(first)]
        process = subprocess.Popen(command)
        target = folder / f"ntk-{first + 20:08d}.safetensors"
        while not target.exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        history = load_history("run")
        steps = history["ntk/0"].steps.tolist()
        assert steps == [*range(steps[-1] + 1)]
        assert steps[-1] >= first + 19
        for tag in history.scalars:
            assert history[tag].values.tolist() == steps
        for step, values in zip(steps, history["ntk/v"].values, strict=True):
            assert (values == step).all()
        first = steps[-1] - 5  # as after a checkpoint


# Errors -------------------------------------------------------------------------------


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        load_history("nowhere")


def test_folder_without_a_history():
    Path("empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"'empty' holds no ntk_history .*beside"
    ):
        load_history("empty")


@pytest.mark.parametrize("folder", ["run", "run/ntk_history"])
def test_history_without_any_file(folder):
    Path("run", FOLDER).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="before its first measurement") as info:
        load_history(folder)
    assert "below it" not in str(info.value)


def test_folder_of_runs_says_where_they_are():
    written([0], "runs/a")
    written([0], "runs/b")
    with pytest.raises(FileNotFoundError, match="below it: runs/a, runs/b"):
        load_history("runs")
    assert history_folders("runs") == [Path("runs/a"), Path("runs/b")]
    assert history_folders("runs/a") == [Path("runs/a")]
    assert history_folders("runs/a/ntk_history") == [Path("runs/a")]
    check(load_history("runs/a/ntk_history"), [0])


def test_no_complete_measurement():
    path = written([0]) / FOLDER / "ntk.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="no complete measurement"):
        load_history("run")


def test_newer_format():
    path = written([0]) / FOLDER / "ntk.jsonl"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"format 2; .* reads up to 1\. Update"):
        load_history("run")


def test_unknown_tag_lists_the_known_ones():
    with pytest.raises(KeyError, match="'ntk/trac'; there are ntk/trace, ntk/velocity"):
        load_history(written([0]))["ntk/trac"]
    with pytest.raises(KeyError, match="keep_kernels=True"):
        load_history(written([0]))["ntk/kernel"]


def test_tensor_file_that_is_gone():
    folder = written([0, 1])
    (folder / FOLDER / "ntk-00000001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ntk/eigenvalues of step 1, is gone"):
        load_history(folder)["ntk/eigenvalues"]


def test_tensor_file_that_is_cut_short():
    folder = written([0, 1])
    path = folder / FOLDER / "ntk-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"ntk/eigenvalues of step 1, is damaged"):
        load_history(folder)["ntk/eigenvalues"]


def test_lines_of_another_kind_are_no_measurements():
    Path("data").mkdir()
    lines = [
        '{"text": "a", "step": 3}',
        "[1]",
        '{"format": "alpaca", "text": "b"}',
        '{"step": "3", "after": null, "scalars": {}}',
        '{"step": 3, "after": 0, "scalars": [1]}',
        '{"step": 3, "after": 0, "scalars": {"a": null}}',
        '{"step": 3, "after": 0, "scalars": {"a": 1.0}, "tensors": 2}',
    ]
    Path("data", "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="no complete measurement in 'data'"):
        load_history("data")


# Monitors -----------------------------------------------------------------------------


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


DYING = """
import os, signal, sys
from monitored import fit, Plain
from ntk_callbacks import NTKMonitor, ParameterDriftMonitor

calls = 0

def deadly(module, x):
    global calls
    if module.training is False and (calls := calls + 1) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return module(x)

monitors = [ParameterDriftMonitor(1, history="run"), NTKMonitor(4, 1, output_fn=deadly)]
fit(Plain(), monitors, max_steps=100, default_root_dir="run")
"""


@pytest.mark.slow
def test_run_killed_in_the_middle_of_a_measurement(tmp_path):
    """A real kill -9 inside the forward pass of the eleventh kernel or so."""
    process = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path), "40"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    history = load_history("run")
    kernels = history["ntk/trace"].steps.tolist()
    assert kernels == [*range(len(kernels))]
    assert len(kernels) > 2
    # The other monitor came first at each step.
    assert history["params/displacement"].steps.tolist() == [*kernels, len(kernels)]
    assert len(history["ntk/eigenvalues_log10"].values) == len(kernels)
