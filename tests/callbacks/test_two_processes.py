"""Data-parallel training: one process measures, the others never wait for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monitored import same
from two_processes import plain

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(monitored, rank) -> what that process found."""
    folder = tmp_path_factory.mktemp("processes")
    for which in ("with", "without"):
        command = [sys.executable, str(SCRIPT), str(folder), which]
        done = subprocess.run(
            command, cwd=folder, timeout=240, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        (monitored, rank): torch.load(
            folder / f"{monitored}.{rank}.pt", weights_only=False
        )
        for monitored in (True, False)
        for rank in (0, 1)
    }


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_trains_as_without_monitors(results, rank):
    """Modes 16, 17, 19: no collective, no forward through the wrapper, no hang."""
    same(results[True, rank]["trace"], results[False, rank]["trace"])
    assert results[True, rank]["trace"]["logged"]


def test_processes_agree_on_the_weights(results):
    left, right = (results[True, rank]["trace"]["weights"] for rank in (0, 1))
    parameters = [name for name in left if "running" not in name]
    same(*({name: side[name] for name in parameters} for side in (left, right)))


def test_only_rank_zero_logs(results):
    """24 examples on 2 processes, in threes, two batches an update: 2 an epoch."""
    assert [*results[True, 0]["measured"]] == [0, 3, 4]
    assert not results[True, 1]["measured"]
    tags = {*results[True, 0]["measured"][3]}
    assert {"ntk/trace", "params/displacement", "jacobian/mean_square"} <= tags
    assert "signal/chi" in tags
    assert results[True, 0]["measured"][3]["prediction/step_error"] == 0.0
    assert not any("broken" in tag for tag in tags)


def test_resume_on_two_processes(results):
    assert [*results[True, 0]["resumed"]] == [6]
    assert not results[True, 1]["resumed"]
    row = results[True, 0]["resumed"][6]
    assert row["params/displacement"] > 0
    assert row["ntk/relative_change"] > 0


def test_synchronized_layers_are_refused_in_train_mode(results):
    """Mode 18: their statistics would wait for the process that does not measure."""
    assert "SyncBatchNorm" in results[True, 0]["text"]
    assert 'mode="eval"' in results[True, 0]["text"]


GROUPS = ("ntk", "params", "jacobian", "signal", "features", "prediction", "linear")


def test_both_processes_know_the_same_values(results):
    left, right = (results[True, rank]["plain"]["metrics"] for rank in (0, 1))
    assert {tag.split("/")[0] for tag in left} >= {*GROUPS}
    own = {tag for tag in left if "/" not in tag}  # the loss of each one's batch
    same(*({tag: side[tag] for tag in side.keys() - own} for side in (left, right)))
    assert left.keys() == right.keys()


def test_two_processes_measure_what_one_does(results):
    """The same batches, whole or halved: equal up to the order of sums."""
    expected = plain()["measured"]
    found = results[True, 0]["plain"]["measured"]
    assert [*found] == [*expected] == [0, 3, 6, 8]
    for step, row in expected.items():
        assert row.keys() == found[step].keys()
        assert {tag.split("/")[0] for tag in row} >= {*GROUPS}
        for tag, value in row.items():
            close = pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True)
            assert found[step][tag] == close, (step, tag)
