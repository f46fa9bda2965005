"""What is void or torn: a run that died, went back or went on elsewhere."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from histories import RESUMED_MID_EPOCH, check, measurement, written

from ntk_callbacks import load_history
from ntk_callbacks.reporting.history_file import FOLDER, HistoryFile

pytestmark = RESUMED_MID_EPOCH


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
